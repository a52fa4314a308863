"""All plans, and what the formulas say of them beside what the cost model says of their programs."""

from __future__ import annotations

import pytest

from fxpar.choose.evaluate import Candidate, partitioned
from fxpar.choose.facts import facts_of
from fxpar.choose.space import Space
from fxpar.plan import Plan
from tests.choose.models import BLOCKS, ROWS, captured, facts, machine

BASE = Plan(outputs="loss")


def space(gpus=4, base=BASE, fixed=frozenset(), plain=False) -> Space:
    return Space(facts(), machine(), gpus, base, fixed, plain)


def test_facts_are_read_off_the_model():
    made = facts()
    numbers = sum(p.numel() for p in captured().model.parameters())
    assert made.parameters == numbers == made.values["n_split"] + made.values["n_same"]
    assert made.dimensions.batch == ROWS and made.dimensions.split and not made.dimensions.sequences
    assert made.values["blocks"] == BLOCKS and {*made.kept} == {"none"}


@pytest.mark.slow
def test_what_is_recomputed_is_not_kept():
    kept = facts_of(captured(), BASE, machine()).kept
    assert {*kept} == {"none", "selective", "full"}
    assert kept["full"]["kept_blocks"] < kept["none"]["kept_blocks"]


def test_every_plan_takes_all_ranks_and_divides_the_batch():
    plans = list(space().plans())
    assert len(plans) == len(set(plans)) and {p.world_size for p in plans} == {4}
    assert all(ROWS % (p.dp * p.microbatches) == 0 for p in plans)
    assert {p.tp for p in plans} == {p.pp for p in plans} == {p.dp for p in plans} == {1, 2, 4}
    assert {p.cp for p in plans} == {p.ep for p in plans} == {1}


def test_tp_stays_inside_a_node():
    assert {p.tp for p in space(gpus=16).plans()} == {1, 2, 4}


def test_fields_that_are_fixed_stay():
    base = Plan(outputs="loss", tp=2, zero=3, recompute="full")
    plans = list(space(base=base, fixed=frozenset({"tp", "zero", "recompute"})).plans())
    assert plans and {(p.tp, p.zero, p.recompute) for p in plans} == {(2, 3, "full")}


def test_a_plain_loop_has_no_pipeline_and_no_accumulation():
    assert {(p.pp, p.microbatches) for p in space(plain=True).plans()} == {(1, 1)}


@pytest.mark.parametrize("plan", [
    "dp=4", "dp=4,zero=1,microbatches=4", "dp=4,zero=3", "tp=4",
    "pp=2,microbatches=1,schedule=interleaved1f1b,virtual_stages=2", "pp=2,microbatches=8,schedule=zb1p",
    *(pytest.param(plan, marks=pytest.mark.slow) for plan in (
        "dp=4,zero=2,microbatches=2", "dp=2,tp=2", "dp=2,recompute=full", "pp=2,microbatches=8",
        "pp=2,dp=2,microbatches=4,schedule=interleaved1f1b,virtual_stages=2")),
])
def test_formulas_say_what_the_cost_model_says(plan):
    plan = Plan.parse(plan + ",outputs=loss")
    [estimate] = space(gpus=plan.world_size).of([plan])
    made = partitioned(lambda _: captured(), estimate, machine(), ROWS)
    assert isinstance(made, Candidate)
    assert estimate.seconds == pytest.approx(made.seconds, rel=0.12)
    for term, within in (("matrix products", 0.1), ("other operators", 0.15)):
        assert estimate.terms[term] == pytest.approx(made.terms[term], rel=within)


@pytest.mark.parametrize("plan", ["dp=4,zero=3", "tp=4"])
def test_formulas_say_what_is_stored(plan):
    plan = Plan.parse(plan + ",outputs=loss")
    [estimate] = space(gpus=plan.world_size).of([plan])
    made = partitioned(lambda _: captured(), estimate, machine(), ROWS)
    assert isinstance(made, Candidate)
    for part in ("parameters", "optimizer"):
        assert estimate.memory[part] == pytest.approx(made.report.memory[part], rel=0.02)
