"""Resharding: from the layout a value is kept in to the one an operator runs in, one typed collective at a time.

Nothing here knows about operators or models; the partitioner asks for a value in a layout and gets a node.
The same request is answered with the same node, so a gather serves all of its users and their
gradients are summed before they are communicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxpar.ops.collectives import Collective, make, typed
from fxpar.program import copy_provenance
from fxpar.sharding.factors import Dims, Factor
from fxpar.sharding.facts import UNKNOWN, describe_local, if_local, local_value
from fxpar.sharding.layout import Layout, local_shape, place_of
from fxpar.sharding.mesh import Axes, Mesh

Want = Mapping[str, "Factor | bool"]
"""axis -> the factor to split there; True: replicated, but used differently on every rank; absent: replicated and used alike."""


class Resharder:
    def __init__(self, graph: fx.Graph, mesh: Mesh):
        self.graph, self.mesh = graph, mesh
        self._made: dict[Collective | tuple, fx.Node] = {}

    def to(self, value: fx.Node, dims: Dims, layout: Layout, want: Want, user: fx.Node) -> fx.Node:
        """`value`, kept in `layout` (or `LocalValue.stored`, to be used in `layout`), as `want` asks for it.

        Where the axes on one factor change, the common major ones stay; the others are gathered minor to major and
        sliced major to minor. An axis that moves from one factor to another is exchanged.
        """
        known = local_value(value) if isinstance(value, fx.Node) else UNKNOWN
        grad, layout = known.needs_grad, dict(layout)
        if known.stored is not None:
            value, layout = self._unshard(value, dims, layout, want, user)
        for axis in self.mesh.names:
            old, new = layout.get(axis), want.get(axis)
            if (
                isinstance(old, Factor)
                and isinstance(new, Factor)
                and old is not new
                and self._alone(layout, old, axis)
                and self._alone(layout, new, axis)
            ):
                value = self._exchange(value, dims, layout, axis, new, user)
        for axis in reversed(self.mesh.names):
            if axis in layout and not self._stays(layout, want, axis):
                value = self._gather(value, dims, layout, axis, varying=grad and want.get(axis) is True, user=user)
        for axis in self.mesh.names:
            new = want.get(axis)
            if isinstance(new, Factor) and axis not in layout:
                value = self._shard(value, dims, layout, axis, new, user)
        vary = tuple(a for a in self.mesh.names if want.get(a) is True and a not in self._varied(value))
        if not vary or not grad:
            return value
        if local_value(value).reduce_dtype is not None:
            return self._vary_as(value, dims, layout, vary, user)
        return self._emit(Collective("vary", value, vary), user, dims, layout)

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
        for axis in sorted(over, key=self.mesh.names.index, reverse=True):
            varying = grad and want.get(axis) is True
            value = self._gather(value, dims, layout, axis, varying, user, dtype, reduce)
            describe_local(value, unshard=True)
        return value, layout

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

    def _alone(self, layout: Layout, factor: Factor, axis: str) -> bool:
        return all(f is not factor or a == axis for a, f in layout.items())

    def _stays(self, layout: Layout, want: Want, axis: str) -> bool:
        """An axis stays on its factor if it is wanted there and every more major axis on that factor stays too."""
        factor = layout[axis]
        before = [
            a
            for a in self.mesh.names[: self.mesh.names.index(axis)]
            if layout.get(a) is factor or want.get(a) is factor
        ]
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

    def _gather(self, value, dims, layout, axis, varying, user, dtype=None, reduce=None) -> fx.Node:
        place = place_of(dims, layout, self.mesh, layout[axis])
        del layout[axis]
        kind = "all_gather_varying" if varying else "all_gather"
        return self._emit(Collective(kind, value, (axis,), place, dtype=dtype, reduce=reduce), user, dims, layout)

    def _shard(self, value, dims, layout, axis, leaf, user) -> fx.Node:
        place = place_of(dims, layout, self.mesh, leaf)
        layout[axis] = leaf
        return self._emit(Collective("shard", value, (axis,), place), user, dims, layout)

    def _exchange(self, value, dims, layout, axis, leaf, user) -> fx.Node:
        old = place_of(dims, layout, self.mesh, layout[axis])
        rest = {a: f for a, f in layout.items() if a != axis}
        new = place_of(dims, {**rest, axis: layout[axis]}, self.mesh, leaf)
        if old[0] == new[0]:
            return value
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
