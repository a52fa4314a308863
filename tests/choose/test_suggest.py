"""`fxpar.suggest`: what it calls the best fits, runs and computes the same; and it says why the rest is worse."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fxpar
import fxpar.choose.suggest
from fxpar.choose.evaluate import Candidate
from fxpar.choose.suggest import Suggestions, complexity
from fxpar.cost.stages import TERMS
from fxpar.errors import PlanError
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from tests import zoo
from tests.choose import auto_program
from tests.choose.models import BLOCKS, Blocks, blocks, captured, facts, machine

MEMORY = 2 * 2**20


@functools.cache
def found() -> Suggestions:
    with mock.patch.object(fxpar.choose.suggest, "facts_of", lambda *_: facts()):
        return fxpar.suggest(captured(), gpus=4, memory=MEMORY, cluster=machine(), fixed="outputs=loss", candidates=2,
                             compare=["pp=4,microbatches=16"])


def test_the_best_plan_fits_as_inspect_predicts():
    best = found().best
    assert best is not None and best.traced and found().plan == best.plan == found().candidates[0].plan
    report = fxpar.inspect(captured(), best.plan, memory=MEMORY, cluster=machine())
    assert report.verdict is not None and report.verdict.fits
    assert report.peak_memory == best.peak
    assert report.step.time().seconds == pytest.approx(best.seconds)


def test_candidates_are_partitioned_and_in_order():
    made = [c for c in found().candidates if c.fits(MEMORY)]
    assert len(found().candidates) == 2
    assert [c.pace for c in made[1:]] == sorted(c.pace for c in made[1:])
    assert made[0].pace <= min(c.pace for c in made) * 1.02
    for candidate in (*made, *found().compared):
        assert [*candidate.terms] == [*TERMS] and candidate.plan.outputs == "loss"
        assert candidate.seconds == pytest.approx(candidate.report.step.time().seconds)


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_candidates_compute_what_one_device_computes(place):
    model, inputs = blocks()
    assert_equivalent(model, found().candidates[place].plan, inputs)


def test_every_family_is_rejected_with_a_reason():
    best = found().plan
    others = {f"{name}={n}" for name in ("tp", "pp") for n in (2, 4) if getattr(best, name) != n}
    assert {*others, "dp alone"} <= {r.family for r in found().rejected}
    for rejection in found().rejected:
        if "slower" in rejection.reason:
            assert rejection.best.seconds > found().best.estimate.seconds and "% of the step is" in rejection.reason
        elif "does not fit" in rejection.reason:
            assert rejection.best.peak > MEMORY * 0.97 and "MiB" not in rejection.reason
        else:
            assert rejection.reason.startswith("as fast within")


def test_the_text_tells_all_of_it():
    text = str(found())
    assert f"best: {found().plan}" in text and "by the public guide:" in text and "rejected:" in text
    assert "compared: pp=4,microbatches=16: fits" in text and "matrix products" in text
    assert f"place {found().rank(found().compared[0])} of {len(found().fitting())}" in text
    assert "ep: the model has no experts that it could split" in text


def test_nothing_fits():
    with mock.patch.object(fxpar.choose.suggest, "facts_of", lambda *_: facts()):
        made = fxpar.suggest(captured(), gpus=2, memory="20KiB", cluster=machine(), fixed="outputs=loss")
    assert made.best is None and not made.candidates and "nothing fits" in str(made)
    with pytest.raises(PlanError, match=r"holds no plan for 2 GPUs.*takes least"):
        _ = made.plan


def test_where_nothing_fits_as_traced_smaller_plans_are_tried():
    """All peaks are 1.8 times those of the formulas."""
    def larger(made: Candidate) -> Candidate:
        return replace(made, memory={name: 1.8 * size for name, size in made.estimate.memory.items()}, traced=True)

    with mock.patch.object(fxpar.choose.suggest, "facts_of", lambda *_: facts()), \
            mock.patch.object(fxpar.choose.suggest, "traced", larger):
        made = fxpar.suggest(captured(), gpus=4, memory="1.25MiB", cluster=machine(), fixed="pp=1,outputs=loss", candidates=1)
    assert made.best is not None and made.best.traced and made.best is made.candidates[0]
    assert [c.fits(made.memory) for c in made.candidates] == [True, False]


def test_simpler_plans_come_first():
    order = ["dp=8", "dp=8,zero=1", "dp=8,zero=3", "dp=4,tp=2,zero=3", "dp=2,tp=2,pp=2,zero=3", "dp=8,zero=3,recompute=selective",
             "dp=8,zero=3,recompute=full"]
    ranks = [complexity(Plan.parse(text)) for text in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


@pytest.mark.parametrize("wrong, field", [(dict(gpus=0), "gpus"), (dict(gpus=4, memory="much"), "memory"),
                                          (dict(gpus=4, cluster="dgx-z"), "cluster"), (dict(gpus=4, fixed="dp=x"), "dp")])
def test_mistakes_are_named(wrong, field):
    with pytest.raises(PlanError, match=f"`{field}`"):
        fxpar.suggest(captured(), **{"cluster": machine(), "fixed": "outputs=loss", **wrong})


# ---- plan="auto" ----


@pytest.mark.slow
@pytest.mark.multiproc
def test_auto_takes_a_plan_for_the_ranks_that_are_there():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "tests.choose.auto_program"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    told = [json.loads(line) for line in re.findall(r"\[\".*?\]", made.stdout)]  # two processes may share a line
    torch.manual_seed(0)
    model = Blocks()
    loss = model(auto_program.whole())
    loss.backward()
    assert len(told) == 2 and told[0] == told[1] and Plan.parse(told[0][0]).world_size == 2
    assert told[0][1:] == pytest.approx([loss.item(), model.layers[0].up.weight.grad.sum().item()], rel=1e-4)


# ---- models of other kinds ----


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(["llama", "gpt2", "mixtral"]), gpus=st.sampled_from([2, 4, 8]), share=st.floats(0.15, 1.5))
def test_what_is_suggested_fits_and_computes_the_same(name, gpus, share):
    model, inputs = zoo.build(name)
    captured = fxpar.capture(model, inputs)
    alone = fxpar.inspect(captured, "outputs=loss").peak_memory
    memory = int(alone * share)
    made = fxpar.suggest(captured, gpus=gpus, memory=memory, fixed="outputs=loss", candidates=2)
    for candidate in made.candidates:
        assert_equivalent(model, candidate.plan, inputs)
        if candidate.traced:
            verdict = fxpar.inspect(captured, candidate.plan, memory=memory).verdict
            assert verdict is not None and verdict.fits == candidate.fits(memory)


def test_blocks_are_counted():
    assert found().facts.values["blocks"] == BLOCKS
