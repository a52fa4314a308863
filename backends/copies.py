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
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SLOT_BYTES = 64 * 2**20
ALIGNED = 256
Part = tuple[int, int, int, int]
"""Which tensor, from which element to which, and where in the slot, in bytes."""


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

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes every rank's inputs[i], one after the other."""
        me, n = self.slots.rank, self.slots.size
        inputs = [x.contiguous() for x in inputs]
        flat, whole = [x.view(-1) for x in inputs], [y.view(n, -1) for y in outputs]
        with self._running():
            for parts in rounds(flat, self.slots.nbytes):
                slot = self._next()
                for i, a, b, at in parts:
                    _window(self.slots.of(me, slot), at, flat[i], b - a).copy_(flat[i][a:b])
                    whole[i][me, a:b].copy_(flat[i][a:b])
                self.slots.barrier()
                for peer in self._others():
                    for i, a, b, at in parts:
                        whole[i][peer, a:b].copy_(_window(self.slots.of(peer, slot), at, flat[i], b - a))
            return _Done(inputs, self.stream)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes this rank's part of the sum of every rank's inputs[i]."""
        me, n = self.slots.rank, self.slots.size
        inputs = [x.contiguous() for x in inputs]
        flat, whole = [y.view(-1) for y in outputs], [x.view(n, -1) for x in inputs]
        region = self.slots.nbytes // n // ALIGNED * ALIGNED
        with self._running():
            for parts in rounds(flat, region):
                slot = self._next()
                for peer in self._others():
                    for i, a, b, at in parts:
                        _window(self.slots.of(peer, slot), me * region + at, flat[i], b - a).copy_(whole[i][peer, a:b])
                self.slots.barrier()
                for i, a, b, at in parts:
                    total = whole[i][me, a:b]
                    for peer in self._others():
                        arrived = _window(self.slots.of(me, slot), peer * region + at, flat[i], b - a)
                        total = torch.add(total, arrived, out=flat[i][a:b])
            return _Done(inputs, self.stream)

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


def rounds(flat: Sequence[Tensor], nbytes: int) -> list[list[Part]]:
    """The elements of flat tensors, cut into rounds of at most `nbytes`."""
    out: list[list[Part]] = [[]]
    at = 0
    for i, x in enumerate(flat):
        a = 0
        while a < x.numel():
            room = (nbytes - at) // x.element_size()
            if room <= 0:
                out.append([])
                at = 0
                continue
            b = min(x.numel(), a + room)
            out[-1].append((i, a, b, at))
            at = -(-(at + (b - a) * x.element_size()) // ALIGNED) * ALIGNED
            a = b
    return [r for r in out if r]


def _window(slot: Tensor, at: int, like: Tensor, elements: int) -> Tensor:
    return slot[at : at + elements * like.element_size()].view(like.dtype)
