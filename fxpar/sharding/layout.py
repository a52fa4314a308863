"""Layouts: which mesh axes each factor of a tensor lies on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fxpar.sharding.factors import Dim, Dims, Factor, leaves
from fxpar.sharding.mesh import Axes, Mesh

Layout = dict[str, Factor]
"""Mesh axis -> the factor (a leaf) that it splits. An axis that is absent holds the tensor replicated."""


@dataclass(frozen=True)
class Piece:
    """One run of a tensor dimension as the ranks hold it: ``size`` elements, split over ``axes``."""

    size: int
    axes: Axes = ()


def pieces(dim: Dim, layout: Layout, mesh: Mesh) -> list[Piece]:
    """The dimension's factors with the axes that split each, adjacent unsplit ones joined."""
    out: list[Piece] = []
    for leaf in leaves(dim):
        axes = tuple(a for a in mesh.names if layout.get(a) is leaf)
        if out and not axes and not out[-1].axes:
            out[-1] = Piece(out[-1].size * leaf.size)
        else:
            out.append(Piece(leaf.size, axes))
    return out


def local_extent(dim: Dim, layout: Layout, mesh: Mesh) -> int:
    """How many elements of this dimension one rank holds."""
    return math.prod(p.size // mesh.size(*p.axes) for p in pieces(dim, layout, mesh))


def local_shape(dims: Dims, layout: Layout, mesh: Mesh) -> list[int]:
    return [local_extent(d, layout, mesh) for d in dims]


def restrict(layout: Layout, dims: Dims, without: Iterable[Factor] = ()) -> Layout:
    """The part of a layout that concerns these dims."""
    have = {f for d in dims for f in leaves(d)} - set(without)
    return {a: f for a, f in layout.items() if f in have}


def show(dims: Dims, layout: Layout, mesh: Mesh) -> str:
    """``[batch8/dp, seq16, heads4/tp d2 e8]``: dims in order, split factors with their axes."""

    def one(f: Factor) -> str:
        axes = [a for a in mesh.names if layout.get(a) is f]
        return (f"{f.role}{f.size}" if f.role else repr(f)) + "".join(f"/{a}" for a in axes)

    return "[" + ", ".join(" ".join(one(f) for f in leaves(d)) or "1" for d in dims) + "]"


Sharding = tuple[tuple[Piece, ...], ...]
"""How a tensor lies on a mesh, apart from the program whose factors its layout names: for each dim its pieces, major to minor."""


def sharding_of(dims: Dims, layout: Layout, mesh: Mesh) -> Sharding:
    return tuple(tuple(pieces(d, layout, mesh)) for d in dims)


def shard_shape(sharding: Sharding, mesh: Mesh) -> tuple[int, ...]:
    """The shape of one rank's part."""
    return tuple(math.prod(p.size // mesh.size(*p.axes) for p in dim) for dim in sharding)


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
