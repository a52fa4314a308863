"""repeated: what a rank does by itself in every step, outside of forward and backward, as recordings (CUDA graphs).

Clipping and a capturable optimizer's step start many small kernels over the same memory in step after step: a backward that is
played back leaves its gradients at the same addresses. None of them communicates, so each rank decides by itself. A recording
reads and writes by addresses, so it is played back where all that the code depends on is what it was, addresses and numbers;
where anything else comes, the code runs as it is. Nothing that outlives the code lies in the memory of its recording.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxpar import compat
from fxpar.run.pool import Device, Recording
from fxpar.run.recording import Recordings
from fxpar.run.votes import MORE_MEMORY, PLENTY

EQUAL = 3
"""Equal runs of a code before it is recorded. Once it was recorded in `KEPT` ways, every further one needs twice as many as the
one before, up to `RARELY`."""
RARELY = 64
KEPT = 8
"""Ways that a code is run in, which are remembered, with their recordings: shapes, accumulation, gradients that were moved."""
MOST = 32
"""Recordings that a module has at once: each takes part of a second to make, and there may be an optimizer for each parameter."""

NOT_YET = f"not yet, it is recorded after {EQUAL} equal runs"

Code = Callable[[list[Tensor]], None]
"""What reads and writes the tensors that it is given, and nothing else that may move or change."""
Runner = Callable[[str, Code, list[Tensor]], None]
"""Runs one of the codes of which some work consists, by its name: ``run(name, code, tensors)``."""

_log = logging.getLogger("fxpar")


class StepRecordings:
    """What one rank repeats for one module, and records where that module's forward and backward are recorded.

    clipping: of its gradients. Recordings of an optimizer's steps are gone when it or this is.
    """

    def __init__(self, recordings: Recordings, parameters: Callable[[], Iterable[Tensor]]):
        self._recordings, self.parameters = recordings, parameters
        self._device: Device | None = None
        self.clipping = RepeatedWork(self, "clipping")
        self._made: weakref.WeakSet[Recording] = weakref.WeakSet()
        self._steps: weakref.WeakKeyDictionary[Any, dict[int, RepeatedWork]] = weakref.WeakKeyDictionary()
        _all.add(self)

    def step_of(self, optimizer: Any, group: int) -> RepeatedWork:
        """The steps of one group of an optimizer, by its number."""
        groups = self._steps.setdefault(optimizer, {})
        if group not in groups:
            groups[group] = RepeatedWork(self, f"{type(optimizer).__name__}'s step")
        return groups[group]

    def obstacle(self) -> str | None:
        """Why nothing is to be recorded or played back now."""
        device = self._recordings.device
        if device is None or not self._recordings.are_on():
            return "forward and backward are not played back"
        if compat.dispatch_modes() or compat.has_foreign_modes():
            return "a mode sees what is called"
        if compat.backward_pass() != -1:
            return "it is called by a backward pass"
        return "inference mode" if torch.is_inference_mode_enabled() else device.occupied()

    def has_room(self) -> bool:
        """Whether another recording may be made."""
        return len(self._made) < MOST

    def record(self, code: Code, tensors: list[Tensor]) -> Recording:
        """Raises what `Recording` does; MemoryError, where it takes too much."""
        if self._device is None:
            assert self._recordings.device is not None
            self._device = self._recordings.device.another()
        device = self._device
        if (other := next((x.device for x in tensors if x.device != device.device), None)) is not None:
            raise RuntimeError(f"a tensor is on {other}")
        device.give_back()
        before = device.taken()

        def run(given: list[Tensor]) -> list[Any]:
            code(given)
            return []

        made = Recording(device, run, list(tensors), [True] * len(tensors), _nothing)
        more = (device.taken() - before) / max(device.most(), 1)
        if self._recordings.wanted == "auto" and more > MORE_MEMORY - 1 and device.taken() > PLENTY * device.size():
            del made
            device.give_back()
            raise MemoryError(f"a recording takes {100 * more:.0f} % more memory")
        self._made.add(made)
        return made

    def say(self, told: str) -> None:
        if self._recordings.control.rank == 0:
            _log.info("CUDA graphs: %s", told)

    def told(self) -> str:
        """Whether each of them is played back, and why not, for people, behind how forward and backward stand."""
        work = [self.clipping, *(groups[min(groups)] for groups in self._steps.values() if groups)]
        return "".join(f"; {each.name}: {each.told()}" for each in work) if self._recordings.are_on() else ""


_all: weakref.WeakSet[StepRecordings] = weakref.WeakSet()


def step_recordings_of(parameter: Tensor) -> StepRecordings | None:
    """Those of the module that a parameter is of."""
    return next((each for each in _all if any(p is parameter for p in each.parameters())), None)


@dataclass
class _Way:
    """How some work was run: what it depended on, how often in sum, and its recordings."""

    numbers: tuple
    places: list[Any]
    runs: int = 0
    recordings: dict[str, Recording] = field(default_factory=dict)


class RepeatedWork:
    """Some work, which is done again and again: one code, or several with something in between.

    why: it was not played back the last time, and why not; None if it was.
    """

    def __init__(self, of: StepRecordings, name: str):
        self._of, self.name = weakref.ref(of), name
        self.why: str | None = NOT_YET
        self._times = self._played = self._recorded = 0
        self._ways: list[_Way] = []  # the one that was used last behind the others
        self._numbers: tuple | None = None
        self._equal, self._off = EQUAL, False

    def told(self) -> str:
        """How it stands, for people."""
        if not self._played:
            return f"off: {self.why}"
        return f"on ({self._played} of {self._times} times" + (")" if self.why is None else f"; not the last time: {self.why})")

    def now(self, numbers: tuple[tuple[str, Any], ...], places: Callable[[], list[Any]]) -> Runner | None:
        """What runs the codes this time, and plays them back where it can; None, where they are run as they are.

        numbers: all that they depend on and that is no memory, by its names. places: where the memory lies, and of which form it
        is; not asked for where numbers are new.
        """
        of = self._of()
        if self._off or of is None or (obstacle := of.obstacle()) is not None:
            self.why = self.why if self._off or of is None else obstacle
            return None
        self._times += 1
        before, self._numbers = self._numbers, numbers
        if numbers != before and all(numbers != way.numbers for way in self._ways):
            changed = [name for (name, one), (_, other) in zip(numbers, before or (), strict=False) if one != other]
            self.why = f"{changed[0]} is another number than in the step before" if changed else NOT_YET
            return None
        way = self._way(numbers, places())
        if way.recordings or (way.runs > self._equal and of.has_room()):
            self._played += 1
            self.why = None
            return functools.partial(self._run, of, way)
        self.why = NOT_YET if len(self._ways) == 1 else "gradients or state are not where they were in the steps before"
        if not of.has_room():
            self.why = f"there are {MOST} recordings already"
        return None

    def _way(self, numbers: tuple, found: list[Any]) -> _Way:
        """The one of this run, which it counts."""
        way = next((w for w in reversed(self._ways) if w.places == found and w.numbers == numbers), None)
        if way is None:
            way = _Way(numbers, found)
        else:
            self._ways.remove(way)
        self._ways = [*self._ways[1 - KEPT :], way]
        way.runs += 1
        return way

    def _run(self, of: StepRecordings, way: _Way, name: str, code: Code, tensors: list[Tensor]) -> None:
        if not self._off and name not in way.recordings:
            self._record(of, way, name, code, tensors)
        if self._off:
            code(tensors)
        else:
            way.recordings[name].play(())

    def _record(self, of: StepRecordings, way: _Way, name: str, code: Code, tensors: list[Tensor]) -> None:
        try:
            made = of.record(code, tensors)
        except Exception as error:
            _log.debug("CUDA graphs: what could not be recorded", exc_info=True)
            first = str(error).splitlines()[0] if str(error) else ""
            why = first if isinstance(error, MemoryError) else f"it could not be recorded: {type(error).__name__}: {first}"
            self._off, self._played, self.why = True, 0, why
            self._ways.clear()
            of.say(f"{self.name}: off: {why}")
            return
        if not way.recordings:
            if not self._recorded:
                of.say(f"{self.name}: on")
            self._recorded += 1
            if self._recorded >= KEPT:
                self._equal = min(2 * self._equal, RARELY)
        way.recordings[name] = made


def _nothing() -> None:
    pass
