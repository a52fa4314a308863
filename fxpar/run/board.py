"""board: what ranks tell each other when one of them fails in the middle of a step, which the others would wait for.

The rank that fails writes its error to the store that the processes met at, and cuts the groups that it communicates over. A
thread of every rank looks at the store while a call runs, and cuts its groups, too: so whoever waits, for the rank that failed or
for one that waits for it, is woken by an error, in the place of which the first rank's is raised. Communication over NCCL
holds up no rank, but its GPU: there the kernels end, and the error is raised by this call, or the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fxpar import compat
from fxpar.errors import FxparError

INTERVAL = 1.0
"""Seconds between two looks at the store."""
NOBODY_SENDS = 7_654_321
"""A tag of messages."""

_log = logging.getLogger("fxpar")
_numbers = itertools.count()


class Board:
    """Of one module; made on all ranks, in the same order. groups: those over which this rank communicates, as they are now."""

    def __init__(self, groups: Callable[[], Iterable[dist.ProcessGroup]]):
        self.rank, self._groups = dist.get_rank(), groups
        self._key = f"fxpar/failed/{next(_numbers)}"
        self._store = compat.default_store()
        self._called = threading.Event()
        self._failure: tuple[int, str] | None = None
        threading.Thread(target=_watch, args=(weakref.ref(self), self._called), name="fxpar board", daemon=True).start()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around a call. Raises: `FxparError` that names the rank that failed first, and its error, if that is another one."""
        self._raise_failure(None)
        self._called.set()
        try:
            yield
        except Exception as error:
            self.look()
            self._raise_failure(error)
            raise
        finally:
            self._called.clear()
        self._raise_failure(None)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what all ranks have to do together: an error in it is that of all."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RuntimeError):
                text = json.dumps([self.rank, f"{type(error).__name__}: {error}"])
                self._store.compare_set(self._key, "", text)  # the first one stays
            self.look()
            self.cut()
            raise

    def look(self) -> bool:
        """Whether a rank has failed."""
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may have ended
            if self._failure is None and self._store.check([self._key]):
                rank, text = json.loads(self._store.get(self._key))
                self._failure = rank, text
        return self._failure is not None

    def cut(self) -> None:
        """End this rank's communication: whoever waits for it gets an error, here and on other ranks."""
        for group in {id(g): g for g in self._groups()}.values():
            _cut(group)

    def say(self) -> None:
        assert self._failure is not None
        if self._failure[0] != self.rank:
            _log.error(_text(*self._failure))

    def _raise_failure(self, error: Exception | None) -> None:
        if self._failure is not None and (error is None or self._failure[0] != self.rank):
            raise FxparError(_text(*self._failure)) from error


def _text(rank: int, text: str) -> str:
    return (f"rank {rank} failed in the middle of a step, which ended it on all ranks: {text}; their communication is cut: "
            "start the processes again, from a checkpoint")


def _cut(group: dist.ProcessGroup) -> None:
    if group.size() == 1:
        return
    with contextlib.suppress(RuntimeError):  # it is cut already
        if dist.get_backend(group) != "gloo":
            group.abort()
            return
        # gloo cannot abort; a receive that ends before anything came closes all connections of its group
        work: Any = dist.irecv(torch.empty(1), group=group, group_src=(group.rank() + 1) % group.size(), tag=NOBODY_SENDS)
        work.wait(timedelta(milliseconds=1))


def _watch(board: weakref.ref[Board], called: threading.Event) -> None:
    """The thread: it lives as long as the board, and looks while a call runs."""
    pause = threading.Event()
    while True:
        called.wait(60)
        pause.wait(INTERVAL)
        mine = board()
        if mine is None:
            return
        if called.is_set() and mine.look():
            mine.say()
            mine.cut()
            return
        del mine
