"""Whether a plan fits, and what would make it fit."""

from __future__ import annotations

import pytest

import fxpar
from fxpar.errors import PlanError
from fxpar.plan import Plan
from fxpar.report.verdict import bytes_of, usable, verdict
from tests.choose.models import captured


@pytest.mark.parametrize("memory, size", [("80GiB", 80 * 2**30), ("80 gb", 80 * 10**9), ("1.5MiB", 3 * 2**19), (1024, 1024),
                                          ("7", 7)])
def test_memory_is_read(memory, size):
    assert bytes_of(memory) == size


@pytest.mark.parametrize("memory", ["", "80GX", "-1GiB", "0", 0, -5, True, float("inf"), None, [1]])
def test_what_is_no_memory_is_named(memory):
    with pytest.raises(PlanError, match="`memory`"):
        bytes_of(memory)


def test_changes_are_tried_in_the_order_of_the_guide_until_one_fits():
    sizes = {"zero=1": 90, "zero=3": 80, "zero=3,microbatches=2": 70, "zero=3,microbatches=2,recompute=selective": 50}
    asked = []

    def peak_of(plan: Plan) -> int:
        asked.append(str(plan).removeprefix("dp=2,"))
        return sizes[asked[-1]] * 2**30

    made = verdict(Plan(dp=2), 100 * 2**30, 60 * 2**30, peak_of)
    assert not made.fits and dict(made.ways) == {name: size * 2**30 for name, size in sizes.items()}
    assert "zero=3,microbatches=2,recompute=selective fits (zero=1 90.0 GiB, " in str(made)


def test_a_plan_that_fits_asks_for_nothing_else():
    made = verdict(Plan(dp=2), usable(10 * 2**30), 10 * 2**30, lambda plan: pytest.fail("another plan was asked for"))
    assert made.fits and not made.ways and str(made).startswith("fits: 9.8 GiB in 10.0 GiB")


def test_nothing_that_one_plan_may_change_is_enough():
    made = verdict(Plan(), 100, 10, lambda plan: 50)
    assert "nor do these" in str(made) and made.ways[-1][0] == "microbatches=2,recompute=full"


@pytest.mark.slow
def test_inspect_says_what_would_make_it_fit():
    whole = fxpar.inspect(captured(), "dp=2,outputs=loss").peak_memory
    report = fxpar.inspect(captured(), "dp=2,outputs=loss", memory=int(whole / 1.05))
    assert report.verdict is not None and not report.verdict.fits
    change, peak = report.verdict.ways[-1]
    assert peak == fxpar.inspect(captured(), f"dp=2,{change},outputs=loss").peak_memory <= usable(report.limit)
    assert "does not fit: " in str(report) and f"{change} fits" in str(report)
    assert fxpar.inspect(captured(), "dp=2,outputs=loss").verdict is None
