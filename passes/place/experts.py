"""experts: where the rows of a mixture of experts lie. The part of `place` that looks at all operators on such rows together.

Rows in the order of their experts are in no order that a collective could gather or slice them in. So which axes split their
tokens is decided once, where they are sorted, and holds until they are put back; an axis of experts is the only one that
moves, and all of them move together:

    ep_dispatch     sort, take, put back     products, and all between
    alltoall        tokens/ep                experts/ep                     rows are exchanged twice
    allgather       experts/ep               experts/ep                     tokens are gathered, results reduced and scattered
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxpar.passes.infer.rules import Spec
from fxpar.passes.infer.rules.experts import parts_of
from fxpar.program import Program, user_line
from fxpar.sharding.factors import Dim, Factor, leaves, share_of
from fxpar.sharding.facts import global_value
from fxpar.sharding.layout import Layout, fits
from fxpar.sharding.mesh import Axes

ALLTOALL = "alltoall"


@dataclass
class SortedRows:
    """All that is done to rows of one order.

    sort: where that is made. rows: the dim. whole: its factors that some operator cannot split. by_token, by_expert: what splits
    them, once it is decided.
    """

    sort: fx.Node
    rows: Dim
    whole: set[Factor]
    by_token: Layout | None = None
    by_expert: Layout | None = None

    @property
    def exchanges(self) -> bool:
        """Whether rows go to their experts and come back."""
        return self.by_token != self.by_expert


def rows_of(spec: Spec) -> set[Factor]:
    """The factors of rows that are in the order of their experts, among the dims of an operator."""
    return {f for dim in _row_dims(spec) for f in leaves(dim)}


def _row_dims(spec: Spec) -> Iterator[Dim]:
    """They are the first."""
    for dims in (*(o.dims for o in spec.operands), *spec.outs):
        if dims and share_of(dims[0]) is not None:
            yield dims[0]


def regions_of(program: Program) -> dict[Factor, SortedRows]:
    """The regions of an inferred program, by the shares of their rows."""
    found: dict[Factor, SortedRows] = {}
    for node in program.graph.nodes:
        spec = global_value(node).spec
        for dim in _row_dims(spec) if spec is not None else ():
            share = share_of(dim)
            assert spec is not None and share is not None
            region = found.setdefault(share, SortedRows(node, dim, set()))
            region.whole |= {f for s in (*spec.replicated, *spec.inner, *spec.maxes) for f in s.leaves()} & set(leaves(dim))
    return found


class Regions:
    """The regions of a program that is being placed."""

    def __init__(self, program: Program):
        self.program, self.mesh = program, program.mesh
        self.found = regions_of(program)

    def at(self, spec: Spec, layouts: Mapping[fx.Node, Any]) -> Layout:
        """What splits the rows of an operator; nothing, where it has none. layouts: of its operands."""
        dim = next(_row_dims(spec), None)
        if dim is None:
            return {}
        share = share_of(dim)
        assert share is not None
        region = self.found[share]
        if region.by_token is None:
            self._decide(region, {(a, f) for o in spec.operands for a, f in (layouts[o.node] or {}).items()})
        decided = region.by_token if spec.by_token else region.by_expert
        assert decided is not None
        return dict(decided)

    def _decide(self, region: SortedRows, inherited: set[tuple[str, Factor]]) -> None:
        ep = tuple(a for a in self.mesh.axes("ep") if self.mesh.size(a) > 1)
        tokens = self._tokens(region, ep, inherited)
        rest = {a: f for a, f in tokens.items() if a not in ep}
        region.by_token = region.by_expert = rest
        if not ep:
            return
        experts = {**rest, **dict.fromkeys(ep, leaves(parts_of(region.rows)[0])[0])}
        region.by_expert = region.by_token = experts
        if self.program.plan.ep_dispatch != ALLTOALL:
            return
        missing = [a for a in ep if a not in tokens]
        if not missing:
            region.by_token = tokens
        else:
            self.program.note(f"tokens of the experts at {user_line(region.sort) or region.sort.name} do not divide by "
                              f"{'/'.join(missing)}={self.mesh.size(*missing)}: they are gathered, as by ep_dispatch=allgather")

    def _tokens(self, region: SortedRows, ep: Axes, inherited: set[tuple[str, Factor]]) -> Layout:
        """The axes that split tokens: those that did before, but for tp's beside ep, along which products are split."""
        slots = [f for f in leaves(parts_of(region.rows)[1]) if f not in region.whole]
        roles = {**dict.fromkeys(self.mesh.axes("dp"), "batch"), **dict.fromkeys(self.mesh.axes("cp"), "seq")}
        at: Layout = {}
        for axis in self.mesh.names:
            if self.mesh.size(axis) == 1 or (axis in self.mesh.axes("tp") and axis not in ep):
                continue
            wanting = [f for f in slots if (axis, f) in inherited or f.role == roles.get(axis) or (axis in ep and f.role)]
            wanting.sort(key=lambda f: (axis, f) not in inherited)
            leaf = next((f for f in wanting if fits(at, f, axis, self.mesh)), None)
            if leaf is not None:
                at[axis] = leaf
        return at
