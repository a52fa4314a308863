"""linear: what each value of a partitioned program is to the microbatches of a step. The analysis beside `microbatches`.

A value is, along the axis of microbatches,

    alike       replicated, the same for every microbatch: made of parameters, constants, and sums that a prologue computes
    split       this microbatch's own: its rows, what is made of them, or its part of a sum over the batch
    part        its sum over microbatches is the value: a sum over the batch of what depends on parameters, what is linear in one
    estimate    stands for a replicated value, but was computed from `count` times this microbatch's part of a sum

A loss is a part as a rule: a sum over the batch, divided by a count that is alike. What is alike and added to it (a penalty on
parameters) is divided by the number of microbatches, so that it counts once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from fxpar.errors import PlanError
from fxpar.ops.collectives import typed
from fxpar.ops.runtime import axis_index
from fxpar.program import Program, Source, user_line
from fxpar.sharding.facts import local_value
from fxpar.sharding.mesh import MICROBATCH

aten = torch.ops.aten
MicrobatchKind = Literal["alike", "split", "part", "estimate"]

MOVES = (
    aten.neg, aten.positive, aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.squeeze, aten.unsqueeze, aten.expand,
    aten.permute, aten.transpose, aten.t, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.select, aten.slice,
    aten.narrow, aten.sum, aten.mean, aten.cumsum, aten.cat, aten.stack, aten.unbind, aten.split, aten.split_with_sizes,
    aten.chunk, aten.movedim, aten.to, aten._to_copy,
)  # fmt: skip
ADDS = (aten.add, aten.sub, aten.rsub)
PRODUCTS = (aten.mul, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
CHOICES = (aten.where, aten.masked_fill)
SHAPES = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full,
          aten.new_empty)
"""They take no more than the shape of their operand."""


def _overloads(*packets: Any) -> frozenset[Any]:
    return frozenset(getattr(packet, name) for packet in packets for name in packet.overloads())


_MOVES, _ADDS, _PRODUCTS, _CHOICES, _SHAPES, _QUOTIENTS = map(
    lambda packets: _overloads(*packets), (MOVES, ADDS, PRODUCTS, CHOICES, SHAPES, (aten.div,)))


@dataclass
class Classification:
    """What `classify` finds. kinds: of every value. outside: collectives over microbatches that a prologue computes.

    alone: sums over microbatches of what is the same for all of them: so many times that. sliced: where a microbatch takes its
    slice of a replicated value. divided: (node, its operand or the place of a number among its arguments) for what is
    added to a part. nonlinear: (node, operand) where a part is used in a way that is not linear. in_order: buffers whose new
    value is an estimate. inexact: values that are computed from an estimate.
    """

    kinds: dict[fx.Node, MicrobatchKind] = field(default_factory=dict)
    outside: list[fx.Node] = field(default_factory=list)
    alone: list[fx.Node] = field(default_factory=list)
    sliced: list[fx.Node] = field(default_factory=list)
    divided: list[tuple[fx.Node, fx.Node | int]] = field(default_factory=list)
    nonlinear: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    in_order: frozenset[str] = frozenset()
    inexact: set[fx.Node] = field(default_factory=set)


def classify(program: Program) -> Classification:
    """The kind of every value of a partitioned program whose mesh has an axis of microbatches; the program stays as it is.

    Raises: `PlanError` for what microbatches cannot compute: a value that depends on parameters and on rows of several of them in
    another way than by a sum; a parameter, or the new value of a buffer, that lies along the batch.
    """
    in_order: frozenset[str] = frozenset()
    while True:
        values = _Classifier(program, in_order).run()
        found = in_order | {s.name for s, n in zip(program.tensor_sinks(), program.outputs(), strict=True)
                            if s.kind == "buffer" and values.kinds[n] in ("part", "estimate")}
        if found == in_order:
            return values
        in_order = found


def along_microbatches(node: fx.Node) -> bool | None:
    """Whether a value is laid out along the axis of microbatches; None where its layout is not known."""
    sharding = local_value(node).sharding
    return None if sharding is None else any(MICROBATCH in piece.axes for dim in sharding for piece in dim)


class _Classifier:
    def __init__(self, program: Program, in_order: frozenset[str]):
        self.program, self.sources = program, program.source_of()
        self.found = Classification(in_order=in_order)
        self.free: set[fx.Node] = set()
        self.varying: set[fx.Node] = set()

    def run(self) -> Classification:
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if self._is_free(node):
                self.free.add(node)
            kind = self.found.kinds[node] = self._source(node) if node.op != "call_function" else self._call(node)
            differs = node.op == "placeholder" or node.target is axis_index or node in (*self.found.outside, *self.found.sliced)
            if kind in ("part", "estimate") or (kind == "split" and (differs or any(n in self.varying for n in _read(node)))):
                self.varying.add(node)
            if (node.op == "placeholder" and kind == "estimate") or any(n in self.found.inexact for n in _read(node)):
                self.found.inexact.add(node)
        for sink, node in zip(self.program.tensor_sinks(), self.program.outputs(), strict=True):
            if sink.kind == "buffer" and self.found.kinds[node] == "split":
                raise _refusal(self.program, node, f"the new value of buffer {sink.name!r} holds rows of the whole batch")
        return self.found

    def _is_free(self, node: fx.Node) -> bool:
        """Whether a value depends on nothing that a step changes or differentiates."""
        if node.op == "placeholder":
            source = self.sources[node]
            return source.kind != "param" and not source.requires_grad and source.name not in self.found.in_order
        return all(n in self.free for n in node.all_input_nodes)

    def _source(self, node: fx.Node) -> MicrobatchKind:
        source: Source | None = self.sources.get(node)
        if source is not None and source.kind == "param" and along_microbatches(node):
            raise _refusal(self.program, next(iter(node.users), node), f"a dim of parameter {source.name!r} is that of the batch")
        if along_microbatches(node):
            return "split"
        return "estimate" if source is not None and source.kind == "buffer" and source.name in self.found.in_order else "alike"

    def _call(self, node: fx.Node) -> MicrobatchKind:
        if node.target is axis_index:
            axes: Any = node.args[0]
            return "split" if MICROBATCH in axes else "alike"
        made = typed(node)
        if made is None or MICROBATCH not in made.axes:
            return self._local(node)
        kind = self.found.kinds[made.value]
        if made.kind == "vary":
            return kind
        if node in self.free:
            self.found.outside.append(node)
            return "split" if made.kind in ("shard", "reduce_scatter", "all_to_all") else "alike"
        varies = made.value in self.varying
        if made.kind == "shard":  # of a replicated value: this microbatch's slice
            self.found.sliced.append(node)
            self.found.nonlinear += [(node, made.value)] if kind == "part" else []
            self.found.inexact.update([node] if kind == "part" else [])
            return "split"
        if made.kind == "psum" and not varies:
            self.found.alone.append(node)
            return "alike"
        if made.kind == "psum":
            return "part"
        if made.kind == "pmax" and not varies:
            return "alike"
        raise _refusal(self.program, node, "its value takes rows of all microbatches together, and depends on parameters")

    def _local(self, node: fx.Node) -> MicrobatchKind:
        kinds = self.found.kinds
        operands = _read(node)
        parts = [n for n in operands if kinds[n] == "part"]
        split = self._is_split(node, bool(parts))
        divided = None if split or not parts else linear(node, kinds)
        if parts and divided is not None:
            self.found.divided += [(node, what) for what in divided]
            return "part"
        self.found.nonlinear += [(node, n) for n in parts]
        self.found.inexact.update([node] if parts else [])
        return "split" if split else "estimate" if parts or any(kinds[n] == "estimate" for n in operands) else "alike"

    def _is_split(self, node: fx.Node, has_parts: bool) -> bool:
        known = along_microbatches(node)
        if known is not None:
            return known
        if any(self.found.kinds[n] == "split" for n in node.all_input_nodes) or _is_pending(node):
            return True
        return has_parts and typed(node) is None and _only_inside_of_split(node)


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose values matter."""
    return [] if node.target in _SHAPES else node.all_input_nodes


def _is_pending(node: fx.Node) -> bool:
    """Whether it is this microbatch's part of what is summed over all."""
    return any(made.value is node and MICROBATCH in made.axes and made.kind in ("psum", "pmax", "reduce_scatter")
               for user in node.users if (made := typed(user)) is not None)


def _only_inside_of_split(node: fx.Node) -> bool:
    """Whether all operators of the model that an operator was inserted for make something split."""
    known = [(user, along_microbatches(user)) for user in node.users if user.op == "call_function"]
    return bool(known) and all(_only_inside_of_split(user) if split is None else split for user, split in known)


def linear(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    """Of an operator on parts: what must be divided by the number of microbatches for its result to be a part, an operand or the
    place of a number among its arguments; None if it is not linear in its parts."""
    target: Any = node.target
    made = typed(node)
    if made is not None:
        return None if made.kind == "pmax" else []
    if target is operator.getitem:
        return []
    test = next((test for targets, test in _TESTS if target in targets), None)
    found = None if test is None else test(node, kinds)
    if found and any(not _floats(what if isinstance(what, fx.Node) else node) for what in found):
        return None
    return found


def _floats(node: fx.Node) -> bool:
    dtype = local_value(node).dtype
    return dtype is None or dtype.is_floating_point or dtype.is_complex


def _moved(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    """An operator that is linear in all of its operands together."""
    if not _floats(node) and all(_floats(n) for n in node.all_input_nodes):
        return None
    return [n for n in node.all_input_nodes if kinds[n] != "part"]


def _added(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    terms = node.args[:2]
    return [n if isinstance(n, fx.Node) else i for i, n in enumerate(terms) if not _is_part(n, kinds)]


def _scaled(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    one, other = node.args[:2]
    if _is_part(one, kinds) == _is_part(other, kinds):
        return None
    return [] if _is_alike(other if _is_part(one, kinds) else one, kinds) else None


def _divided(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    if node.kwargs.get("rounding_mode") is not None or not _is_part(node.args[0], kinds):
        return None
    return [] if _is_alike(node.args[1], kinds) else None


def _chosen(node: fx.Node, kinds: dict[fx.Node, MicrobatchKind]) -> list[fx.Node | int] | None:
    """One or the other, by a condition that is the same for all microbatches."""
    at = 1 if node.target in _overloads(aten.masked_fill) else 0
    if len(node.args) != 3 or not _is_alike(node.args[at], kinds):
        return None
    return [n if isinstance(n, fx.Node) else i for i, n in enumerate(node.args) if i != at and not _is_part(n, kinds)]


def _is_part(value: Any, kinds: dict[fx.Node, MicrobatchKind]) -> bool:
    return isinstance(value, fx.Node) and kinds[value] == "part"


def _is_alike(value: Any, kinds: dict[fx.Node, MicrobatchKind]) -> bool:
    return not isinstance(value, fx.Node) or kinds[value] == "alike"


Test = Callable[[fx.Node, dict[fx.Node, MicrobatchKind]], list[fx.Node | int] | None]
_TESTS: tuple[tuple[frozenset[Any], Test], ...] = (
    (_MOVES, _moved), (_ADDS, _added), (_PRODUCTS, _scaled), (_QUOTIENTS, _divided), (_CHOICES, _chosen))


def _refusal(program: Program, node: fx.Node, why: str) -> PlanError:
    made = typed(node)
    name = node.name if made is None else local_value(node).made_for or node.name
    line = user_line(node)
    where = f"operator {name}" + (f" ({line})" if line else "")
    count = program.mesh.size(MICROBATCH)
    return PlanError("microbatches", count, f"{where} cannot be computed one microbatch after the other: {why}",
                     "microbatches=1, with recompute or more replicas (dp) to save memory, or a loop of your own over the "
                     "microbatches with no_sync(), which takes the mean of their losses")
