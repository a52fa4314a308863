"""copies: parameters gathered and gradients scattered by copy engines, between GPUs that see each other's memory.

NCCL's kernels run on the multiprocessors. A matrix product that fills the GPU loses about as much time to the collective
beside it as is hidden by running them together, and a kernel beside it waits until multiprocessors are free: once for every
matrix product, if it takes many kernels. Copies between the GPUs of one host take no multiprocessors (see "Low-contention
collectives" in PyTorch's symmetric memory), but for the barriers beside them, kernels of one block. Copies within a GPU do:
there are none, but for operations larger than a slot.

What is moved is told by addresses: copies and tables of kernels are made once for the same memory, so that the host has little to
do to start a bucket.

The bytes go through *slots*: buffers of a fixed size that all ranks of a group can read and write.

- Gather: the shards are cast and written, by one kernel of the caller's stream, to this rank's slot and to its part of the
  results. A barrier; then everyone copies the others' shards out of their slots.
- Gather in parts, shift: as a gather; what is shifted is copied to one other rank alone. Each part can be waited for by itself.
- Scatter: everyone copies to the others' slots what they are to sum up. A barrier. Where the sum is waited for, one kernel reads
  this rank's own part and its slot.

A slot is free again once a barrier has been passed after its last reader was done. Slots are taken in turn, as many of a kind
as operations are under way, so that this barrier is one that another operation needed; where it is not, there is one more.
"""

from __future__ import annotations

import functools
import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar import compat
from fxpar.backends.transport.addresses import (
    ALIGNED,
    BucketMoves,
    Kinds,
    SlotsAt,
    SlotSpan,
    gathering,
    place,
    rounds,
    scattering,
)
from fxpar.backends.transport.base import BUCKET_BYTES, NCCL, REDUCTION_BYTES, Transport
from fxpar.backends.transport.control import Control
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.elementwise import add, spread
from fxpar.ops.parts import PartsGroup
from fxpar.ops.table import are_for_a_recording
from fxpar.sharding.mesh import Axes, BoundMesh

GATHERS, SCATTERS = range(3), range(3, 6)
"""The slots of each kind, as many as operations are under way (see `prefetch.LEAD`, and `buckets`)."""
SLACK = 2**16
MOST = 4096
"""Operations on other memory that are remembered."""
LARGEST = 512 * 2**20
"""Bytes of a gradient for which slots are made large enough; a larger one goes through them in several rounds."""

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


def begin_anew(runtime: GroupRuntime, broken: bool = False) -> None:
    """Have what copies for a runtime begin anew, on all ranks at the same place among their collectives: see `CopyGroup.anew`."""
    used = {*runtime.transport.copy_groups.values(), *runtime.transport.part_groups.values()}
    for _, copies, name in _made.values():
        if name in used:
            copies.anew(broken)


def available(device: torch.device) -> bool:
    """Whether it is worth trying to make a `CopyGroup`."""
    return device.type == "cuda"


def transport_over(mesh: BoundMesh, axes: Axes, control: Control, make: Callable[[dist.ProcessGroup], CopyGroup]) -> Transport:
    """Copies over `axes`, if every group over them is on one host that allows it; otherwise NCCL, on all ranks.

    make: makes what copies for a group, or raises RuntimeError where that cannot be; not called where an earlier module has made
    it. To be called on all ranks; costs the slots' memory on each.
    """
    hosts = control.exchange(socket.gethostname())
    if any(len({hosts[r] for r in ranks}) > 1 for ranks in mesh.mesh.groups(axes)):
        return NCCL
    group = mesh.group(axes)
    name = known(group)
    if name is None:
        try:
            made = make(group)
        except RuntimeError:
            made = None
        if not all(control.exchange(made is not None)) or made is None:
            return NCCL
        name = register(group, made)
    return Transport({group.group_name: name})


def on_gpu(group: dist.ProcessGroup, parameter: int = 0, gradient: int = 0) -> CopyGroup:
    """A `CopyGroup` of the current GPU. parameter, gradient: bytes of the largest ones.

    Raises: RuntimeError where the GPUs cannot see each other's memory.
    """
    return _on_gpu(group, slot_sizes(group.size(), parameter, gradient))


def of_parts_on_gpu(group: dist.ProcessGroup, part: int) -> CopyGroup:
    """A `CopyGroup` of the current GPU that moves parts of activations, of at most so many bytes; in several rounds, if larger.

    Raises: as `on_gpu`.
    """
    return _on_gpu(group, [_aligned(part) + SLACK if which in GATHERS else SLACK for which in (*GATHERS, *SCATTERS)])


def _on_gpu(group: dist.ProcessGroup, sizes: list[int]) -> CopyGroup:
    slots = compat.SymmetricSlots(group, sizes, torch.device("cuda", torch.cuda.current_device()))
    return CopyGroup(slots, torch.cuda.Stream(priority=-1))


def slot_sizes(ranks: int, parameter: int = 0, gradient: int = 0) -> list[int]:
    """Bytes of every slot: a bucket goes through one."""
    gather = max(BUCKET_BYTES, parameter) // ranks
    scatter = max(REDUCTION_BYTES, gradient) * (ranks - 1) // ranks
    return [_aligned(size) + SLACK for size in [gather] * len(GATHERS) + [scatter] * len(SCATTERS)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Slots(Protocol):
    """Buffers on every one of `size` ranks, those of `GATHERS` and `SCATTERS`, each visible to all."""

    rank: int
    size: int

    def of(self, rank: int, which: int) -> Tensor:
        """That slot of that rank, as bytes."""

    def barrier(self) -> None:
        """What was written before it, on any rank, is seen after it; in the order of the current stream."""


class CopyGroup(PartsGroup):
    """A process group that gathers tensors, scatters sums and shifts tensors from rank to rank, and does nothing else.

    stream: on which it copies between ranks; None: at once (on CPUs). Results are there once the `Work` is waited for; until
    then it holds the operands.
    """

    def __init__(self, slots: Slots, stream: torch.cuda.Stream | None = None):
        super().__init__(slots.rank, slots.size)  # type: ignore[call-arg]
        self.slots = slots
        self.beside = compat.AtOnce() if stream is None else compat.SideStream(stream)
        self._turn = {GATHERS: 0, SCATTERS: 0}
        self._users: dict[int, _CopyWork] = {}
        self._barriers = 0
        self._passed: deque[tuple[int, Any]] = deque(maxlen=8)
        self._seen: dict[tuple, list[Tensor]] = {}
        self._known: dict[tuple, BucketMoves] = {}
        self._room = slots.of(slots.rank, GATHERS[0]).numel()
        self._region = slots.of(slots.rank, SCATTERS[0]).numel() // max(slots.size - 1, 1) // ALIGNED * ALIGNED

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes every rank's inputs[i], one after the other, in the dtype of outputs[i]."""
        n = self.slots.size
        kinds = tuple([(y.numel() // n, y.dtype) for y in outputs])
        return self.gather_at(kinds, [y.data_ptr() for y in outputs], inputs, lambda: [y.view(n, -1) for y in outputs])

    def gather_at(self, kinds: Kinds, to: Sequence[int], inputs: Sequence[Tensor], rows: Callable[[], list[Tensor]]) -> _CopyWork:
        """What lies at the address to[i] becomes every rank's inputs[i], one after the other: kinds[i] says how many elements of
        which dtype each rank's part has. ``rows()[i]``: the tensor that lies there, a row for each rank."""
        turns = rounds(kinds, self._room)
        if len(turns) != 1:
            return self._gather([[*y] for y in rows()], inputs, turns)[0]
        (parts,) = turns
        given = [x.contiguous() for x in inputs]
        done = _CopyWork(self)
        which, free = self._take(GATHERS, done)
        key = which, kinds, given[0].dtype, *to, *[x.data_ptr() for x in given]
        started = self._started(key, lambda: gathering(self._lie(which), parts, kinds, to, given))
        self._wait_for_barrier(free)
        if started.kernels:
            started()
        else:
            spread(given, self._windows(self.slots.rank, which, 0, parts), [y[self.slots.rank] for y in rows()])
        with self.beside:
            self._barrier()
            self.beside.copy(started.moves)
        return done.started()

    def gather_parts(self, parts: Sequence[Tensor], x: Tensor) -> list[dist.Work]:
        full = [[p.view(-1) for p in parts]]
        turns = _layout([full[0][self.slots.rank]], self._room)
        return [*self._gather(full, [x], turns)[1].values()]

    def _gather(self, full: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], turns: tuple[tuple[SlotSpan, ...], ...]
                ) -> tuple[_CopyWork, dict[int, _CopyWork]]:
        """full[i][r], flat, becomes rank r's inputs[i]. Returns what to wait for: for all, and for each other rank's part."""
        me, arrived = self.slots.rank, {}
        mine = [y[me] for y in full]
        done = _CopyWork(self)
        if len(turns) > 1:
            torch._foreach_copy_(mine, [x.reshape(-1) for x in inputs])
        for parts in turns:
            which, free = self._take(GATHERS, done)
            slot = self._windows(me, which, 0, parts)
            if len(turns) == 1:
                self._wait_for_barrier(free)
                spread(inputs, slot, mine)
            with self.beside:
                if len(turns) > 1:
                    _copy(slot, _cut(mine, parts))
                self._barrier()
                for peer in self._others():
                    _copy(_cut([y[peer] for y in full], parts), self._windows(peer, which, 0, parts))
                    arrived[peer] = _CopyWork(self).started()
        return done.started(), arrived

    def alltoall_base(self, output: Tensor, given: Tensor, received: list[int], sent: list[int], _: Any = None) -> dist.Work:
        """output, contiguous, becomes what another rank gives: all of it comes from one rank, and all that is given goes to one,
        at the same distance on all ranks."""
        peers, others = ([r for r, size in enumerate(sizes) if size] for sizes in (received, sent))
        if len(peers) != 1 or len(others) != 1 or (peers[0] + others[0] - 2 * self.slots.rank) % self.slots.size:
            raise ValueError(f"copies move a tensor from one rank to one other, not {sent} and {received} rows")
        flat = given.reshape(-1)
        turns = _layout([flat], self._room)
        done = _CopyWork(self, [flat])
        for parts in turns:
            which, free = self._take(GATHERS, done)
            slot = self._windows(self.slots.rank, which, 0, parts)
            if len(turns) == 1:
                self._wait_for_barrier(free)
                _copy(slot, [flat])
            with self.beside:
                if len(turns) > 1:
                    _copy(slot, _cut([flat], parts))
                self._barrier()
                _copy(_cut([output.view(-1)], parts), self._windows(peers[0], which, 0, parts))
        return done.started()

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """outputs[i], contiguous, becomes this rank's part of the sum of every rank's inputs[i]."""
        return self.scatter_at(tuple([(y.numel(), y.dtype) for y in outputs]), outputs, inputs)

    def scatter_at(self, kinds: Kinds, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> _CopyWork:
        """As `reduce_scatter_tensor_coalesced`; kinds[i]: how many elements of which dtype outputs[i] has."""
        inputs = [x.contiguous() for x in inputs]
        turns = rounds(kinds, self._region)
        if len(turns) != 1:
            return self._scatter(outputs, inputs, turns)
        (parts,) = turns
        done = _CopyWork(self, [*inputs, *outputs])
        which, _ = self._take(SCATTERS, done)
        to, source = [y.data_ptr() for y in outputs], [x.data_ptr() for x in inputs]
        key = which, kinds, *to, *source
        started = self._started(key, lambda: scattering(
            self._lie(which), parts, kinds, to, source, self._region, inputs[0].device))
        with self.beside:
            self.beside.copy(started.moves)
            self._barrier()
        done.sum = started if started.kernels else functools.partial(self._sum_up, outputs, inputs, which, parts)
        done.in_slots = True
        return done.started()

    def _sum_up(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], which: int, parts: tuple[SlotSpan, ...]) -> None:
        me = self.slots.rank
        arrived = [self._windows(me, which, place(me, peer, self.slots.size) * self._region, parts) for peer in self._others()]
        _sum([y.view(-1) for y in outputs], [x.view(self.slots.size, -1)[me] for x in inputs], arrived)

    def _scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], turns: tuple[tuple[SlotSpan, ...], ...]) -> _CopyWork:
        me, n, region = self.slots.rank, self.slots.size, self._region
        flat, full = [y.view(-1) for y in outputs], [x.view(n, -1).unbind() for x in inputs]
        done = _CopyWork(self, inputs)
        for first in range(0, len(turns), len(SCATTERS)):
            now = [(self._take(SCATTERS, done)[0], parts) for parts in turns[first : first + len(SCATTERS)]]
            with self.beside:
                if first:
                    self._barrier()
                for which, parts in now:
                    for peer in self._others():
                        there = self._windows(peer, which, place(peer, me, n) * region, parts)
                        _copy(there, _cut([x[peer] for x in full], parts))
                self._barrier()
                for which, parts in now:
                    into = _cut(flat, parts)
                    for k, peer in enumerate(self._others()):
                        more = self._windows(me, which, place(me, peer, n) * region, parts)
                        add(into, into, more) if k else _copy(into, more)
        done.sum = functools.partial(_sum, flat, [x[me] for x in full], [flat])
        return done.started()

    def anew(self, broken: bool = False) -> None:
        """All slots are free, the next is the first, and the current stream has waited for what was started.

        What comes next neither waits for an event from before nor depends on how many operations there were, so that it can be
        recorded and replayed (CUDA graphs). A barrier. broken: what was started last was recorded, and is never run.
        """
        for user in () if broken else self._users.values():
            user.finish()
        with self.beside:
            self._barrier()
        self.beside.wait(self.beside.record())
        self._turn = dict.fromkeys(self._turn, 0)
        self._users.clear()
        self._passed.clear()

    def _take(self, kind: range, user: _CopyWork) -> tuple[int, int]:
        """The next slot of a kind, and the number of the barrier after which it is free."""
        which = kind[self._turn[kind] % len(kind)]
        self._turn[kind] += 1
        before = self._users.get(which)
        self._users[which] = user
        if before is None or before is user:
            return which, 0
        if before.in_slots:
            before.finish()
        if before.used == self._barriers:
            with self.beside:
                self._barrier()
        return which, before.used + 1

    def _barrier(self) -> None:
        self.slots.barrier()
        self._barriers += 1
        full = len(self._passed) == self._passed.maxlen
        self._passed.append((self._barriers, self.beside.record(self._passed.popleft()[1] if full else None)))

    def _wait_for_barrier(self, number: int) -> None:
        """Have the current stream wait until a barrier, or one after it, is passed."""
        event = next((event for count, event in self._passed if count >= number), None)
        if number and event is not None:
            self.beside.wait(event)

    def _windows(self, rank: int, which: int, start: int, parts: tuple[SlotSpan, ...]) -> list[Tensor]:
        """Where the parts of a round lie in a rank's slot, from byte `start`."""
        key = (rank, which, start, parts)
        if key not in self._seen:
            memory = self.slots.of(rank, which)
            self._seen[key] = [memory[start + p.at : start + p.at + (p.stop - p.begin) * p.dtype.itemsize].view(p.dtype)
                               for p in parts]
        return self._seen[key]

    def getBackendName(self) -> str:
        return "fxpar-copies"

    def _others(self) -> Iterator[int]:
        """Every other rank, each rank starting with another."""
        return ((self.slots.rank + k) % self.slots.size for k in range(1, self.slots.size))

    def _lie(self, which: int) -> SlotsAt:
        addresses = [self.slots.of(rank, which).data_ptr() for rank in range(self.slots.size)]
        return SlotsAt(self.slots.rank, addresses, list(self._others()))

    def _started(self, key: tuple, make: Callable[[], BucketMoves]) -> BucketMoves:
        """What an operation starts, made once for the same memory; what is recorded has tables of its own, which it keeps."""
        if are_for_a_recording():
            return make()
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST:
                self._known.clear()
            found = self._known[key] = make()
        return found


class _CopyWork(dist.Work):
    """Waiting makes the current stream wait, not the host.

    sum: what is left to do then; in_slots: whether it reads them. operands: are kept until then. used: how many barriers there
    had been when the last reader of its slots was started.
    """

    def __init__(self, group: CopyGroup, operands: Sequence[Tensor] = ()):
        super().__init__()
        self.group, self.operands = group, operands
        self.sum: Callable[[], None] | None = None
        self.in_slots = False
        self.event: torch.cuda.Event | None = None
        self.used = 0

    def started(self) -> _CopyWork:
        self.used = self.group._barriers
        self.event = self.group.beside.record()
        return self

    def finish(self) -> None:
        """Sum up, if that is still to be done; no later barrier is passed before it is."""
        if self.sum is not None:
            self._wait()
            self.sum()
            self.sum, self.operands, self.used = None, (), self.group._barriers
            self.group.beside.behind()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.sum is not None:
            self.finish()
        else:
            self._wait()
        return True

    def _wait(self) -> None:
        if self.event is not None:
            self.group.beside.wait(self.event)


def _layout(tensors: Sequence[Tensor], nbytes: int) -> tuple[tuple[SlotSpan, ...], ...]:
    return rounds(tuple((x.numel(), x.dtype) for x in tensors), nbytes)


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """One copy each: a kernel that copies several would take multiprocessors."""
    for y, x in zip(to, source, strict=True):
        y.copy_(x)


def _sum(to: Sequence[Tensor], own: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> None:
    """to[i] = own[i] + others[0][i] + ..."""
    for more in others or [[torch.zeros_like(x) for x in own]]:
        add(to, own, more)
        own = to


def _cut(flat: Sequence[Tensor], parts: tuple[SlotSpan, ...]) -> list[Tensor]:
    return [flat[p.tensor] if p.stop - p.begin == flat[p.tensor].numel() else flat[p.tensor][p.begin : p.stop] for p in parts]
