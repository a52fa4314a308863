"""sights: what attention masks say that depend on inputs: causal or a window, the segments of packed documents, padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpar.ops.attention import MaskSight
from fxpar.passes.canonical.masks import allowed_by, constants, mask_of, value_in, verdict_of
from fxpar.passes.infer.rules.spec import bind
from fxpar.program import Program, value_of
from fxpar.sharding.facts import describe_global

aten = torch.ops.aten
CONJUNCTIONS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
COPIES = (aten.expand.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.to.dtype)


def name_sights(program: Program) -> Program:
    """Say what masks are made of, where that is less than the mask.

    Takes: a functional program whose constant masks are gone. The graph stays as it is. Afterwards: `GlobalValue.sight` of a
    boolean mask [b or 1, 1, q, k] of `scaled_dot_product_attention` is a `MaskSight`, if the mask is a conjunction of what is
    constant and causal, of one comparison of integers of queries and of keys (segments), and of one boolean for each key
    (padding), each of which may be missing.
    """
    constant: set[fx.Node] | None = None
    tried: set[fx.Node] = set()
    for node in program.graph.nodes:
        mask = mask_of(node)
        if mask is None or mask in tried or value_of(mask).dtype != torch.bool or value_of(mask).dim() != 4:
            continue
        tried.add(mask)
        if constant is None:
            constant = constants(program)
        sight = _sight(program, mask, constant)
        if sight is not None:
            describe_global(mask, sight=sight)
    return program


@dataclass
class _Found:
    """Of the terms so far."""

    segments: tuple[fx.Node, fx.Node] | None = None
    valid: fx.Node | None = None


def _sight(program: Program, mask: fx.Node, constant: set[fx.Node]) -> MaskSight | None:
    _, heads, rows, columns = value_of(mask).shape
    if heads != 1:
        return None
    found, allowed = _Found(), torch.ones((), dtype=torch.bool)
    for term in _terms(mask, constant):
        shape = value_of(term).shape
        if term in constant:
            value = value_in(program, term)
            mine = None if value is None else allowed_by(value, rows, columns)
            if mine is None:
                return None
            allowed = allowed & mine
        elif (pair := _compared(term)) is not None and found.segments is None:
            found.segments = pair
        elif len(shape) == 4 and shape[1] == shape[2] == 1 and value_of(term).dtype == torch.bool and found.valid is None:
            found.valid = term
        else:
            return None
    verdict = verdict_of(allowed, rows, columns)
    if verdict is None:
        return None
    window = verdict if isinstance(verdict, int) else None
    of_queries, of_keys = found.segments or (None, None)
    return MaskSight(verdict != "all", window, of_queries, of_keys, found.valid)


def _terms(node: fx.Node, constant: set[fx.Node]) -> Iterator[fx.Node]:
    """What has to be true for the mask to be, all together."""
    args: Any = node.args
    if node in constant or not (node.target in CONJUNCTIONS or (node.target in COPIES and _is_copy(node))):
        yield node
    elif node.target in CONJUNCTIONS:
        for n in args[:2]:
            yield from _terms(n, constant)
    else:
        yield from _terms(args[0], constant)


def _is_copy(node: fx.Node) -> bool:
    """The same elements, broadcast at most, and booleans before, too."""
    before: Any = node.all_input_nodes[0]
    return value_of(before).dtype == torch.bool and value_of(before).dim() == value_of(node).dim()


def _compared(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Integers of queries [b or 1, 1, q, 1] and of keys [b or 1, 1, 1, k] that are to be equal."""
    if node.target is not aten.eq.Tensor:
        return None
    a = bind(node)
    one, other = a["self"], a["other"]
    shapes = [value_of(n).shape for n in (one, other)]
    if any(len(s) != 4 or s[1] != 1 or value_of(n).is_floating_point() or value_of(n).dtype == torch.bool
           for s, n in zip(shapes, (one, other), strict=True)):
        return None
    if shapes[0][3] == 1 and shapes[1][2] == 1:
        return one, other
    return (other, one) if shapes[1][3] == 1 and shapes[0][2] == 1 else None
