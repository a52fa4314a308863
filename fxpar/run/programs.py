"""programs: how many programs are kept of one model, and what is said of many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fxpar.program import Program

MOST = 32
"""Programs that are kept of one model."""

MANY = 8
"""Programs of one model, beyond which it is said what they differ in."""


def least_used(programs: Mapping[tuple, Program], compiled: Iterable[tuple]) -> tuple:
    """The key of the program that was not used for longest. compiled: keys of what runs them (theirs and one more), least
    recently used first."""
    used = {key[:-1]: i for i, key in enumerate(compiled)}
    return min(programs, key=lambda key: used.get(key, -1))


def note(count: int, new: tuple, old: tuple, changed: list[str]) -> str:
    """What to say where `count` programs of one model were captured. new, old: keys of two. changed: `State.changed`."""
    inputs = [f"input {a[0]!r} ({_plain(b)}, then {_plain(a)})" for a, b in zip(new[0], old[0], strict=False) if a != b]
    words = {1: "the mode of submodules", 2: "which parameters are trained", 3: f"the parts of the model ({changed[0]})",
             4: changed[1], 5: f"an attribute that the forward reads ({changed[2]})", 6: "autocast",
             7: "what earlier calls left in attributes"}
    what = inputs[:4] + [text for i, text in words.items() if new[i] != old[i]] or ["which inputs are given"]
    kept = f" The {MOST} used last are kept; others are captured again when they are called." if count == MOST else ""
    return (f"{count} programs of this model were captured, each of which took as long as the first; the newest differs from the "
            f"one before in {', '.join(what)}. What is computed with, and changes often, is a tensor that is passed in, or a "
            f"buffer, better than a Python value.{kept}")


def _plain(part: tuple) -> str:
    return f"{part[2]} {list(part[1])}" if len(part) > 2 else str(part[1])
