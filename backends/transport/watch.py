"""watch: signs of life, so that nobody waits for ever for a rank that fails, ends, or calls something else.

Every process tells the store that the processes met at what it is doing, about once a second and from a thread of its own: in
which call of the library it is or was last, since when, and at which line of the user's program. A rank that compiles, saves or
loads says so. The thread of a rank that waits in a call, or in a backward pass, looks at what the others say:

    ==============================================  =========================================================
    another rank                                    what comes of it
    ==============================================  =========================================================
    is in the same call                             nothing: it is slow, or both wait for a third
    is busy, or entered or left a call lately       nothing yet
    did neither for as long as `timeout`            the end: who called what, and who did not
    says nothing any more, or has ended             the end
    failed in this call, and this rank did not      the end, with that rank's error
    says nothing, while this one waits and works    the end (ranks that write a checkpoint together)
    ==============================================  =========================================================

*The end* is one text in the store, that of the first rank that comes to it. All ranks find it, and each cuts its process groups:
who waits in one is woken by an error, in the place of which that text is raised. Communication over NCCL holds up no rank, but
its GPU: there the kernels end, and the error is raised by this call, or the next one.

A call costs two attributes that are set; all else happens in the thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fxpar import compat
from fxpar.errors import FxparError, MismatchError

TIMEOUT = 60.0
"""Seconds without a sign of life of a rank that others wait for, unless `fxpar.parallelize` is told otherwise."""
INTERVAL = 1.0
"""Seconds between two signs of life; longer where many ranks share one store, shorter than a tenth of the timeout."""
SILENT = 0.75
"""The part of the timeout for which a rank that is gone says nothing at all: others' threads may have to wait for Python."""
PATIENCE = 3.0
"""Seconds that a rank whose communication broke waits for the reason."""
_BROKEN = ("gloo/", "NCCL", "pair closure", "onnection closed", "onnection reset", "Broken pipe")
"""What errors of communication say of themselves that have no class of their own."""
LOST = 3
"""Looks in vain at the store, after which it is gone."""
CALL = "call"
"""What a rank is in that was called; others are in a backward pass, or in what waits as a call does."""
MOST = 256
"""Backward passes that are remembered one by one until a call compares them."""
NOBODY_SENDS = 7_654_321
"""A tag of messages."""
_NOT_USERS = tuple(str(Path(p)) + "/" for p in (
    Path(__file__).parents[2], Path(str(torch.__file__)).parent, sysconfig.get_paths()["stdlib"])) + ("<",)
_LIBRARIES = sysconfig.get_paths()["purelib"] + "/"

_log = logging.getLogger("fxpar")


class Watch:
    """Of one process, over one world of processes; made on all of them, in the same order.

    number: which one this is. calls, name: how many calls of the library were begun, and the last one. failures: calls that ended
    in an error. failure: the text of the end.
    """

    def __init__(self, number: int, timeout: float = TIMEOUT):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.timeout = timeout
        self.calls, self.name, self.failures = 0, "", 0
        self.since: list[str] = []
        """What was noted since ranks compared last."""
        self.backwards: list[tuple[str, int]] = []
        """To the outputs of which modules backward passes came since then, and of which of their calls."""
        self.failure: str | None = None
        self._depth, self._events, self._beat, self._failed, self._known, self._backward = 0, 0, 0, -1, -1, False
        self._waits = ""
        self._busy: list[tuple[str, bool]] = []
        self._thread = threading.get_ident()
        self.prefix = f"fxpar/{number}"
        self._process_group, self._store = dist.group.WORLD, compat.default_store()
        self._seen, self._changed = -1, time.monotonic()
        self._spoke: set[int] = set()
        self._others: dict[int, tuple[int, float]] = {}
        self._judged, self._lost, self._asked = 0.0, 0, 0.0
        stop, mine = threading.Event(), weakref.ref(self)
        looking = threading.Thread(target=_run, args=(mine, stop, Watch.look), name="fxpar watch", daemon=True)
        looking.start()
        threading.Thread(target=_run, args=(mine, stop, Watch.heard), name="fxpar store", daemon=True).start()
        atexit.register(_at_exit, mine, looking, stop)

    # ---- what the program does, from its own thread ----

    def call(self, name: str) -> _WatchedCall:
        """Around a call of the library. Raises: `FxparError` in place of an error that another rank is the cause of."""
        return _WatchedCall(self, name)

    @contextlib.contextmanager
    def busy(self, what: str, together: bool = False) -> Iterator[None]:
        """Around what takes one rank long, while others wait for it. together: this rank waits for them in it, too."""
        self._busy.append((what, together))
        self._events += 1
        try:
            yield
        finally:
            self._busy.pop()
            self._events += 1

    def waits(self, what: str) -> _WatchedWait:
        """Around what waits for others as a call of the library does, and is none: one rank alone may do it where it waits for
        nobody."""
        return _WatchedWait(self, what)

    def note(self, what: str) -> None:
        """Something was called that ranks compare along with the next call."""
        self.since.append(what)

    def taken(self) -> list[str]:
        """What was noted, to be compared now."""
        since, self.since = self.since, []
        return since

    def taken_backwards(self) -> list[tuple[str, int]]:
        """The backward passes, to be compared now."""
        backwards, self.backwards = self.backwards, []
        return backwards

    def backward_begins(self, module: str, call: int, *_: Any) -> None:
        """A backward pass came to what a module returned in one of its calls."""
        if len(self.backwards) < MOST:
            self.backwards.append((module, call))
        self._backward = True
        self._events += 1

    def alive(self) -> None:
        """A sign of life in the middle of a long call."""
        self._events += 1

    def all_know(self) -> None:
        """The error that the current call is about to raise is one on all ranks."""
        self._known = self.calls

    # ---- how a run ends ----

    def end(self, text: str) -> None:
        """It cannot go on, on any rank. The text of the rank that was first is that of all."""
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may have ended
            self._store.compare_set(f"{self.prefix}/end", "", json.dumps([self.rank, text]))
        if not self._found_end():
            self.failure = text
        self.cut()

    def failed(self, error: BaseException) -> None:
        """This rank alone, as far as it knows, failed in the current call: others may wait for it."""
        with contextlib.suppress(RuntimeError):
            text = json.dumps([self.rank, f"{type(error).__name__}: {error}"])
            self._store.compare_set(f"{self.prefix}/failed/{self.calls}", "", text)

    def fail_all(self, error: BaseException) -> None:
        """As `failed`, where other ranks can do nothing but wait for this one: the end, with its error."""
        if self.failure is None and not is_broken(error):
            self._known = self.calls
            self.end(_ended_by(self.rank, self.name, f"{type(error).__name__}: {error}"))

    def cut(self) -> None:
        """End this rank's communication: whoever waits for it gets an error, here and on other ranks."""
        for group in compat.process_groups():
            _cut(group)

    def raise_end(self, cause: BaseException | None = None) -> None:
        if self.failure is not None:
            raise FxparError(self.failure) from cause

    def reason(self, error: BaseException) -> FxparError:
        """What is to be raised where communication broke: why it did."""
        if self.failure is not None:
            return FxparError(self.failure)
        begin, before = time.monotonic(), self._read()
        until = begin + max(PATIENCE, 2.5 * self.interval)
        while time.monotonic() < until and not self._found_end() and not self._found_failure():
            time.sleep(0.05)
        if self.failure is None:
            after = self._read()
            others = [r for r in after if r != self.rank]
            silent = [r for r in others if after[r].get("ended") or after[r].get("beat") == before[r].get("beat")]
            for state in (after[r] for r in silent if after[r]):
                state["silent"] = 0 if state["ended"] else time.monotonic() - begin
            self.end(f"communication broke in {self.name} on rank {self.rank} ({_first_line(error)}); "
                     f"{self._told(after, silent or others)}")
        return FxparError(self.failure)

    # ---- the thread ----

    @property
    def interval(self) -> float:
        return max(min(INTERVAL, self.timeout / 10), self.world / 256)

    def look(self) -> bool:
        """One look: say what this rank does, and see what others do. Returns whether to look again."""
        now = time.monotonic()
        if self._events != self._seen:
            self._seen, self._changed = self._events, now
        state = self.state()
        try:
            self._asked = now
            self._say(state)
            if self._found_end() or self._found_failure(patient=bool(state["in"])):
                _log.error("%s", self.failure)
                self.cut()
                return False
            waits = state["in"] and all(together for _, together in self._busy) and \
                now - self._changed > self.timeout * (1 - SILENT)
            if waits and now - self._judged >= self.timeout / 10:  # all read what all say: not too often
                self._judged = now
                self._judge(state)
            self._lost = 0
        except RuntimeError:  # the process that keeps the store has ended, or this one's process group has
            self._lost += 1
            if self._lost == LOST and state["in"]:
                self.end("the store that the processes met at is gone, and with it rank 0, or torchrun")
        self._asked = 0.0
        return self._lost < LOST and dist.is_initialized() and dist.group.WORLD is self._process_group

    def heard(self) -> bool:
        """Whether the store still answers, as far as this rank waits for anyone; a host that froze neither answers nor hangs up.
        If it does not: the end, of which no rank can tell another."""
        asked, now = self._asked, time.monotonic()
        if self.failure is None and asked and now - asked > self.timeout and self.state()["in"]:
            self.failure = (f"the store that the processes met at has not answered for {now - asked:.0f} s: rank 0, torchrun or "
                            f"their host is stopped, or gone, and rank {self.rank} waits in {_what(self.state())}")
            _log.error("%s", self.failure)
            self.cut()
        return self.failure is None

    def state(self) -> dict[str, Any]:
        backward, where = _position(self._thread)
        kind = CALL if self._depth else self._waits or ("the backward" if self._backward and backward else "")
        age = 0 if self._busy else time.monotonic() - self._changed
        return {"call": self.calls, "name": self.name, "in": kind, "busy": self._busy[-1][0] if self._busy else "",
                "age": age, "beat": self._beat, "where": where, "ended": False}

    def _say(self, state: dict[str, Any]) -> None:
        self._beat += 1
        self._store.set(f"{self.prefix}/rank/{self.rank}", json.dumps(state))

    def _read(self) -> dict[int, dict[str, Any]]:
        """What ranks said last; nothing of those that have said nothing."""
        keys = {rank: f"{self.prefix}/rank/{rank}" for rank in range(self.world)}
        found: dict[int, dict[str, Any]] = {rank: {} for rank in keys}
        with contextlib.suppress(RuntimeError):
            self._spoke |= {rank for rank in keys if rank not in self._spoke and self._store.check([keys[rank]])}
            said = sorted(self._spoke)
            found |= dict(zip(said, map(json.loads, self._store.multi_get([keys[rank] for rank in said])), strict=True))
        return found

    def _found_end(self) -> bool:
        with contextlib.suppress(RuntimeError):
            key = f"{self.prefix}/end"
            if self.failure is None and self._store.check([key]):
                self.failure = json.loads(self._store.get(key))[1]
        return self.failure is not None

    def _found_failure(self, patient: bool = False) -> bool:
        """Whether another rank failed in the call that this one is in, or got through. patient: it may be about to fail, too."""
        number, name, waited = self.calls, self.name, time.monotonic() - self._changed
        if self._failed == number or (patient and waited < (self.timeout if self._busy else 2 * self.interval)):
            return False
        with contextlib.suppress(RuntimeError):
            key = f"{self.prefix}/failed/{number}"
            if self._store.check([key]):
                rank, text = json.loads(self._store.get(key))
                if rank != self.rank and self._failed != number:
                    self.end(_ended_by(rank, name, text))
        return self.failure is not None

    def _judge(self, mine: dict[str, Any]) -> None:
        """This rank has waited for long: whether it is for one that does not come."""
        now, missing = time.monotonic(), []
        found = self._read()
        for rank, state in found.items():
            if rank == self.rank:
                continue
            beat, first = self._others.get(rank, (None, now))
            if beat != state.get("beat"):
                first = now
            self._others[rank] = state.get("beat", -1), first
            alike = state and all(state[key] == mine[key] for key in ("in", "call", "name"))
            silent = not state or state["ended"] or now - first > self.timeout * SILENT
            if silent or (not alike and not state["busy"] and state["age"] >= self.timeout):
                missing.append(rank)
            if state:
                state["silent"] = now - first if silent and not state["ended"] else 0
        if missing and (waited := now - self._changed) >= self.timeout and self._seen == self._events:
            self.end(f"rank {self.rank} has waited for {waited:.0f} s in {_what(mine)}, and not all others came: "
                     f"{self._told(found, missing)}. Every rank must make the same calls in the same order; where one may take "
                     f"longer by itself, give fxpar.parallelize a longer timeout than {self.timeout:g} s")
            _log.error("%s", self.failure)

    @staticmethod
    def _told(found: dict[int, dict[str, Any]], ranks: list[int]) -> str:
        told = [_said(rank, found[rank]) for rank in ranks[:4]]
        return "; ".join(told) + (f"; and {len(ranks) - 4} more ranks" if len(ranks) > 4 else "")


class _WatchedCall:
    """The context of one call."""

    __slots__ = ("name", "watch")

    def __init__(self, watch: Watch, name: str):
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        watch = self.watch
        if watch.failure is not None:
            watch.raise_end()
        if not watch._depth:
            watch.calls += 1
            watch.name, watch._backward, watch._thread = self.name, False, threading.get_ident()
        watch._depth += 1
        watch._events += 1

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        watch = self.watch
        if error is not None and watch._depth == 1:
            watch.failures += 1
            watch._failed = watch.calls
        watch._depth -= 1
        watch._events += 1
        if watch._depth:
            return
        if watch.failure is not None:
            if error is None or watch._known != watch.calls:
                watch.raise_end(error)
        elif error is not None and is_broken(error):
            raise watch.reason(error) from error
        elif error is not None and watch._known != watch.calls and not isinstance(error, MismatchError):
            watch.failed(error)


class _WatchedWait:
    """The context of what waits, and is no call."""

    __slots__ = ("before", "watch", "what")

    def __init__(self, watch: Watch, what: str):
        self.watch, self.what, self.before = watch, what, ""

    def __enter__(self) -> None:
        watch = self.watch
        self.before, watch._waits = watch._waits, self.what
        watch._events += 1

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        watch = self.watch
        watch._waits = self.before
        watch._events += 1
        if error is not None and not watch._depth and is_broken(error):
            raise watch.reason(error) from error


class NoWatch:
    """Of a process that is alone."""

    timeout, calls, failures, failure = TIMEOUT, 0, 0, None

    def call(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def busy(self, what: str, together: bool = False) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def waits(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def note(self, what: str) -> None:
        pass

    def taken(self) -> list[str]:
        return []

    def taken_backwards(self) -> list[tuple[str, int]]:
        return []

    def backward_begins(self, module: str, call: int, *_: Any) -> None:
        pass

    def alive(self) -> None:
        pass

    def all_know(self) -> None:
        pass

    def end(self, text: str) -> None:
        pass

    def fail_all(self, error: BaseException) -> None:
        pass

    def raise_end(self, cause: BaseException | None = None) -> None:
        pass


def is_broken(error: BaseException) -> bool:
    """Whether an error is one of communication, as a backend of PyTorch raises it."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and any(sign in str(error) for sign in _BROKEN))


def _ended_by(rank: int, name: str, text: str) -> str:
    return (f"rank {rank} failed in the middle of {name}, which ended it on all ranks: {text}; their communication is cut: "
            "start the processes again, from a checkpoint")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _what(state: dict[str, Any]) -> str:
    what = state["name"] if state["in"] == CALL else f"{state['in']} after {state['name']}"
    return f"{what} (its call {state['call']}{', at ' + state['where'] if state['where'] else ''})"


def _said(rank: int, state: dict[str, Any]) -> str:
    if not state:
        return f"rank {rank} has not called the library"
    if state["ended"]:
        return f"rank {rank} has ended, after {state['name']} (its call {state['call']})"
    if state.get("silent"):
        last = f"in {_what(state)}" if state["in"] else f"behind {state['name']} (its call {state['call']})"
        return (f"rank {rank} has given no sign of life for {state['silent']:.0f} s (killed, stopped, or its host is gone), and "
                f"was {last if state['name'] else 'before its first call'} when it did last")
    if state["in"]:
        return f"rank {rank} is in {_what(state)} since {state['age']:.0f} s"
    if not state["name"]:
        return f"rank {rank} has called nothing of the library{', it is at ' + state['where'] if state['where'] else ''}"
    return (f"rank {rank} left {state['name']} (its call {state['call']}) {state['age']:.0f} s ago and called nothing since"
            f"{', it is at ' + state['where'] if state['where'] else ''}")


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread is in a backward pass, and at which line of the user's program."""
    frame: FrameType | None = sys._current_frames().get(thread)
    backward, where, library = False, "", ""
    while frame is not None:
        file = frame.f_code.co_filename
        backward = backward or file == torch.autograd.__file__
        if file.startswith(_LIBRARIES) and not file.startswith(_NOT_USERS[:2]):
            library = library or f"{file}:{frame.f_lineno}"
        elif not file.startswith(_NOT_USERS):
            where = where or f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return backward, where or library


def _cut(group: dist.ProcessGroup) -> None:
    if group.size() == 1:
        return
    with contextlib.suppress(RuntimeError):  # it is cut already
        if "nccl" in dist.get_backend(group):
            group.abort()
    with contextlib.suppress(RuntimeError):
        if "gloo" in dist.get_backend(group):
            # gloo cannot abort; a receive that ends before anything came closes all connections of its group
            work: Any = dist.irecv(torch.empty(1), group=group, group_src=(group.rank() + 1) % group.size(), tag=NOBODY_SENDS)
            work.wait(timedelta(milliseconds=1))


def _run(watch: weakref.ref[Watch], stop: threading.Event, look: Callable[[Watch], bool]) -> None:
    """A thread: it lives as long as the watch, or the process group."""
    while True:
        mine = watch()
        if mine is None or not look(mine):
            return
        interval = mine.interval
        del mine
        if stop.wait(interval):
            return


def _at_exit(watch: weakref.ref[Watch], looking: threading.Thread, stop: threading.Event) -> None:
    """Say that the process ends; and have the thread end before Python does, which ends none that is in PyTorch's code."""
    stop.set()
    looking.join(PATIENCE)
    mine = watch()
    if mine is not None and mine.failure is None:
        with contextlib.suppress(RuntimeError):
            mine._say({**mine.state(), "in": "", "ended": True})
