"""A pairwise cover: of every two settings of a run, each pair of values is in one of the cases at least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Case = tuple[Any, ...]


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
        first = min(p for p in left if {p[0], p[2]} == set(order[:2])) if any(
            {p[0], p[2]} == set(order[:2]) for p in left) else min(left)
        chosen = {first[0]: first[1], first[2]: first[3]}
        for k in order:
            if k not in chosen:
                chosen[k] = max(range(len(settings[k])), key=lambda v: (len(_pairs({**chosen, k: v}) & left), -(v + len(cases)) % len(
                    settings[k])))
        left -= _pairs(chosen)
        cases.append(chosen)
    return [tuple(setting[chosen[k]] for k, setting in enumerate(settings)) for chosen in cases]


def _pairs(chosen: dict[int, int]) -> set[tuple[int, int, int, int]]:
    return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(sorted(chosen), 2)}
