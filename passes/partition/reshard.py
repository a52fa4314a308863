"""Resharding: from the layout a value is kept in to the one an operator runs in, one typed collective at a time.

Nothing here knows about operators or models; the partitioner asks for a value in a layout and gets a node.
The same request is answered with the same node, so a gather serves all of its users and their
gradients are summed before they are communicated.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxpar.ops.collectives import Collective, PlaceInDim, make, typed
from fxpar.ops.exchange import exchange_plan, to_experts, to_tokens
from fxpar.program import copy_provenance
from fxpar.sharding.factors import Dims, Factor, leaves, share_of
from fxpar.sharding.facts import UNKNOWN, describe_local, if_local, local_value
from fxpar.sharding.layout import Layout, axes_on, is_dealt, local_shape, order_on, place_of
from fxpar.sharding.mesh import Axes, Mesh

Want = Mapping[str, "Factor | bool"]
"""axis -> the factor to split there; True: replicated, but used differently on every rank; absent: replicated and used alike."""


class Resharder:
    def __init__(self, graph: fx.Graph, mesh: Mesh):
        self.graph, self.mesh = graph, mesh
        self._made: dict[Collective | tuple, fx.Node] = {}
        self._experts: dict[Factor, fx.Node] = {}

    def to(self, value: fx.Node, dims: Dims, layout: Layout, want: Want, user: fx.Node) -> fx.Node:
        """`value`, kept in `layout` (or `LocalValue.stored`, to be used in `layout`), as `want` asks for it.

        Where the axes on one factor change, the common major ones stay; the others are gathered minor to major and
        sliced major to minor. An axis that moves from one factor to another is exchanged, where it is the most minor one on both.
        """
        known = local_value(value) if isinstance(value, fx.Node) else UNKNOWN
        grad, layout = known.needs_grad, dict(layout)
        value = self._to_experts(value, dims, layout, want, user)
        if known.stored is not None:
            value, layout = self._unshard(value, dims, layout, want, user)
        if layout != {a: f for a, f in want.items() if isinstance(f, Factor)}:
            value = self._rearranged(value, dims, layout, want, grad, user)
        vary = tuple(a for a in self.mesh.names if want.get(a) is True and a not in self._varied(value))
        if not vary or not grad:
            return value
        if local_value(value).reduce_dtype is not None:
            return self._vary_as(value, dims, layout, vary, user)
        return self._emit(Collective("vary", value, vary), user, dims, layout)

    def _rearranged(self, value: fx.Node, dims: Dims, layout: Layout, want: Want, grad: bool, user: fx.Node) -> fx.Node:
        """`value` with the axes on the factors where they are wanted, and on no others."""
        value = self._exchanged(value, dims, layout, want, grad, user)
        while leaving := [a for a in layout if not self._stays(layout, want, a)]:
            axis = next(a for a in reversed(self.mesh.names) if a in leaving and self._is_last(layout, a))
            value = self._gather(value, dims, layout, (axis,), varying=grad and want.get(axis) is True, user=user)
        while coming := {a: f for a, f in want.items() if isinstance(f, Factor) and a not in layout}:
            axis = next(a for a in self.mesh.names if a in coming and axes_on(coming[a], coming, self.mesh)[0] == a)
            value = self.shard(value, dims, layout, axis, coming[axis], user)
        return value

    def sorted_by(self, share: Factor, experts: fx.Node) -> None:
        """The rows that have this share are in the order of these experts."""
        self._experts[share] = experts

    def exchanges(self, share: Factor) -> bool:
        """Whether rows that have this share were exchanged with their experts."""
        return any(isinstance(key, tuple) and key[:2] == (self._experts[share], exchange_plan) for key in self._made)

    def _to_experts(self, value: fx.Node, dims: Dims, layout: Layout, want: Want, user: fx.Node) -> fx.Node:
        """Rows in the order of their experts, with the axes exchanged that split their tokens and are to split the experts, or
        the other way round. How many there are is no matter of factors, so this is one exchange, over all such axes."""
        share = share_of(dims[0]) if dims else None
        if share is None:
            return value
        rows = set(leaves(dims[0]))
        axes = tuple(a for a in self.mesh.names if layout.get(a) in rows and want.get(a) is not layout[a])
        if not axes:
            return value
        goes = {a: f for a in axes if isinstance(f := want.get(a), Factor)}
        there = next(iter(goes.values())).role == "experts"
        assert set(axes) == set(goes) == set(self.mesh.axes("ep")), f"{value} is in an order of its own, over {axes}"
        layout.update(goes)
        experts = self._experts[share]
        order, arrived, splits, room = self._plan(experts, axes, share.of, user)
        if value is experts:
            return arrived
        target = to_experts if there else to_tokens
        key = (value, target, axes)
        if key not in self._made:
            new = self._made[key] = self.graph.call_function(target, (value, axes, order, splits, experts, room))
            copy_provenance(new, user)
            known = local_value(value)
            describe_local(new, full=known.full, dtype=known.dtype, needs_grad=known.needs_grad, made_for=user.name,
                           resharded=True)
            measure(new, value, dims, layout, self.mesh)
        return self._made[key]

    def _plan(self, experts: fx.Node, axes: Axes, count: int, user: fx.Node) -> list[fx.Node]:
        """Which rows go where, and come from where: an `Arrival`."""
        key = (experts, exchange_plan, axes)
        if key not in self._made:
            self._made[key] = self.graph.call_function(exchange_plan, (experts, axes, count))
            copy_provenance(self._made[key], user)
        found = []
        for i, dtype in enumerate((torch.int64, local_value(experts).dtype, torch.int64, torch.uint8)):
            if (*key, i) not in self._made:
                new = self._made[(*key, i)] = self.graph.call_function(operator.getitem, (self._made[key], i))
                copy_provenance(new, user)
                describe_local(new, dtype=dtype)
            found.append(self._made[(*key, i)])
        return found

    def _exchanged(self, value: fx.Node, dims: Dims, layout: Layout, want: Want, grad: bool, user: fx.Node) -> fx.Node:
        """`value` with the axes exchanged that can be. One that is gathered anyway, and keeps one that is not from being the most
        minor of its factor, is gathered before."""
        def next_axis() -> str | None:
            minor_first = (a for a in reversed(self.mesh.names) if self._is_last(layout, a))
            return next((a for a in minor_first if self._goes(dims, layout, want, a)), None)

        while (axis := next_axis()) is not None:
            new = want.get(axis)
            if isinstance(new, Factor):
                value = self._exchange(value, dims, layout, axis, new, user)
            else:
                value = self._gather(value, dims, layout, (axis,), varying=grad and new is True, user=user)
        return value

    def _goes(self, dims: Dims, layout: Layout, want: Want, axis: str) -> bool:
        """Whether an axis, the most minor of its factor, is exchanged, or makes room for one that is."""
        old, new = layout[axis], want.get(axis)
        if not isinstance(new, Factor):
            majors = (a for a in axes_on(old, layout, self.mesh) if a != axis)
            return any(isinstance(f := want.get(a), Factor) and f is not old and self._can_take(dims, layout, want, a)
                       for a in majors)
        return new is not old and self._can_take(dims, layout, want, axis)

    def _can_take(self, dims: Dims, layout: Layout, want: Want, axis: str) -> bool:
        """Whether an axis becomes the most minor of the factor where it is wanted, which lies in another dim."""
        old, new = layout[axis], want[axis]
        assert isinstance(new, Factor)
        order = order_on(new, self.mesh)
        before = order[: order.index(axis)]
        there = {a for a, f in layout.items() if f is new}
        wanted = {a for a in before if want.get(a) is new}
        dim = {f: i for i, d in enumerate(dims) for f in leaves(d)}
        return there == wanted and dim[old] != dim[new]

    def _unshard(
        self, value: fx.Node, dims: Dims, used: Layout, want: Want, user: fx.Node
    ) -> tuple[fx.Node, Layout]:
        """A parameter in the layout of its use, from the one it is stored in; where it is wanted as it is stored, it stays.

        It is cast before it is gathered. Its gradient is first summed onto the stored parts and then, part by part, over the
        other axes along which its uses differ, in the reduction dtype.
        """
        known = local_value(value)
        layout, grad = dict(known.stored or {}), known.needs_grad
        over = [a for a, f in layout.items() if used.get(a) is not f and want.get(a) is not f]
        over = [a for a, f in layout.items() if any(layout[b] is f and self.mesh.names.index(b) <= self.mesh.names.index(a)
                                                    for b in over)]
        if not over:
            return value, layout
        dtype = reduce = None
        if grad and known.reduce_dtype is not None:
            args: Any = value.args
            dtype = args[1]
            value, reduce = self._wide(value)
        vary = tuple(a for a in self.mesh.names if want.get(a) is True and a not in layout)
        if grad and vary:
            value = self._emit(Collective("vary", value, vary, reduce=reduce), user, dims, layout)
        for axes in self._together(layout, over, want):
            varying = grad and want.get(axes[0]) is True
            value = self._gather(value, dims, layout, axes, varying, user, dtype, reduce)
            describe_local(value, unshard=True)
        return value, layout

    def _together(self, layout: Layout, over: list[str], want: Want) -> list[Axes]:
        """These axes, minor to major, with those as one that are gathered from one factor for the same use."""
        out: list[Axes] = []
        for axis in sorted(over, key=self.mesh.names.index, reverse=True):
            last = out[-1][0] if out else axis
            alike = layout[last] is layout[axis] and (want.get(last) is True) == (want.get(axis) is True)
            out[-1:] = [(axis, *out[-1])] if out and alike else [*out[-1:], (axis,)]
        return out

    def _vary_as(self, cast: fx.Node, dims: Dims, layout: Layout, axes: Axes, user: fx.Node) -> fx.Node:
        """A parameter's cast, with its gradient summed over `axes` in the reduction dtype."""
        args: Any = cast.args
        wide, reduce = self._wide(cast)
        return self._cast(self._emit(Collective("vary", wide, axes, reduce=reduce), user, dims, layout), args[1], cast)

    def _wide(self, cast: fx.Node) -> tuple[fx.Node, torch.dtype | None]:
        """What a parameter's cast is made from, in a dtype that loses nothing of it and of its gradient's sum; and the dtype
        of that sum where it is narrower."""
        args: Any = cast.args
        stored, reduce = local_value(args[0]).dtype, local_value(cast).reduce_dtype
        assert stored is not None and reduce is not None
        wide = torch.promote_types(stored, reduce)
        return self._cast(args[0], wide, cast), reduce if reduce != wide else None

    def _cast(self, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        if local_value(value).dtype == dtype:
            return value
        key = (value, "cast", dtype)
        if key not in self._made:
            new = self.graph.call_function(torch.ops.aten.to.dtype, (value, dtype))
            copy_provenance(new, like)
            describe_local(new, full=local_value(like).full, dtype=dtype, needs_grad=local_value(like).needs_grad)
            self._made[key] = new
        return self._made[key]

    def _is_last(self, layout: Layout, axis: str) -> bool:
        """Whether an axis is the most minor of the factor that it splits."""
        return axis in layout and axes_on(layout[axis], layout, self.mesh)[-1] == axis

    def _stays(self, layout: Layout, want: Want, axis: str) -> bool:
        """An axis stays on its factor if it is wanted there and every more major axis on that factor stays too."""
        factor = layout[axis]
        order = order_on(factor, self.mesh)
        before = [a for a in order[: order.index(axis)] if layout.get(a) is factor or want.get(a) is factor]
        return want.get(axis) is factor and all(layout.get(a) is factor and want.get(a) is factor for a in before)

    def _varied(self, value: fx.Node) -> Axes:
        """Axes that the last steps already made varying: by `vary`, or a gather whose backward is a reduce-scatter; or that
        what the value was made from is varying along."""
        done: list[str] = []
        while isinstance(value, fx.Node) and local_value(value).resharded:
            made = typed(value)
            assert made is not None
            if made.varies:
                done += made.axes
            value = made.value
        if isinstance(value, fx.Node):
            done += local_value(value).varied
        return tuple(done)

    def _place(self, dims: Dims, layout: Layout, axis: str, leaf: Factor) -> PlaceInDim:
        """Where the parts of a factor lie that an axis splits, or is to split."""
        return PlaceInDim(*place_of(dims, layout, self.mesh, leaf), is_dealt(leaf, axis, self.mesh))

    def _gather(self, value, dims, layout, axes, varying, user, dtype=None, reduce=None) -> fx.Node:
        """Over axes that are the most minor ones of their factor."""
        place = self._place(dims, layout, axes[0], layout[axes[0]])
        for axis in axes:
            del layout[axis]
        kind = "all_gather_varying" if varying else "all_gather"
        return self._emit(Collective(kind, value, axes, place, dtype=dtype, reduce=reduce), user, dims, layout)

    def in_order(self, value: fx.Node, dims: Dims, layout: Layout, leaf: Factor, user: fx.Node) -> fx.Node:
        """`value` with neighbouring parts of a factor that its axes have dealt. They are exchanged for parts of another factor,
        of which each rank has the whole sequence, and back; where no other divides, all is gathered."""
        axes = axes_on(leaf, layout, self.mesh)
        place = self._place(dims, layout, axes[0], leaf)
        others = [f for d in dims if leaf not in leaves(d) for f in leaves(d)]
        ranks = self.mesh.size(*axes)
        other = next((f for f in reversed(others) if f not in layout.values() and f.size % ranks == 0), None)
        if other is None:
            whole = {a: f for a, f in layout.items() if f is not leaf}
            value = self._gather(value, dims, {**layout}, axes, False, user)
            place = PlaceInDim(*place_of(dims, whole, self.mesh, leaf))
            return self._emit(Collective("shard", value, axes, place), user, dims, layout)
        moved = {**layout, **dict.fromkeys(axes, other)}
        to = PlaceInDim(*place_of(dims, layout, self.mesh, other))
        value = self._emit(Collective("all_to_all", value, axes, place, to), user, dims, moved)
        return self._emit(Collective("all_to_all", value, axes, to, place._replace(dealt=False)), user, dims, layout)

    def shard(self, value: fx.Node, dims: Dims, layout: Layout, axis: str, leaf: Factor, user: fx.Node) -> fx.Node:
        """This rank's part along an axis, which `layout` has from then on."""
        place = self._place(dims, layout, axis, leaf)
        layout[axis] = leaf
        return self._emit(Collective("shard", value, (axis,), place), user, dims, layout)

    def _exchange(self, value, dims, layout, axis, leaf, user) -> fx.Node:
        old = self._place(dims, layout, axis, layout[axis])
        new = self._place(dims, layout, axis, leaf)
        layout[axis] = leaf
        return self._emit(Collective("all_to_all", value, (axis,), old, new), user, dims, layout)

    def _emit(self, made: Collective, user: fx.Node, dims: Dims, layout: Layout) -> fx.Node:
        if made not in self._made:
            value, new = made.value, make(self.graph, made)
            copy_provenance(new, user)
            known = local_value(value)
            describe_local(new, full=known.full, dtype=made.dtype or known.dtype, needs_grad=known.needs_grad, made_for=user.name,
                           resharded=True)
            measure(new, value, dims, layout, self.mesh)
            self._made[made] = new
        return self._made[made]


def measure(node: fx.Node, value: fx.Node, dims: Dims, layout: Layout, mesh: Mesh) -> None:
    """Record shape and dtype of the result that one rank has. value: the global value, or what it is made of."""
    known = value.meta.get("val", if_local(value).full)
    if isinstance(known, torch.Tensor):
        dtype = local_value(node).dtype or if_local(value).dtype or known.dtype
        describe_local(node, result=(tuple(local_shape(dims, layout, mesh)), dtype))
