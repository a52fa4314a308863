"""schedule: which positions a rank holds, and whose keys it needs when. Integers alone: no tensors, no processes.

A sequence is cut into chunks of equal length. Under zigzag rank r of n holds the chunks r and 2n - 1 - r, so that under a causal
mask all ranks have as much to do; otherwise it holds chunk r.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

WHOLE = slice(None)


@dataclass(frozen=True)
class Pair:
    """Queries (rows) and keys of one rank's tensors, and the shift of `Sight` between them (None: all are seen)."""

    rows: slice
    keys: slice
    shift: int | None


@dataclass(frozen=True, order=True)
class ChunkPiece:
    """Keys that a chunk needs of another: the positions start..stop of the tensors of rank `owner`, which come to lie from `at`
    on before the own chunk that is number `chunk` of its rank."""

    owner: int
    chunk: int
    at: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class RingSchedule:
    """ranks: of the group. queries, keys: positions of each rank. zigzag means something with causal alone; a window needs
    causal. Raises: ValueError for what does not agree."""

    ranks: int
    queries: int
    keys: int
    causal: bool = False
    zigzag: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"attention over {self.ranks} ranks")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"window={self.window}, causal={self.causal}: a window has at least 1 key and is causal")
        if self.causal and self.queries != self.keys:
            raise ValueError(f"{self.queries} queries and {self.keys} keys: causal attention has as many of both")
        if self.zigzag and self.causal and self.queries % 2:
            raise ValueError(f"zigzag: each rank holds two chunks of equal length, and {self.queries} positions are odd")

    @property
    def chunks(self) -> int:
        """Of a rank."""
        return 2 if self.zigzag and self.causal else 1

    @property
    def length(self) -> int:
        """Of a chunk."""
        return self.keys // self.chunks

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The numbers of the chunks that a rank holds."""
        return (rank, 2 * self.ranks - 1 - rank) if self.chunks == 2 else (rank,)

    def owner(self, chunk: int) -> int:
        return min(chunk, 2 * self.ranks - 1 - chunk) if self.chunks == 2 else chunk

    def part(self, number: int) -> slice:
        """Where the chunk that is number 0 or 1 of its rank lies in the rank's tensors."""
        return slice(number * self.length, (number + 1) * self.length)

    # ---- a ring: the keys of all ranks come by, those of the rank before first ----

    def pairs(self, rank: int, other: int) -> list[Pair]:
        """What rank `rank` computes with the keys of rank `other`."""
        if not self.causal:
            return [Pair(WHOLE, WHOLE, None)]
        if self.window is None and rank == other:
            return [Pair(WHOLE, WHOLE, 0)]
        if self.window is None and self.chunks == 2:
            return [Pair(WHOLE, self.part(0), None) if other < rank else Pair(self.part(1), WHOLE, None)]
        return [Pair(self.part(x), self.part(y), (a - b) * self.length)
                for x, a in enumerate(self.chunks_of(rank)) for y, b in enumerate(self.chunks_of(other))
                if a >= b and (self.window is None or (a - b - 1) * self.length + 1 < self.window)]

    # ---- a halo: each chunk gets the keys that its window reaches back to, and no others ----

    @functools.cached_property
    def halo(self) -> bool:
        """Whether fewer keys travel if each chunk gets what its window reaches, than if all come by."""
        if self.window is None or self.ranks == 1:
            return False
        return self.chunks * (self.window - 1) < (self.ranks - 1) * self.keys

    def before(self, chunk: int) -> int:
        """How many keys before its own a chunk reaches."""
        assert self.window is not None
        return min(self.window - 1, chunk * self.length)

    def pieces(self, rank: int) -> list[ChunkPiece]:
        """What a rank needs for its halos, its own keys too; by owner."""
        found = []
        for number, chunk in enumerate(self.chunks_of(rank)):
            first = chunk * self.length - self.before(chunk)
            for other in range(first // self.length, chunk):
                owner = self.owner(other)
                offset = self.chunks_of(owner).index(other) * self.length - other * self.length
                start, stop = max(first, other * self.length), (other + 1) * self.length
                found.append(ChunkPiece(owner, number, start - first, start + offset, stop + offset))
        return sorted(found)

    def received(self, rank: int) -> list[ChunkPiece]:
        """What other ranks send to a rank, in order."""
        return [p for p in self.pieces(rank) if p.owner != rank]

    def sent(self, rank: int) -> list[list[ChunkPiece]]:
        """What a rank sends, for each rank in turn."""
        return [[p for p in self.pieces(to) if p.owner == rank and to != rank] for to in range(self.ranks)]

    def reaching(self) -> slice:
        """The queries of a chunk whose window reaches before it."""
        assert self.window is not None
        return slice(0, min(self.length, self.window - 1))
