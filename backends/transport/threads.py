"""threads: process groups whose ranks are threads of one process, for real programs without real ranks.

Whatever issues functional collectives (an interpreted graph, or what Inductor compiled) runs here as it runs on a cluster:
each rank on its own, in the order of its own program, meeting the others in its collectives alone. Ranks that would hang on
a cluster, because they issue different collectives or not equally many, are an error here that says who waits for what.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar import compat
from fxpar.backends.transport.base import NCCL, Transport
from fxpar.backends.transport.runtime import FunctionalRuntime
from fxpar.errors import EquivalenceError
from fxpar.sharding.mesh import Axes, Mesh

T = TypeVar("T")
TIMEOUT = 120.0
"""Seconds after which a rank that waits in a collective gives up."""

_current = threading.local()  # .rank: that of the thread
_count = itertools.count()


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Collectives that this thread issues are those of `rank`."""
    _current.rank = rank
    try:
        yield
    finally:
        del _current.rank


class Threads:
    """The ranks of a mesh as threads, and the groups over its axes."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._groups: dict[Axes, ThreadGroup] = {}
        self._names: list[str] = []
        weakref.finalize(self, _forget, self._names)

    def runtime(self, rank: int) -> ThreadRuntime:
        return ThreadRuntime(self, rank)

    def name(self, axes: Axes) -> str:
        """The name of the groups over `axes`: the same for all ranks, so that they can share a graph."""
        if axes not in self._groups:
            group = self._groups[axes] = ThreadGroup(self.mesh.groups(axes), axes)
            for name in (group.registered, _copying(group.registered)):
                compat.register_group(group, name)
                self._names.append(name)
        return self._groups[axes].registered

    def transport(self, axes: Axes) -> Transport:
        """Copies over `axes`, with what copy engines do done at once; NCCL if there are none."""
        return Transport({self.name(axes): _copying(self.name(axes))}) if axes else NCCL

    def run(self, body: Callable[[int], T]) -> list[T]:
        """What ``body(rank)`` returns on every rank, all at once.

        Raises: the error of the first rank that failed; `EquivalenceError` if ranks wait for each other in vain.
        """
        results: list[Any] = [None] * self.mesh.world_size
        errors: dict[int, BaseException] = {}

        def run(rank: int) -> None:
            try:
                # A GPU's backward stays in its rank's thread.
                with as_rank(rank), torch.autograd.set_multithreading_enabled(False):
                    results[rank] = body(rank)
            except BaseException as error:
                errors[rank] = error
                for group in self._groups.values():
                    group.abort()

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.mesh.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            cause = next((e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)), None)
            waiting = {r: str(e) for r, e in errors.items()}
            raise cause or EquivalenceError(f"ranks wait for each other in vain: {waiting}")
        return results


def _copying(name: str) -> str:
    """The name under which a group is also known, as that which copies for it."""
    return f"{name}-copies"


def _forget(names: list[str]) -> None:
    for name in names:
        compat.unregister_group(name)


class ThreadRuntime(FunctionalRuntime):
    """One rank's `Runtime`."""

    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank = threads, rank

    def size(self, axes: Axes) -> int:
        return self.threads.mesh.size(*axes)

    def index(self, axes: Axes) -> int:
        return self.threads.mesh.index(self.rank, axes)

    def name(self, axes: Axes) -> str:
        return self.threads.name(axes)


class _Started(dist.Work):
    """A collective under way, as long as it can be: what it makes is there when it is waited for and not before, and until then
    its operands may be read. A program that reads results or overwrites operands too early, which on a GPU would go wrong
    now and then, goes wrong always.
    """

    def __init__(self, what: str, operands: Sequence[Tensor], results: Sequence[Tensor], made: Sequence[Tensor]):
        super().__init__()
        self.what, self.results, self.made = what, results, made
        for result in results:
            _spoil(result)
        self.kept = [(x, _bytes(x)) for x in (*operands, *results)]
        self.done = False

    def wait(self, timeout: Any = None) -> bool:
        if not self.done:
            self.done = True
            if not all(torch.equal(_bytes(x), before) for x, before in self.kept):
                raise EquivalenceError(f"between the start of a collective and its wait its tensors were written: {self.what}")
            for result, made in zip(self.results, self.made, strict=True):
                result.copy_(made)
        return True


def _is_dense(t: Tensor) -> bool:
    """Whether its elements lie side by side, in any order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and t.numel() and stride != expected:
            return False
        expected *= size
    return True


def _spoil(t: Tensor) -> None:
    """Values that nothing should depend on."""
    t.fill_(float("nan") if t.is_floating_point() or t.is_complex() else 85)


def _bytes(t: Tensor) -> Tensor:
    """A copy of what a tensor holds, NaNs and all."""
    return t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


class _Meeting:
    """Where the threads of one group exchange tensors."""

    def __init__(self, ranks: list[int]):
        self.ranks = ranks
        self.barrier = threading.Barrier(len(ranks))
        self.entries: list[tuple[str, list[Tensor]]] = [("", [])] * len(ranks)


class ThreadGroup(dist.ProcessGroup):
    """The groups over some axes of a mesh, as one: each thread communicates with those of its own."""

    def __init__(self, groups: Sequence[Sequence[int]], axes: Axes):
        super().__init__(0, len(groups[0]))  # type: ignore[call-arg]
        self.registered = f"fxpar-threads{next(_count)}-{'-'.join(axes)}"
        self._meetings = {rank: meeting for group in groups for meeting in [_Meeting(list(group))] for rank in group}

    def rank(self) -> int:
        """This thread's number within its group; 0 in a thread of no rank, as that of a compiler that describes the group."""
        rank = getattr(_current, "rank", None)
        return 0 if rank is None else self._meetings[rank].ranks.index(rank)

    def abort(self) -> None:
        """Whoever waits, or ever will, fails at once."""
        for meeting in self._meetings.values():
            meeting.barrier.abort()

    def _exchange(self, what: str, mine: Sequence[Tensor], to: Sequence[Tensor],
                  combine: Callable[[int, list[list[Tensor]], int], Tensor], alike: bool = True) -> dist.Work:
        """to[i] becomes ``combine(i, everyone's mine, my index)``. alike: ranks give tensors of the same shapes."""
        meeting = self._meetings[_current.rank]
        index = meeting.ranks.index(_current.rank)
        if not all(_is_dense(x) for x in (*mine, *to)):
            raise EquivalenceError(f"{what} of tensors with gaps, or whose elements overlap, which NCCL refuses: "
                                   f"{[(list(x.shape), x.stride()) for x in (*mine, *to)]}")
        text = f"{what} of {[(str(x.dtype)[6:], list(x.shape) if alike else '...') for x in mine]} over {self.registered}"
        meeting.entries[index] = text, list(mine)
        _wait(meeting.barrier, text)
        entries = list(meeting.entries)
        different = next((i for i, (other, _) in enumerate(entries) if other != text), None)
        made = [] if different is not None else [
            combine(i, [tensors for _, tensors in entries], index) for i in range(len(to))]
        if len(entries) == 1:
            made = [x.clone() for x in made]  # what combines one tensor may return it
        _wait(meeting.barrier, text)
        if different is not None:
            raise EquivalenceError(f"ranks issue different collectives: rank {_current.rank} {text}; rank "
                                   f"{meeting.ranks[different]} {entries[different][0]}")
        return _Started(text, [x for x in mine if not any(x is y for y in to)], to, made)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        largest = options is not None and options.reduceOp == dist.ReduceOp.MAX
        combine = torch.maximum if largest else torch.add
        return self._exchange("all_reduce max" if largest else "all_reduce", tensors, tensors,
                              lambda i, given, me: functools.reduce(combine, [xs[i] for xs in given]))

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        return self.allreduce(tensors, options)

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        return self._exchange("all_gather", inputs, outputs,
                              lambda i, given, me: torch.cat([xs[i] for xs in given]).view(outputs[i].shape))

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        def combine(i: int, given: list[list[Tensor]], me: int) -> Tensor:
            return functools.reduce(torch.add, [xs[i].view(len(given), -1)[me] for xs in given]).view(outputs[i].shape)

        return self._exchange("reduce_scatter", inputs, outputs, combine)

    def alltoall_base(self, output: Tensor, given: Tensor, out_splits: list[int], in_splits: list[int],
                      _: Any = None) -> dist.Work:
        if {*out_splits, *in_splits} - {1}:  # of parts by rank, of which functional collectives have one each
            received = output.split(out_splits)

            def part(i: int, everyones: list[list[Tensor]], me: int) -> Tensor:
                sent = everyones[i][me]
                if sent.shape != received[i].shape:
                    raise EquivalenceError(f"rank {me} of {self.registered} expects {list(received[i].shape)} of rank {i}, which "
                                           f"sends {list(sent.shape)}")
                return sent.clone()

            return self._exchange("all_to_all of parts", given.split(in_splits), received, part, alike=False)
        return self._exchange("all_to_all", [given], [output],
                              lambda i, everyones, me: torch.cat([x.chunk(len(everyones))[me] for x, in everyones]))

    def getBackendName(self) -> str:
        return "fxpar-threads"


def _wait(barrier: threading.Barrier, text: str) -> None:
    try:
        barrier.wait(TIMEOUT)
    except threading.BrokenBarrierError as error:
        raise threading.BrokenBarrierError(f"rank {_current.rank} waits in {text}") from error
