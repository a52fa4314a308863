"""Mistakes of one rank of two: an error on all, or rightly nothing; never silence, and no hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.run.faults import LIMIT, MISTAKES, ending

ACCEPTED = ("no mistake", "no mistake, tp", "no mistake, zero=3", "no mistake, pp", "model: another seed",
            "dump_dir: cannot be written", "a rank that is slow", "a rank that is slow in its backward")
"""What is no mistake; of dump_dir, rank 0 alone writes there."""


def right_one(name: str) -> str:
    """The program without the mistake."""
    plan = MISTAKES[name][0]
    return next(other for other in ACCEPTED if other.startswith("no mistake") and MISTAKES[other][0] == plan)


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """("error" on all ranks, "accepted" by all, or what is wrong; what the ranks said)."""
    first, second = launch(2, ending, name, str(folder), timeout=2 * LIMIT)
    said = " / ".join(f"{kind.split()[0]}: {text}"[:240] for kind, text, *_ in (first, second))
    if max(first[2], second[2]) > LIMIT:
        return f"late: {first[2]:.0f} and {second[2]:.0f} s", said
    if first[0] != "ok" and second[0] != "ok":
        return ("error" if "FxparError" in first[0] else "unclear"), said
    if first[0] == second[0] == "ok":
        wanted = launch(2, ending, right_one(name), str(folder), timeout=2 * LIMIT)
        alike = all(made[3] == right[3] and all(map(torch.equal, made[4], right[4]))
                    for made, right in zip((first, second), wanted, strict=True))
        return ("accepted" if alike else "silent"), said
    return "one rank alone has an error", said


SHORT = ("evaluation on one rank", "backward: left out")


@pytest.mark.multiproc
@pytest.mark.parametrize("name", SHORT)
def test_a_mistake_of_one_rank_is_an_error_on_all(name, tmp_path):
    kind, said = outcome(name, tmp_path)
    assert kind == "error", said


@pytest.mark.slow
@pytest.mark.multiproc
def test_all_kinds_of_mistakes(tmp_path):
    rows, wrong = [], []
    for number, name in enumerate(MISTAKES):
        kind, said = outcome(name, tmp_path / str(number))
        rows.append(f"{name:45s} {kind:12s} {said}")
        print(rows[-1], flush=True)
        if kind != ("accepted" if name in ACCEPTED else "error"):
            wrong.append(rows[-1])
    assert len(MISTAKES) >= 60 and not wrong, "\n".join(wrong)
