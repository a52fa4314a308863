"""compared: in which calls numbers are computed that ranks are to have in common, and when they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from torch import Tensor

from fxpar.backends.transport.control import Check, Control, Outcome
from fxpar.run.arriving import Arriving, joined

CHECKED_EVERY = 100
FIRST = 3
"""Calls that are checked at the beginning, of those that are checked at all."""


class Turns:
    """Which calls of one module compute such numbers. every: see `check_batches` of `fxpar.parallelize`."""

    def __init__(self, control: Control, every: int):
        self.calls, self.every, self._alone = 0, every, control.world == 1

    def begins(self, underway: bool) -> bool:
        """Count a call. Whether it is to compute numbers. underway: earlier ones are not compared yet."""
        self.calls += 1
        return not self._alone and self.every > 0 and not underway and (self.calls <= FIRST or self.calls % self.every == 0)


class Compared:
    """Numbers of one module on one rank, computed in its first calls and every so often where the tensors are. They are compared
    in the first call that finds them on the host of all ranks, so that none waits for a GPU.

    turns: of this module. slot, slots: of this rank, see `Check`.
    """

    def __init__(self, control: Control, every: int, slot: int = 0, slots: int = 1):
        self.control, self.slot, self.slots = control, slot, slots
        self.turns = Turns(control, every)
        self.sums: Arriving | None = None
        """What was computed and is not compared yet."""

    def checks(self, numbers: Callable[[], Sequence[Tensor]]) -> list[Check]:
        """What is to be compared in this call. numbers: computes them."""
        if self.turns.begins(underway=self.sums is not None):
            self.sums = Arriving(numbers())
        if self.sums is None:
            return []
        return self.made_of(self.sums.here())

    def made_of(self, here: list[int] | None) -> list[Check]:
        """The checks of the numbers, as many on every rank; None: they are not here yet."""
        return [Check(self.slot, self.slots, None if here is None else joined(here))]

    def judge(self, outcomes: list[Outcome]) -> None:
        """Raises: `MismatchError`, on all ranks, if their numbers differ."""
        if not outcomes or outcomes[0] is None:
            return
        assert self.sums is not None
        sums, self.sums = self.sums, None
        if any(outcome is not None and None in outcome for outcome in outcomes):
            self.differ(sums.waited())
        self.compared(outcomes[0])

    def differ(self, mine: list[int]) -> None:
        """Say how ranks differ, of which this one has the numbers `mine`. Raises: `MismatchError`, on all ranks, unless it is by
        rounding."""
        raise NotImplementedError

    def compared(self, outcome: list[int | None]) -> None:
        """Told of every comparison that raised nothing: the numbers of the slots of the first check."""


def tell_all(due: Sequence[tuple[Callable[[list[Outcome]], None], list[Check]]], outcomes: Iterable[Outcome]) -> None:
    """Tell each that had something compared of the outcomes."""
    made = iter(outcomes)
    for told, checks in due:
        told([*islice(made, len(checks))])
