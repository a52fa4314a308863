"""Mistakes of one rank of two: an error on all, or rightly nothing; never silence, and no hang.

All kinds, on a machine of many cores: ``pytest -n 32 -m slow tests/run/test_faults.py``; each takes two processes.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.run.faults import HUNG, MISTAKES, TIMEOUT, ending

ACCEPTED = ("no mistake", "no mistake, tp", "no mistake, zero=3", "no mistake, pp", "model: another seed",
            "dump_dir: cannot be written", "a rank that is slow", "a rank that is slow in its backward")
"""What is no mistake; of dump_dir, rank 0 alone writes there."""


def right_one(name: str) -> str:
    """The program without the mistake."""
    plan = MISTAKES[name][0]
    return next(other for other in ACCEPTED if other.startswith("no mistake") and MISTAKES[other][0] == plan)


def endings(name: str, timeout: float, folder: Path) -> list[tuple]:
    """How each rank's program ends. Raises: AssertionError for one that does not, with where it is."""
    return launch(2, ending, name, str(folder), timeout, timeout=HUNG * timeout)


def seconds(name: str, timeout: float) -> float:
    """What the program without the mistake takes as busy as this machine is now."""
    with tempfile.TemporaryDirectory() as folder:
        return max(rank[2] for rank in endings(right_one(name), timeout, Path(folder)))


def outcome(name: str, timeout: float, folder: Path) -> tuple[str, str]:
    """("error" on all ranks, "accepted" by all, or what is wrong; what the ranks said)."""
    first, second = endings(name, timeout, folder / "it")
    said = " / ".join(f"{kind.split()[0]}: {text}"[:240] for kind, text, *_ in (first, second))
    took = max(first[2], second[2])
    if took > 6 * timeout and took > 4 * timeout + 3 * (right := seconds(name, timeout)):
        return f"late: {took:.0f} s, and without the mistake {right:.0f} s", said
    if first[0] != "ok" and second[0] != "ok":
        return ("error" if "FxparError" in first[0] else "unclear"), said
    if first[0] == second[0] == "ok":
        wanted = endings(right_one(name), timeout, folder / "right")
        alike = all(made[3] == right[3] and all(map(torch.equal, made[4], right[4]))
                    for made, right in zip((first, second), wanted, strict=True))
        return ("accepted" if alike else "silent"), said
    return "one rank alone has an error", said


@functools.cache
def patience() -> float:
    """A timeout that ranks without a mistake keep on a machine as busy as this one."""
    return max(TIMEOUT, seconds("no mistake", 10 * TIMEOUT) / 2)


SHORT = ("evaluation on one rank", "backward: left out")


@pytest.mark.multiproc
@pytest.mark.parametrize("name", SHORT)
def test_a_mistake_of_one_rank_is_an_error_on_all(name, tmp_path):
    kind, said = outcome(name, TIMEOUT, tmp_path)
    assert kind == "error", said


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("name", MISTAKES)
def test_all_kinds_of_mistakes(name, tmp_path):
    kind, said = outcome(name, patience(), tmp_path)
    print(f"{name:45s} {kind:12s} {said}")
    assert kind == ("accepted" if name in ACCEPTED else "error"), said
