"""The table operator -> rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxpar import compat
from fxpar.passes.infer.rules.spec import Op, Spec, einsum, elementwise, finish, unknown
from fxpar.sharding.factors import Factors

Rule = Callable[[Op], Spec]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators. An overload packet means all its overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            for overload in getattr(target, "overloads", lambda: [None])():
                RULES[getattr(target, overload) if overload else target] = function
        return function

    return register


def notation(text: str, *targets: Any) -> None:
    """Register rules that are one line of einsum notation."""
    rule(*targets)(lambda op: einsum(op, text))


def find(target: Any) -> Rule | None:
    """The rule of an operator, if it has one."""
    return RULES.get(target)


def spec_for(node: fx.Node, factors: Factors) -> Spec:
    """The spec of a call: its rule's, that of a pointwise operator, or `unknown`."""
    op = Op(node, factors)
    function = find(node.target)
    if function is not None:
        return finish(op, function(op))
    if compat.is_pointwise(node.target) and op.tensors():
        return finish(op, elementwise(op))
    return unknown(op)
