"""copies: parameters gathered and gradients scattered by copy engines, between GPUs that see each other's memory.

NCCL's kernels run on the multiprocessors. A matrix product that fills the GPU loses about as much time to the collective
beside it as is hidden by running them together, and a kernel beside it waits until multiprocessors are free: once for every
matrix product, if it takes many kernels. Copies between the GPUs of one host take no multiprocessors (see "Low-contention
collectives" in PyTorch's symmetric memory). What has arrived is added where it is waited for.

The bytes go through *slots*: buffers of a fixed size that all ranks of a group can read and write. An operation is cut
into rounds that fit a slot, and rounds take two slots in turn with one barrier each: who has passed the barrier of one
round knows that everyone has finished with the slot of the round before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar import compat

SLOT_BYTES = 64 * 2**20
ALIGNED = 256

_made: dict[str, tuple[dist.ProcessGroup, CopyGroup, str]] = {}
"""Name of a group -> that group, what copies for it, and the name of that. Modules on one group share it, one after another."""
_count = itertools.count()


def known(group: dist.ProcessGroup) -> str | None:
    """The name of the `CopyGroup` of this group, if one was made."""
    found = _made.get(group.group_name)
    return found[2] if found is not None and found[0] is group else None


def register(group: dist.ProcessGroup, copies: CopyGroup) -> str:
    """Have functional collectives find what copies for `group`, by the name that is returned."""
    name = f"{group.group_name}-copies{next(_count)}"
    compat.register_group(copies, name)
    _made[group.group_name] = group, copies, name
    return name


def on_gpu(group: dist.ProcessGroup) -> CopyGroup:
    """A `CopyGroup` of the current GPU. Raises: RuntimeError, OSError where the GPUs cannot see each other's memory."""
    slots = compat.SymmetricSlots(group, SLOT_BYTES, torch.device("cuda", torch.cuda.current_device()))
    return CopyGroup(slots, torch.cuda.Stream(priority=-1))


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
                into = _cut(flat, parts)
                for k, peer in enumerate(self._others()):
                    (_add if k else _copy)(into, self._windows(me, slot, peer * region, parts))
            return _Done(inputs, self.stream, flat, [x[me] for x in whole])

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
    """Waiting makes the current stream wait, not the host, and then add `more` to `totals`."""

    def __init__(self, operands: list[Tensor], stream: torch.cuda.Stream | None, totals: Sequence[Tensor] = (),
                 more: Sequence[Tensor] = ()):
        super().__init__()
        self.operands, self.totals, self.more = operands, totals, more
        self.event = stream.record_event() if stream is not None else None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.event is not None:
            self.event.wait()
        if self.totals:
            _add(self.totals, self.more)
        self.operands, self.totals, self.more = [], [], []
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


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """One copy each: a kernel that copies several would take multiprocessors."""
    for y, x in zip(to, source, strict=True):
        y.copy_(x)


@torch.no_grad()
def _add(to: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    torch._foreach_add_(list(to), list(more))


def _cut(flat: Sequence[Tensor], parts: tuple[Part, ...]) -> list[Tensor]:
    return [flat[p.tensor] if p.stop - p.begin == flat[p.tensor].numel() else flat[p.tensor][p.begin : p.stop] for p in parts]
