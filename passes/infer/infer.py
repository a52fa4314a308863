"""infer: the logical dimensions (factors) of every value, and their roles."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxpar.passes.infer.roles import assign_roles
from fxpar.passes.infer.rules.registry import spec_for
from fxpar.program import Program, user_line
from fxpar.sharding.factors import Dims, Factors
from fxpar.sharding.facts import describe_global, global_value
from fxpar.sharding.layout import Sharding


def infer(program: Program, pinned: dict[str, Sharding] | None = None) -> Program:
    """Find the factors of every value by one walk over the graph.

    Takes: a canonical program. pinned: how parameters are already stored (a module that was parallelized before);
    their dims start from those pieces, so that they can be expressed again.
    Afterwards: the `GlobalValue` of every node has the factors of its tensor, what the rule of its operator said (with the
    factors of several outputs), and whether a gradient flows to it; and each factor has its role. Operators without a rule are
    noted: they run replicated.
    """
    factors = Factors()
    sources = program.source_of()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            source = sources[node]
            describe_global(node, needs_grad=source.requires_grad, is_param=source.kind == "param")
            if isinstance(node.meta["val"], torch.Tensor):
                sharding = (pinned or {}).get(source.name) if source.kind == "param" else None
                describe_global(node, dims=factors.beside(
                    _pinned(factors, sharding) if sharding is not None else factors.fresh(node.meta["val"].shape)))
        elif node.op == "call_function":
            _infer_call(program, node, factors)
    assign_roles(program)
    return program


def _pinned(factors: Factors, sharding: Sharding) -> Dims:
    return tuple(tuple(f for piece in dim for f in factors.new(piece.size)) for dim in sharding)


def _infer_call(program: Program, node: fx.Node, factors: Factors) -> None:
    if node.target is operator.getitem:
        _infer_getitem(node)
        return
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor | tuple | list):
        return
    spec = spec_for(node, factors)
    if spec.unknown and spec.operands:
        program.note(f"no rule for {node.target}: it runs replicated, on full operands ({user_line(node)})")
    for dims in spec.outs:
        factors.beside(dims)
    describe_global(node, spec=spec, dims=spec.outs[0] if isinstance(value, torch.Tensor) else None,
                    needs_grad=_needs_grad(node, value))


def _infer_getitem(node: fx.Node) -> None:
    args: Any = node.args
    made, index = args
    values = made.meta["val"]
    index = index % len(values)
    position = sum(isinstance(v, torch.Tensor) for v in values[:index])
    known = global_value(made)
    assert known.spec is not None
    describe_global(node, position=position, dims=known.spec.outs[position],
                    needs_grad=known.needs_grad and node.meta["val"].is_floating_point())


def _needs_grad(node: fx.Node, value: Any) -> bool:
    if node.target is torch.ops.aten.detach.default:
        return False
    floats = value.is_floating_point() or value.is_complex() if isinstance(value, torch.Tensor) else True
    return floats and any(global_value(n).needs_grad for n in node.all_input_nodes)
