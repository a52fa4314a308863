"""progress: long work says what it is.

``with stage("compiling 2 of 5"):`` is put around what may take long. A stage that runs for more than two seconds is announced,
and told again with its seconds when it ends: on the logger "fxpar" of every rank; and by rank 0 on standard error, as a line that
moves where that is a terminal, else as plain lines, unless the program's own logging shows the logger's messages, or it is to be
quiet (`be_quiet`). What is shorter says nothing, but at level DEBUG of the logger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ENVIRONMENT = "FXPAR_QUIET"
"""A variable of the environment: if it is set, and neither empty nor 0, nothing is written to standard error."""
PATIENCE, EVERY = 2.0, 0.25
"""Seconds of silence that a stage is allowed; and after which it is looked at again."""

log = logging.getLogger("fxpar")


@dataclass(eq=False)
class _Running:
    """A stage under way. said: whether it was announced."""

    text: str
    start: float
    thread: int = field(default_factory=threading.get_ident)
    said: bool = False


class _Watcher:
    """The stages that run in this process, and a thread that looks at them while there are any."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: list[_Running] = []
        self.quiet: bool | None = None
        self._wake: threading.Event | None = None
        self._line: Any = None

    def begin(self, text: str) -> _Running:
        made = _Running(text, time.perf_counter())
        with self.lock:
            self.running.append(made)
            if self._wake is None:
                self._wake = threading.Event()
                threading.Thread(target=self._look, args=(self._wake,), name="fxpar progress", daemon=True).start()
        return made

    def end(self, stage: _Running, failed: bool) -> None:
        with self.lock:
            self.running.remove(stage)
            if not self.running and self._wake is not None:
                self._wake.set()
                self._wake = None
                self._hide()
            seconds = time.perf_counter() - stage.start
            text = f"{stage.text}: {'failed after ' if failed else ''}{_told(seconds)}"
            if stage.said:
                self._say(text)
            else:
                log.debug(text)

    def _look(self, wake: threading.Event) -> None:
        while not wake.wait(EVERY):
            with self.lock:
                if wake.is_set() or not self.running:
                    return
                now = time.perf_counter()
                told = {s.text for s in self.running if s.said}
                for stage in self.running:
                    if not stage.said and now - stage.start > PATIENCE and stage.text not in told:
                        stage.said = True
                        told.add(stage.text)
                        self._say(f"{stage.text} ...", moving=True)
                self._show(now)

    def _say(self, text: str, moving: bool = False) -> None:
        """moving: the line that moves says it, too."""
        log.info(text)
        if not self._shows():
            return
        if self._line is not None:
            self._line.console.print(f"fxpar: {text}", style="dim", highlight=False, markup=False)
        elif not (moving and sys.stderr.isatty()):
            print(f"fxpar: {text}", file=sys.stderr, flush=True)

    def _show(self, now: float) -> None:
        """Draw the line that moves: the stages of the thread that began one last, outermost first."""
        newest = self.running[-1]
        chain = [s for s in self.running if s.thread == newest.thread]
        if not any(s.said for s in chain) or not sys.stderr.isatty() or not self._shows():
            return
        text = " > ".join(s.text for s in chain) + f"  {now - chain[0].start:.0f} s"
        if self._line is None:
            from rich.console import Console
            from rich.status import Status

            self._line = Status("", console=Console(stderr=True), spinner="dots")
            self._line.start()
        self._line.update(f"[bold]fxpar[/] {_escaped(text)}")

    def _hide(self) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = None

    def _shows(self) -> bool:
        quiet = os.environ.get(ENVIRONMENT, "0") not in ("", "0") if self.quiet is None else self.quiet
        return not quiet and _rank() == 0 and not (log.isEnabledFor(logging.INFO) and log.hasHandlers())


_watcher = _Watcher()


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Around what may take long. text: what it is, as in "compiling 2 of 5"; stages may lie within each other."""
    running, failed = _watcher.begin(text), True
    try:
        yield
        failed = False
    finally:
        _watcher.end(running, failed)


def be_quiet(quiet: bool | None) -> None:
    """Whether this process writes to standard error what takes long. None: as the variable `FXPAR_QUIET` of the environment says.
    The logger "fxpar" has the messages in any case."""
    _watcher.quiet = quiet


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))
