"""Which rectangles of a global tensor a rank holds.

Arithmetic on shardings alone. A factor that lies inside a dim (the heads of a fused qkv) makes several rectangles, which
no DTensor placement describes by one offset.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fxpar.sharding.layout import Piece, Sharding
from fxpar.sharding.mesh import Axes, Mesh


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive indices of one dim: `size` of them, from `start` in the full tensor and from `local` in the rank's part."""

    start: int
    local: int
    size: int


Runs = tuple[tuple[Run, ...], ...]
"""What a rank holds of a tensor: the runs of each dim. Every combination of them is one rectangle."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle: where it starts in the full tensor and in the rank's part, and its extent."""

    start: tuple[int, ...]
    local: tuple[int, ...]
    size: tuple[int, ...]

    def of_part(self, part: Tensor) -> Tensor:
        """The view of a rank's part that is this rectangle."""
        return view(part, self.local, self.size)

    def of_full(self, full: Tensor, origin: tuple[int, ...] | None = None) -> Tensor:
        """The view of the full tensor, or of a part of it that starts at `origin`, that is this rectangle."""
        at = self.start if origin is None else tuple(s - o for s, o in zip(self.start, origin, strict=True))
        return view(full, at, self.size)


def view(tensor: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    for dim, (s, n) in enumerate(zip(start, size, strict=True)):
        tensor = tensor.narrow(dim, s, n)
    return tensor


def runs_of(sharding: Sharding, shape: tuple[int, ...], mesh: Mesh, rank: int) -> Runs:
    """What `rank` holds of a tensor of that shape: `fxpar.sharding.layout.take`, as indices."""
    return tuple(_runs(dim, n, mesh, rank) for dim, n in zip(sharding, shape, strict=True))


def _runs(pieces: tuple[Piece, ...], extent: int, mesh: Mesh, rank: int) -> tuple[Run, ...]:
    if not any(p.axes for p in pieces):
        return (Run(0, 0, extent),)
    runs: tuple[Run, ...] = (Run(0, 0, 1),)
    inner, mine = 1, 1  # the extent of the pieces so far, minor to major: in the full tensor, in the part
    for piece in reversed(pieces):
        kept = piece.size // mesh.size(*piece.axes)
        first = kept * mesh.index(rank, piece.axes)
        if mine == inner:
            runs = (Run(first * inner, 0, kept * inner),)
        else:
            runs = tuple(Run((first + j) * inner + r.start, j * mine + r.local, r.size) for j in range(kept) for r in runs)
        inner, mine = inner * piece.size, mine * kept
    return runs


def part_shape(runs: Runs) -> tuple[int, ...]:
    return tuple(sum(r.size for r in dim) for dim in runs)


def chunks(runs: Runs) -> Iterator[Chunk]:
    """The rectangles: together the rank's part, each element once."""
    for combination in itertools.product(*runs):
        yield Chunk(tuple(r.start for r in combination), tuple(r.local for r in combination),
                    tuple(r.size for r in combination))


def within(runs: Runs, start: tuple[int, ...], size: tuple[int, ...]) -> Runs:
    """The part of what a rank holds that lies inside a rectangle of the full tensor."""
    return tuple(tuple(_clipped(dim, s, n)) for dim, s, n in zip(runs, start, size, strict=True))


def _clipped(dim: tuple[Run, ...], start: int, size: int) -> Iterator[Run]:
    for run in dim:
        low, high = max(run.start, start), min(run.start + run.size, start + size)
        if low < high:
            yield Run(low, run.local + low - run.start, high - low)


def split_axes(sharding: Sharding) -> set[str]:
    """The mesh axes over which a tensor lies in parts."""
    return {a for dim in sharding for piece in dim for a in piece.axes}


def replicas(sharding: Sharding, mesh: Mesh) -> Axes:
    """The mesh axes along which ranks hold the same part."""
    split = split_axes(sharding)
    return tuple(a for a in mesh.names if a not in split)
