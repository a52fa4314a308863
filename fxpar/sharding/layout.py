"""Layouts: which mesh axes each factor of a tensor lies on, and in which order.

Axes split a factor in the order of the mesh, but for heads: there those of "a2a" come last, as attention splits further what
tp has split already. A sequence that causal attention goes along is *dealt* over the axes of cp (see deal.py), so that every
rank has as many pairs of queries and keys to look at; along other axes, and other factors, ranks hold neighbouring parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch

from fxpar.sharding.deal import deal
from fxpar.sharding.factors import Dim, Dims, Factor, leaves, whole
from fxpar.sharding.mesh import Axes, Mesh

Layout = dict[str, Factor]
"""Mesh axis -> the factor (a leaf) that it splits. An axis that is absent holds the tensor replicated."""


@dataclass(frozen=True)
class Piece:
    """One run of a tensor dimension as the ranks hold it: ``size`` elements, split over ``axes``, after they were dealt to
    `dealt` ranks."""

    size: int
    axes: Axes = ()
    dealt: int = 1


def order_on(leaf: Factor, mesh: Mesh) -> Axes:
    """All axes of the mesh, in the order in which they would split a factor."""
    last = mesh.axes("a2a") if leaf.role == "heads" else ()
    return (*(a for a in mesh.names if a not in last), *last)


def axes_on(leaf: Factor, layout: Layout, mesh: Mesh) -> Axes:
    """The axes that split a factor, major to minor."""
    held = [a for a, f in layout.items() if f is leaf]
    return tuple(a for a in order_on(leaf, mesh) if a in held) if held else ()


def fits(layout: Layout, leaf: Factor, axis: str, mesh: Mesh) -> bool:
    """Whether `axis` can split `leaf` further than `layout` does."""
    ranks = mesh.size(axis)
    for other, f in layout.items():
        if f is leaf:
            ranks *= mesh.size(other)
    return leaf.size > 0 and leaf.size % ranks == 0


def is_dealt(leaf: Factor, axis: str, mesh: Mesh) -> bool:
    """Whether ranks along an axis hold dealt parts of a factor that it splits, and not neighbouring ones."""
    return leaf.causal and axis in mesh.axes("cp")


def dealt_to(leaf: Factor, layout: Layout, mesh: Mesh) -> int:
    """The number of ranks that a factor is dealt to, before other axes split what each of them has."""
    if not leaf.causal:
        return 1
    axes = axes_on(leaf, layout, mesh)
    dealt = [a for a in axes if is_dealt(leaf, a, mesh)]
    assert dealt == list(axes[: len(dealt)]), f"{leaf} is split over {axes} before it is dealt over {dealt}"
    return mesh.size(*dealt)


def pieces(dim: Dim, layout: Layout, mesh: Mesh) -> list[Piece]:
    """The dimension's factors with the axes that split each, adjacent unsplit ones joined."""
    out: list[Piece] = []
    for leaf in leaves(dim):
        axes = axes_on(leaf, layout, mesh)
        if out and not axes and not out[-1].axes:
            out[-1] = Piece(out[-1].size * leaf.size)
        else:
            out.append(Piece(leaf.size, axes, dealt_to(leaf, layout, mesh)))
    return out


def local_extent(dim: Dim, layout: Layout, mesh: Mesh) -> int:
    """How many elements of this dimension one rank holds."""
    return _extent(pieces(dim, layout, mesh), mesh)


def local_shape(dims: Dims, layout: Layout, mesh: Mesh) -> list[int]:
    return [local_extent(d, layout, mesh) for d in dims]


def restrict(layout: Layout, dims: Dims, without: Iterable[Factor] = ()) -> Layout:
    """The part of a layout that concerns these dims."""
    have = {f for d in dims for f in leaves(d)} - set(without)
    return {a: f for a, f in layout.items() if f in have}


def show(dims: Dims, layout: Layout, mesh: Mesh) -> str:
    """``[batch8/dp, seq16, heads4/tp d2 e8]``: dims in order, split factors with their axes."""

    def one(f: Factor) -> str:
        axes = axes_on(f, layout, mesh)
        return (f"{f.role}{f.size}" if f.role else repr(f)) + "".join(f"/{a}" for a in axes)

    return "[" + ", ".join(" ".join(one(f) for f in leaves(d)) or "1" for d in dims) + "]"


Sharding = tuple[tuple[Piece, ...], ...]
"""How a tensor lies on a mesh, apart from the program whose factors its layout names: for each dim its pieces, major to minor."""


def sharding_of(dims: Dims, layout: Layout, mesh: Mesh) -> Sharding:
    return tuple(tuple(pieces(d, layout, mesh)) for d in dims)


def in_order(sharding: Sharding) -> Sharding:
    """The same with neighbouring parts in the place of dealt ones."""
    return tuple(tuple(Piece(p.size, p.axes) for p in dim) for dim in sharding)


def shard_shape(sharding: Sharding, mesh: Mesh) -> tuple[int, ...]:
    """The shape of one rank's part."""
    return tuple(_extent(dim, mesh) for dim in sharding)


def _extent(dim: Iterable[Piece], mesh: Mesh) -> int:
    """Of what a rank holds of a dim; of rows whose number depends on a router, what it has if that is balanced."""
    return whole(math.prod(Fraction(p.size) / mesh.size(*p.axes) for p in dim))


def place_of(dims: Dims, layout: Layout, mesh: Mesh, leaf: Factor) -> tuple[int, int]:
    """Where a factor lies in the local tensor: (dim, product of the local sizes before it in that dim)."""
    for i, dim in enumerate(dims):
        outer = 1
        for f in leaves(dim):
            if f is leaf:
                return i, outer
            outer *= f.size // mesh.size(*(a for a in mesh.names if layout.get(a) is f))
    raise KeyError(leaf)


def take(tensor: torch.Tensor, sharding: Sharding, mesh: Mesh, rank: int) -> torch.Tensor:
    """The part of a global tensor that `rank` holds."""
    for i, dim in enumerate(sharding):
        before = 1
        for k, piece in enumerate(dim):
            if piece.axes:
                tensor = deal(tensor, i, before, piece.dealt)
                n, at = mesh.size(*piece.axes), mesh.index(rank, piece.axes)
                tail = math.prod(p.size for p in dim[k + 1 :])
                y = tensor.reshape(*tensor.shape[:i], before, n, piece.size // n, tail, *tensor.shape[i + 1 :])
                y = y.select(i + 1, at)
                tensor = y.reshape(*tensor.shape[:i], before * (piece.size // n) * tail, *tensor.shape[i + 1 :])
                before *= piece.size // n
            else:
                before *= piece.size
    return tensor


def put(parts: list[torch.Tensor], sharding: Sharding, shape: torch.Size, mesh: Mesh) -> torch.Tensor:
    """The global tensor from every rank's part (differentiable; replicas are taken from the first that has them)."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    flat = parts[0].new_zeros(math.prod(shape))
    seen: set[tuple] = set()
    axes = tuple(a for d in sharding for p in d for a in p.axes)
    for rank, part in enumerate(parts):
        at = mesh.coordinate(rank)
        key = tuple(at[a] for a in axes)
        if key not in seen:
            seen.add(key)
            flat = flat.index_put((take(index, sharding, mesh, rank).reshape(-1),), part.reshape(-1))
    return flat.reshape(shape)
