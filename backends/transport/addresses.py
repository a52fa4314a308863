"""addresses: what a bucket's operation on slots reads and writes, by address, so that it can be made once for the same memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fxpar import compat
from fxpar.ops.elementwise import Launch
from fxpar.ops.table import Place, table_at

ALIGNED = 256
"""In bytes: where in a slot a tensor may begin."""

Kinds = tuple[tuple[int, torch.dtype], ...]
"""Of tensors that go together: how many elements of which dtype each rank's part of them has."""


class SlotSpan(NamedTuple):
    """Elements of one tensor, and where they lie in the slot, in bytes."""

    tensor: int
    begin: int
    stop: int
    at: int
    dtype: torch.dtype


@functools.cache
def rounds(tensors: tuple[tuple[int, torch.dtype], ...], nbytes: int) -> tuple[tuple[SlotSpan, ...], ...]:
    """The elements of tensors of these sizes, cut into rounds of at most `nbytes`."""
    out: list[list[SlotSpan]] = [[]]
    at = 0
    for i, (size, dtype) in enumerate(tensors):
        begin = 0
        while begin < size:
            room = (nbytes - at) // dtype.itemsize
            if room <= 0:
                out.append([])
                at = 0
                continue
            stop = min(size, begin + room)
            out[-1].append(SlotSpan(i, begin, stop, at, dtype))
            at = -(-(at + (stop - begin) * dtype.itemsize) // ALIGNED) * ALIGNED
            begin = stop
    return tuple(tuple(r) for r in out if r)


class SlotsAt(NamedTuple):
    """Where the slots of one number lie, rank by rank; which rank this is, and the others, in the order in which it copies."""

    rank: int
    addresses: list[int]
    others: list[int]


@dataclass
class BucketMoves:
    """What an operation on certain memory starts: kernels of the current stream, and copies.

    kernels: none where they cannot go by addresses. Calling it starts them.
    """

    moves: list[compat.Move]
    kernels: list[Launch] = field(default_factory=list)

    def __call__(self) -> None:
        for kernel in self.kernels:
            kernel()


def gathering(slots: SlotsAt, parts: Sequence[SlotSpan], kinds: Kinds, to: Sequence[int], inputs: Sequence[Tensor]
              ) -> BucketMoves:
    """Every rank's inputs, to one after the other: at the addresses `to`. The kernel writes this rank's to its slot, too; what is
    copied is in the others' slots. parts: of a single round."""
    bytes_of = [size * dtype.itemsize for size, dtype in kinds]
    moves = [(to[p.tensor] + peer * bytes_of[p.tensor], slots.addresses[peer] + p.at, bytes_of[p.tensor])
             for peer in slots.others for p in parts]
    mine = slots.addresses[slots.rank]
    source = [(inputs[p.tensor].data_ptr(), kinds[p.tensor][0], inputs[p.tensor].dtype) for p in parts]
    slot = [(mine + p.at, *kinds[p.tensor]) for p in parts]
    own = [(to[p.tensor] + slots.rank * bytes_of[p.tensor], *kinds[p.tensor]) for p in parts]
    return BucketMoves(moves, _launches("spread", [source, slot, own], inputs[0].device))


def scattering(slots: SlotsAt, parts: Sequence[SlotSpan], kinds: Kinds, to: Sequence[int], inputs: Sequence[int], region: int,
               device: torch.device) -> BucketMoves:
    """This rank's part of the sum of all ranks' inputs, which lie at the addresses `inputs`, to the addresses `to`. What is
    copied goes to the others' slots, of which each rank has a region of that many bytes; then kernels sum up. parts: of a single
    round."""
    ranks, bytes_of = len(slots.addresses), [size * dtype.itemsize for size, dtype in kinds]
    moves = [(slots.addresses[peer] + place(peer, slots.rank, ranks) * region + p.at,
              inputs[p.tensor] + peer * bytes_of[p.tensor], bytes_of[p.tensor]) for peer in slots.others for p in parts]
    total = [(to[p.tensor], *kinds[p.tensor]) for p in parts]
    one = [(inputs[p.tensor] + slots.rank * bytes_of[p.tensor], *kinds[p.tensor]) for p in parts]
    kernels: list[Launch] = []
    for peer in slots.others:
        at = slots.addresses[slots.rank] + place(slots.rank, peer, ranks) * region
        made = _launches("add", [total, one, [(at + p.at, *kinds[p.tensor]) for p in parts]], device)
        if not made:
            return BucketMoves(moves)
        kernels, one = kernels + made, total
    return BucketMoves(moves, kernels)


def place(rank: int, sender: int, ranks: int) -> int:
    """Which region of a slot of `rank` is that of `sender`."""
    return (sender - rank) % ranks - 1


def _launches(kind: str, columns: list[list[tuple[int, int, torch.dtype]]], device: torch.device) -> list[Launch]:
    """The kernel that goes through columns of (address, elements, dtype), if one can."""
    dtypes = [column[0][2] for column in columns]
    if dtypes[1] != dtypes[2]:
        return []
    places: list[list[Place]] = [[(*where, True) for where in column] for column in columns]
    rows = table_at(places, device)
    return [] if rows is None else [Launch(kind, rows, tuple(dtypes[:2] if kind == "spread" else dtypes[:1]))]
