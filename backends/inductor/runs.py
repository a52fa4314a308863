"""runs: equal stretches of a list of tokens, one behind the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fxpar.backends.repeats import periods_of

LEAST = 3
"""How many equal stretches, one behind the other, are a run."""
SMALLEST = 8
"""Of how many tokens a stretch has to be."""


@dataclass(frozen=True)
class Repetition:
    """`count` stretches of `period` tokens each, and `extra` more tokens that go on in the same way."""

    start: int
    period: int
    count: int
    extra: int = 0

    @property
    def end(self) -> int:
        return self.start + self.period * self.count

    @property
    def places(self) -> range:
        """All places between two of its tokens, and before and behind them."""
        return range(self.start, self.end + self.extra + 1)

    def offset(self, place: int) -> int:
        """How far a place is behind the beginning of a stretch."""
        return (place - self.start) % self.period


def runs_of(tokens: Sequence[int]) -> list[Repetition]:
    """The longest run of a list, and those before and behind it."""
    return _runs(tokens, 0, len(tokens))


def _runs(tokens: Sequence[int], low: int, high: int) -> list[Repetition]:
    best: Repetition | None = None
    for period in periods_of(tokens[low:high]):
        if not SMALLEST <= period <= (high - low) // LEAST:
            continue
        start = low
        for i in range(low, high - period + 1):
            if i < high - period and tokens[i] == tokens[i + period]:
                continue
            length = i - start + period
            run = Repetition(start, period, length // period, length % period)
            if run.count >= LEAST and (best is None or (run.count - 1) * run.period > (best.count - 1) * best.period):
                best = run
            start = i + 1
    if best is None:
        return []
    return [*_runs(tokens, low, best.start), best, *_runs(tokens, best.end + best.extra, high)]


def most_alike(keys: Sequence[Hashable]) -> tuple[int, int]:
    """Where the most equal ones stand side by side, and how many."""
    best, start = (0, 0), 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[start]:
            if i - start > best[1]:
                best = start, i - start
            start = i
    return best
