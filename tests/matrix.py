"""A pairwise cover: of every two settings of a run, each pair of values is in one of the cases at least."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

Case = tuple[Any, ...]
Pair = tuple[int, int, int, int]


def pairwise(*settings: Sequence[Any]) -> list[Case]:
    """Cases, one value of each of `settings`, that contain every pair of values of any two settings; the same at every call.

    The pairs of the two longest settings need a case each. The other values are taken, case by case, as they cover most pairs
    that are not covered yet.
    """
    order = sorted(range(len(settings)), key=lambda k: -len(settings[k]))
    left = {(a, x, b, y) for a, b in itertools.combinations(range(len(settings)), 2)
            for x in range(len(settings[a])) for y in range(len(settings[b]))}
    cases: list[dict[int, int]] = []
    while left:
        first = min(left, key=lambda p: ({p[0], p[2]} != set(order[:2]), p))
        chosen = {first[0]: first[1], first[2]: first[3]}
        for k in order:
            if k not in chosen:
                turn = len(cases) % len(settings[k])  # who comes first where several cover as many
                values = [*range(turn, len(settings[k])), *range(turn)]
                chosen[k] = max(values, key=functools.partial(_gain, chosen, k, left))
        left -= _pairs(chosen)
        cases.append(chosen)
    return [tuple(setting[chosen[k]] for k, setting in enumerate(settings)) for chosen in cases]


def _gain(chosen: dict[int, int], setting: int, left: set[Pair], value: int) -> int:
    """How many pairs are covered by giving one more setting this value."""
    return sum(_pair(k, v, setting, value) in left for k, v in chosen.items())


def _pair(a: int, x: int, b: int, y: int) -> Pair:
    return (a, x, b, y) if a < b else (b, y, a, x)


def _pairs(chosen: dict[int, int]) -> set[Pair]:
    return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(sorted(chosen), 2)}
