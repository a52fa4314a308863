"""control: the side channel on which ranks agree before they communicate, so that a mistake is an error and no hang."""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fxpar import compat
from fxpar.backends.transport.watch import NoWatch, Watch, is_broken
from fxpar.errors import FxparError, MismatchError

T = TypeVar("T")
LEAST = -(2**63)
"""An int64 that is larger than no other."""
TOGETHER = "what all have to do"
FAILED = 1
"""What a rank compares that failed before it could compare anything."""
LONG = timedelta(days=30)
"""How long a side channel waits by itself: whether ranks still come is for the `Watch` to say."""

_numbers = itertools.count()


def digest(text: str) -> int:
    """A 62-bit fingerprint."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


Outcome = list[int | None] | None
"""Of a check: see `Control.compare_parts`."""


class Check(NamedTuple):
    """A number that ranks of one slot, of `slots`, should have in common. number: 0 to 2^62 - 1; None: it is not known yet."""

    slot: int
    slots: int
    number: int | None


@dataclass
class _World:
    """What the controls of one world of processes share."""

    process_group: dist.ProcessGroup
    watch: Watch | NoWatch
    group: dist.ProcessGroup | None = None
    modules: int = 0


_worlds: list[_World] = []
"""That of this process; a new one where the process group is another one."""


def watch(timeout: float | None = None) -> Watch | NoWatch:
    """The `Watch` of this process, made by the first call. timeout: from now on, of all modules."""
    assert dist.group.WORLD is not None
    if not _worlds or _worlds[0].process_group is not dist.group.WORLD:
        number, alone = next(_numbers), dist.get_world_size() == 1 or dist.get_backend() == "fake"
        _worlds[:] = [_World(dist.group.WORLD, NoWatch() if alone else Watch(number))]
    made = _worlds[0].watch
    if timeout is not None and isinstance(made, Watch):
        made.timeout = timeout
    return made


class _Told:
    """Inside, an error of communication becomes the one that says why it broke."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and is_broken(error) and _worlds and isinstance(_worlds[0].watch, Watch):
            raise _worlds[0].watch.reason(error) from error


told = _Told()


class Control:
    """A gloo side channel over all ranks. All modules share one, so that whatever ranks call they compare in one order.

    kinds: of ranks, see `BoundMesh`. kind, rank, world: this rank's kind; its number among all ranks, and how many there are.
    apart: have a channel of its own, for another thread.
    """

    def __init__(self, kinds: int = 1, apart: bool = False) -> None:
        self.world, self.rank, self.kinds = dist.get_world_size(), dist.get_rank(), kinds
        self.kind = self.kind_of(self.rank)
        self.watch: Watch | NoWatch = NoWatch() if apart else watch()
        self.group: dist.ProcessGroup | None = None
        if self.world > 1:
            self.group = dist.new_group(backend="gloo", timeout=LONG) if apart else self._shared()
        self._largest = dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)

    def _shared(self) -> dist.ProcessGroup:
        world = _worlds[0]
        if world.group is None:
            self._await_all()
            world.group = dist.new_group(backend="gloo", timeout=LONG)
        return world.group

    def _await_all(self) -> None:
        """Until every rank has come here: what makes a group waits for them without end."""
        if isinstance(self.watch, NoWatch):
            return
        store, key, pause = compat.default_store(), f"{self.watch.prefix}/here", 0.005
        store.add(key, 1)
        while store.add(key, 0) < self.world:
            self.watch.raise_end()
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def kind_of(self, rank: int) -> int:
        """The kind of a rank, by its number among all ranks."""
        return rank // (self.world // self.kinds)

    def name_of_module(self, kind: str) -> str:
        """What one more module of this process is called, on ranks that make their modules in the same order alike."""
        number = 1
        if _worlds:
            number = _worlds[0].modules = _worlds[0].modules + 1
        return kind if number == 1 else f"{kind} (module {number})"

    # ---- comparing ----

    def compare(self, number: int) -> Callable[[], bool]:
        """Start one small CPU all-reduce, of the same size wherever ranks are. What is returned waits for it, and says whether
        every rank has the same `number` (63 bits)."""
        return self._largest_of(array("q", (number, -number)), lambda pairs: pairs[0] == -pairs[1])

    def compare_parts(self, of_kind: int, checks: Sequence[Check] = ()) -> tuple[tuple[int, ...] | None, list[Outcome]]:
        """For ranks that make the same call, as `compare` found. The numbers of all kinds, in order, or None if ranks of a kind
        differ; and of every check the numbers of its slots, None for one whose ranks differ, or None if it was too early."""
        pairs = array("q")
        for kind in range(self.kinds):
            pairs.extend((of_kind, -of_kind) if kind == self.kind else (LEAST, LEAST))
        for check in checks:
            pairs.extend((int(check.number is None), 0))
            for slot in range(check.slots):
                known = check.number is not None and slot == check.slot
                pairs.extend((check.number, -check.number) if known else (LEAST, LEAST))  # type: ignore[arg-type, operator]
        found = self._largest_of(pairs, lambda pairs: [
            a if a == -b else None for a, b in zip(pairs[::2], pairs[1::2], strict=True)])()
        kinds, at = found[: self.kinds], self.kinds
        outcomes: list[Outcome] = []
        for check in checks:
            late, slots = pairs[2 * at], found[at + 1 : at + 1 + check.slots]
            outcomes.append(None if late else slots)
            at += 1 + check.slots
        return (None if None in kinds else tuple(n for n in kinds if n is not None)), outcomes

    def _largest_of(self, numbers: array, found: Callable[[array], T]) -> Callable[[], T]:
        if self.group is None:
            return lambda: found(numbers)
        tensor = torch.frombuffer(numbers, dtype=torch.int64)
        work = self.group.allreduce([tensor], self._largest)  # as dist.all_reduce, without half of the time it takes to start

        def wait() -> T:
            with told:
                work.wait()
            return found(numbers)

        return wait

    def longest(self, call: str, lengths: Mapping[str, int]) -> dict[str, int]:
        """The largest length of all ranks under each name. Raises: `MismatchError` on every rank unless all give the same names,
        for the same call."""
        if self.group is None:
            return dict(lengths)
        if not self.compare(digest(repr((call, *lengths))))():
            everyone = self.exchange_of(call, list(lengths))
            other = next(rank for rank, names in enumerate(everyone) if names != everyone[0])
            raise MismatchError(f"ranks call {call} with other sequences to pad: rank 0 with {everyone[0]}, rank {other} with "
                                f"{everyone[other]}; every rank must be given the same inputs")
        return dict(zip(lengths, self._largest_of(array("q", lengths.values()), list)(), strict=True)) if lengths else {}

    def exchange(self, thing: object) -> list:
        """Every rank's `thing`, by rank. Raises: `FxparError` on every rank if one failed, and said so instead (`fail`)."""
        return self._exchange((thing, None))

    def _exchange(self, thing: tuple[object, str | None]) -> list:
        if self.group is None:
            return [thing[0]]
        out: list = [None] * self.world
        with told:
            dist.all_gather_object(out, thing, group=self.group)
        failed = next((rank for rank, (_, text) in enumerate(out) if text is not None), None)
        if failed is not None:
            self.watch.all_know()
            if thing[1] is None:
                raise FxparError(f"rank {failed} could not take part, and so no rank can: {out[failed][1]}")
        return [given for given, _ in out]

    def fail(self, error: BaseException) -> None:
        """In the place of `compare`, and of the exchange that follows where it found a difference: this rank failed. To be
        followed by raising that error."""
        if self.group is not None:
            self.watch.taken()
            self.compare(FAILED)()
            self._exchange((None, f"{type(error).__name__}: {error}"))

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns. If it fails on any rank, all raise: its own error here, `FxparError` elsewhere."""
        try:
            made = function()
        except Exception as error:
            self.fail(error)
            raise
        if not self.compare(digest(TOGETHER))():
            self.exchange_of(TOGETHER, None)
        return made

    def agree(self, call: str, given: Mapping[str, Any]) -> None:
        """Raises `MismatchError` on every rank unless all make this call, and give it the same (by its repr)."""
        if self.group is None:
            return
        given = {**given, "how many calls failed before": self.watch.failures, "the backward passes before":
                 self.watch.taken_backwards(), "what was called before": self.watch.taken()}
        if self.compare(digest(repr((call, given))))():
            return
        everyone = self.exchange_of(call, {name: repr(value) for name, value in given.items()})
        for name in dict.fromkeys(name for theirs in everyone for name in theirs):
            values = [theirs.get(name, "nothing") for theirs in everyone]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                raise MismatchError(f"ranks call {call} differently in {name}: rank 0 with {values[0]}, rank {other} with "
                                    f"{values[other]}: every rank must be given the same")
        raise AssertionError("ranks differ in nothing")

    def exchange_of(self, call: str, thing: object) -> list:
        """`exchange` where `compare` found a difference. Raises: `MismatchError` on every rank if ranks make different calls."""
        everyone = self.exchange((call, thing))
        calls = [made for made, _ in everyone]
        other = next((rank for rank, made in enumerate(calls) if made != calls[0]), None)
        if other is not None:
            raise MismatchError(f"ranks call different things: rank 0 {calls[0]}, rank {other} {calls[other]}; every rank must "
                                "make the same calls in the same order")
        return [given for _, given in everyone]
