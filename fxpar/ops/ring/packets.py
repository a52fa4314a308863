"""packets: what travels from rank to rank: tensors of several dtypes as one run of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes that a tensor's place in a packet is a multiple of: what kernels want of their operands."""


@dataclass(frozen=True)
class PacketLayout:
    """The tensors of a packet: their shapes but for the length of the sequence, which is the dim `dims` says, and dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dims: Sequence[int]) -> PacketLayout:
        return cls(tuple(tuple(t.shape) for t in tensors), tuple(dims), tuple(t.dtype for t in tensors))

    def _parts(self, length: int) -> Iterator[tuple[tuple[int, ...], torch.dtype, int]]:
        for shape, dim, dtype in zip(self.shapes, self.dims, self.dtypes, strict=True):
            whole = (*shape[:dim], length, *shape[dim + 1 :])
            yield whole, dtype, math.prod(whole) * dtype.itemsize

    def bytes(self, length: int) -> int:
        """Of a packet of so many positions."""
        return sum(_padded(size) for _, _, size in self._parts(length))

    def pack(self, tensors: Sequence[Tensor], pieces: Sequence[slice]) -> Tensor:
        """The packets of these positions of `tensors`, one behind the other."""
        device = tensors[0].device
        packets = torch.empty(sum(self.bytes(p.stop - p.start) for p in pieces), dtype=torch.uint8, device=device)
        start = 0
        for piece in pieces:
            length = piece.stop - piece.start
            for t, place, dim in zip(tensors, self.unpack(packets, length, start), self.dims, strict=True):
                place.copy_(t.narrow(dim, piece.start, length))
            start += self.bytes(length)
        return packets

    def unpack(self, packets: Tensor, length: int, start: int = 0) -> list[Tensor]:
        """The tensors, as views, of a packet of so many positions that begins at byte `start`."""
        tensors = []
        for shape, dtype, size in self._parts(length):
            tensors.append(packets[start : start + size].view(dtype).view(shape))
            start += _padded(size)
        return tensors


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
