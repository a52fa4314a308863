"""start: the first run of a compiled program, which is timed, and said: one line for every new kind of call."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from fxpar import compat
from fxpar.program import Program
from fxpar.report.timings import BACKWARD, FORWARD, LOWERING, LOWERING_BACKWARD, Timings
from fxpar.run import programs

T = TypeVar("T")
_log = logging.getLogger("fxpar")


class Start:
    """The first run of one program, with gradients or without.

    named: what it was first called with. kept: how many programs of this model there are, with this one.
    """

    def __init__(self, program: Program, named: Mapping[str, Any], kept: int):
        self.program, self._kept = program, kept
        self._inputs = ", ".join(f"{path} {str(x.dtype)[6:]} {list(x.shape)}" for path, x in named.items()
                                 if isinstance(x, Tensor))
        self._ran = False
        self._found = 0

    def lower(self, lower: Callable[[Callable[[float], None]], T]) -> T:
        """What ``lower(later)`` returns, timed; ``later(seconds)`` is to be called for what is compiled after that."""
        before, begin = compat.cache_counts()["hit"], time.perf_counter()
        made = lower(functools.partial(self._add, LOWERING_BACKWARD))
        self._add(LOWERING, time.perf_counter() - begin)
        self._found = compat.cache_counts()["hit"] - before
        return made

    def run(self, run: Callable[[], T], name: str = FORWARD) -> T:
        """What ``run()`` returns; the first time it is timed and said, as is the backward from it."""
        if self._ran:
            return run()
        self._ran = True
        begin = time.perf_counter()
        made = run()
        self._add(name, time.perf_counter() - begin)
        nodes = [x.grad_fn for x in made if isinstance(x, Tensor) and x.grad_fn is not None] if isinstance(made, Sequence) else []
        handles: list[Any] = []
        handles += [node.register_prehook(functools.partial(self._backward_begins, handles)) for node in dict.fromkeys(nodes)]
        found = " (found on disk)" if self._found else ""
        self._say("a program for %s is ready after %s%s; %d of this model are kept, of at most %d", self._inputs,
                  Timings.of(self.program.timings), found, self._kept, programs.MOST)
        return made

    def _backward_begins(self, handles: list[Any], *_: Any) -> None:
        for handle in handles:
            handle.remove()
        lowered, begin = self.program.timings.get(LOWERING_BACKWARD, 0.0), time.perf_counter()

        def ends() -> None:
            later = self.program.timings.get(LOWERING_BACKWARD, 0.0) - lowered
            self._add(BACKWARD, time.perf_counter() - begin - later)
            self._say("its first backward took %.2f s, and %.2f s to be compiled", self.program.timings[BACKWARD], later)

        compat.after_backward(ends)

    def _add(self, name: str, seconds: float) -> None:
        self.program.timings[name] = self.program.timings.get(name, 0.0) + seconds

    def _say(self, text: str, *values: object) -> None:
        if dist.get_rank() == 0:
            _log.info(text, *values)
