"""Whatever is passed as a plan: it is one, or a short `PlanError`."""

from __future__ import annotations

import pytest

from fxpar.errors import PlanError
from fxpar.plan import Plan

HUGE = 10**5000
"""Python refuses to spell it."""


@pytest.mark.parametrize("make", [
    lambda: Plan.parse(None), lambda: Plan.parse(3), lambda: Plan.parse(b"dp=2"), lambda: Plan.parse("dp=" + "9" * 9000),
    lambda: Plan.parse("x" * 9000), lambda: Plan.parse("dp=1,dp=" + "1" * 9000), lambda: Plan.parse("roles=" + "a/" * 9000),
    lambda: Plan(dp=HUGE), lambda: Plan(zero=HUGE), lambda: Plan(cp_comm=HUGE), lambda: Plan(recompute=HUGE),
    lambda: Plan(tp=-HUGE), lambda: Plan(batch_dims={"x": HUGE}), lambda: Plan(param_dtype=HUGE),
    lambda: Plan(stage_boundaries=HUGE),
    lambda: Plan(dp=2).check_world(HUGE), lambda: Plan(dp=2**31), lambda: Plan(dp=float("inf")), lambda: Plan.of(None),
    lambda: Plan.from_megatron(None), lambda: Plan.from_megatron(3), lambda: Plan.from_megatron("x" * 9000),
    lambda: Plan.from_megatron("--tensor-model-parallel-size " + "9" * 9000), lambda: Plan.from_megatron("--bf16", HUGE),
    lambda: Plan.from_megatron("--bf16", -1), lambda: Plan.from_megatron("--" + "x" * 9000), lambda: Plan.from_megatron([None]),
])  # fmt: skip
def test_what_can_be_no_plan_is_a_short_plan_error(make):
    with pytest.raises(PlanError) as caught:
        make()
    assert len(str(caught.value)) < 1500 and len(str(caught.value).splitlines()) == 1
