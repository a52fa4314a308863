"""copies: parameters gathered and gradients scattered by copy engines, between GPUs that see each other's memory.

NCCL's kernels run on the multiprocessors. A matrix product that fills the GPU loses about as much time to the collective
beside it as is hidden by running them together. Copies between the GPUs of one host take no multiprocessors: what is left for
those is to add what has arrived (see "Low-contention collectives" in PyTorch's symmetric memory).

The bytes go through *slots*: buffers of a fixed size that all ranks of a group can read and write. An operation is cut
into rounds that fit a slot, and rounds take two slots in turn with one barrier each: who has passed the barrier of one
round knows that everyone has finished with the slot of the round before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar import compat

SLOT_BYTES = 64 * 2**20
ALIGNED = 256

_BULK: dict[str, str] = {}


def bulk(name: str) -> str:
    """The name of the group that moves parameters and gradients for the group of this name: a `CopyGroup`, or itself."""
    return _BULK.get(name, name)


def move_bulk(name: str, group: CopyGroup) -> None:
    """From now on, `group` does that for the group of this name."""
    _BULK[name] = f"{name}-copies"
    compat.register_group(group, _BULK[name])


class Part(NamedTuple):
    """Elements of one tensor, and where they lie in the slot, in bytes."""

    tensor: int
    begin: int
    stop: int
    at: int
    dtype: torch.dtype


class Slots(Protocol):
    """Two buffers of `nbytes` on every one of `size` ranks, each visible to all."""

    rank: int
    size: int
    nbytes: int

    def of(self, rank: int, which: int) -> Tensor:
        """That rank's slot 0 or 1, as bytes."""

    def barrier(self) -> None:
        """What was written before it, on any rank, is seen after it; in the order of the current stream."""


class CopyGroup(dist.ProcessGroup):
    """A process group that gathers tensors and scatters sums, and does nothing else.

    stream: on which it runs; None: at once (on CPUs). Results are there once the `Work` is waited for; until then it holds
    the operands.
    """

    def __init__(self, slots: Slots, stream: torch.cuda.Stream | None = None):
        super().__init__(slots.rank, slots.size)  # type: ignore[call-arg]
        self.slots, self.stream, self.turn = slots, stream, 0
        self._seen: dict[tuple, list[Tensor]] = {}

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes every rank's inputs[i], one after the other."""
        me, n = self.slots.rank, self.slots.size
        inputs = [x.contiguous() for x in inputs]
        flat, whole = [x.view(-1) for x in inputs], [y.view(n, -1).unbind() for y in outputs]
        with self._running():
            for parts in _layout(inputs, self.slots.nbytes):
                slot = self._next()
                _copy(self._windows(me, slot, 0, parts), _cut(flat, parts))
                self.slots.barrier()
                for peer in self._others():
                    _copy(_cut([y[peer] for y in whole], parts), self._windows(peer, slot, 0, parts))
            _copy([y[me] for y in whole], flat)
            return _Done(inputs, self.stream)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes this rank's part of the sum of every rank's inputs[i]."""
        me, n = self.slots.rank, self.slots.size
        inputs = [x.contiguous() for x in inputs]
        flat, whole = [y.view(-1) for y in outputs], [x.view(n, -1).unbind() for x in inputs]
        region = self.slots.nbytes // n // ALIGNED * ALIGNED
        with self._running():
            for parts in _layout(outputs, region):
                slot = self._next()
                for peer in self._others():
                    _copy(self._windows(peer, slot, me * region, parts), _cut([x[peer] for x in whole], parts))
                self.slots.barrier()
                totals, into = _cut([x[me] for x in whole], parts), _cut(flat, parts)
                for peer in self._others():
                    arrived = self._windows(me, slot, peer * region, parts)
                    totals = [torch.add(x, y, out=z) for x, y, z in zip(totals, arrived, into, strict=True)]
            return _Done(inputs, self.stream)

    def _windows(self, rank: int, slot: int, start: int, parts: tuple[Part, ...]) -> list[Tensor]:
        """Where the parts of a round lie in a rank's slot, from byte `start`."""
        key = (rank, slot, start, parts)
        if key not in self._seen:
            memory = self.slots.of(rank, slot)
            self._seen[key] = [memory[start + p.at : start + p.at + (p.stop - p.begin) * p.dtype.itemsize].view(p.dtype)
                               for p in parts]
        return self._seen[key]

    def getBackendName(self) -> str:
        return "fxpar-copies"

    def _others(self) -> Iterator[int]:
        """Every other rank, each rank starting with another."""
        return ((self.slots.rank + k) % self.slots.size for k in range(1, self.slots.size))

    def _next(self) -> int:
        self.turn = 1 - self.turn
        return self.turn

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield


class _Done(dist.Work):
    """Waiting makes the current stream wait, not the host."""

    def __init__(self, operands: list[Tensor], stream: torch.cuda.Stream | None):
        super().__init__()
        self.operands = operands
        self.event = stream.record_event() if stream is not None else None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.event is not None:
            self.event.wait()
        self.operands = []
        return True


def _layout(tensors: Sequence[Tensor], nbytes: int) -> tuple[tuple[Part, ...], ...]:
    return rounds(tuple((x.numel(), x.dtype) for x in tensors), nbytes)


@functools.cache
def rounds(tensors: tuple[tuple[int, torch.dtype], ...], nbytes: int) -> tuple[tuple[Part, ...], ...]:
    """The elements of tensors of these sizes, cut into rounds of at most `nbytes`."""
    out: list[list[Part]] = [[]]
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
            out[-1].append(Part(i, begin, stop, at, dtype))
            at = -(-(at + (stop - begin) * dtype.itemsize) // ALIGNED) * ALIGNED
            begin = stop
    return tuple(tuple(r) for r in out if r)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """One copy each: a kernel that copies several would take multiprocessors."""
    for y, x in zip(to, source, strict=True):
        y.copy_(x)


def _cut(flat: Sequence[Tensor], parts: tuple[Part, ...]) -> list[Tensor]:
    return [flat[p.tensor] if p.stop - p.begin == flat[p.tensor].numel() else flat[p.tensor][p.begin : p.stop] for p in parts]
