"""zero: where parameters are stored. ZeRO and FSDP are a storage layout; everything else follows from resharding at use.

ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, https://arxiv.org/abs/1910.02054. A parameter's
gradient and optimizer state are kept like the parameter, so that one layout says where all three are.
"""

from __future__ import annotations

import math

from torch import fx

from fxpar.passes.place.place import pinned_layout
from fxpar.program import Program
from fxpar.sharding.factors import Dims, Factor, leaves
from fxpar.sharding.facts import dims_of, global_value
from fxpar.sharding.layout import Layout, Sharding, place_of
from fxpar.sharding.mesh import Mesh


def shard_storage(program: Program, pinned: dict[str, Sharding] | None = None) -> Program:
    """Give every parameter the layout that it is stored in.

    Takes: a placed program. pinned: parameters whose storage is given. Afterwards: where a parameter is stored in more parts
    than it is used in, ``program.placements.stored`` has that layout, for its placeholder and for the cast that follows it: the
    one of its use with each axis of the mesh's "zero" strategy on one more factor: the one its first use prefers; else, one that
    divides in a dim that is not split yet, if there is one; of those, the one whose parts are contiguous, else the
    largest. A parameter without one stays as it is, and the report says so.
    """
    axes = program.mesh.axes("zero")
    unsharded: list[str] = []
    placed = program.placements
    assert placed is not None
    for node, source in program.source_of().items():
        if source.kind != "param" or not axes:
            continue
        used: Layout = placed.layouts[node]
        if pinned and source.name in pinned:
            stored = pinned_layout(dims_of(node), pinned[source.name], program.mesh)
        else:
            stored = _with_axes(dims_of(node), {**used, **placed.preferred.get(node, {})}, axes, program.mesh)
        if not set(axes) & stored.keys():
            unsharded.append(source.name)
            continue
        placed.stored[node] = stored
        for cast in node.users:
            if global_value(cast).reduce_dtype is not None:
                placed.stored[cast] = stored
    _note_unsharded(program, unsharded)
    return program


def _with_axes(dims: Dims, used: Layout, axes: tuple[str, ...], mesh: Mesh) -> Layout:
    stored = dict(used)
    for axis in axes:
        unsplit = [d for d in dims if not set(leaves(d)) & set(stored.values())]
        free = [f for d in unsplit for f in leaves(d) if f.size and f.size % mesh.size(axis) == 0]
        if axis not in stored and free:
            stored[axis] = min(free, key=lambda f: _cost(dims, stored, mesh, f))
    return stored


def _cost(dims: Dims, layout: Layout, mesh: Mesh, leaf: Factor) -> tuple[bool, int]:
    """Least first: its parts lie one after the other, many elements."""
    return place_of(dims, layout, mesh, leaf) != (0, 1), -leaf.size


def _note_unsharded(program: Program, names: list[str]) -> None:
    sources = {s.name: n for n, s in program.source_of().items() if s.kind == "param"}
    elements = {name: _numel(node) for name, node in sources.items()}
    if names and sum(elements.values()):
        share = sum(elements[n] for n in names) / sum(elements.values())
        program.note(f"{len(names)} parameters ({share:.2%} of all elements; the first is {names[0]}) are not sharded by "
                     f"ZeRO: no dim that is not split yet divides")


def _numel(node: fx.Node) -> int:
    return math.prod(node.meta["val"].shape)
