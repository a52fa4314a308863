"""Models of many families under many plans, each against the plain model on one device."""

import itertools

import pytest

from fxpar.errors import CaptureError, PlanError, UnsupportedOperator
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from tests import zoo

PLANS = ["dp=2", "dp=4", "tp=2", "tp=4", "dp=2,tp=2", "dp=2,tp=4"]
PLANS += [f"{plan},sequence_parallel=false" for plan in PLANS if "tp" in plan]
STORED = ["dp=2,zero=1", "dp=4,zero=2", "dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=2", "dp=4,dp_replicate=2,tp=2,zero=3"]


def check(name, plan, train=True):
    model, inputs = zoo.build(name)
    plan = Plan.parse(plan)
    if zoo.rows(name) % plan.dp:
        with pytest.raises(PlanError, match=f"`dp`={plan.dp}: must divide the global batch of {zoo.rows(name)}"):
            assert_equivalent(model.train(train), plan, inputs)
    else:
        assert_equivalent(model.train(train), plan, inputs)


NAMES = [*zoo.MODELS, *zoo.HELD_OUT]


@pytest.mark.parametrize("name, plan", [*((n, "dp=2,tp=2") for n in NAMES),
                                        *((n, "tp=4,sequence_parallel=false") for n in NAMES[::3])])
def test_model(name, plan):
    check(name, plan)


@pytest.mark.parametrize("name, plan", [*zip(zoo.MODELS, itertools.cycle(STORED[2:4]), strict=False)])
def test_model_stored_in_parts(name, plan):
    check(name, plan)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("plan", [*PLANS, *STORED])
@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.HELD_OUT])
def test_every_model_plan_and_mode(name, plan, train):
    check(name, plan, train)


def test_layer_dropping_that_is_on_is_refused():
    model, inputs = zoo.build("whisper")
    model.model.encoder.layerdrop = 0.5
    with pytest.raises(CaptureError, match=r"control flow that depends on the values.*modeling_whisper"):
        assert_equivalent(model, Plan(tp=2), inputs)


def test_dropout_inside_a_recurrent_operator_is_refused():
    model, inputs = zoo.build("lstm")
    model.cell.dropout = 0.5
    with pytest.raises(UnsupportedOperator, match=r"aten.lstm.*one-layer modules"):
        assert_equivalent(model, Plan(tp=2), inputs)
    assert_equivalent(model.eval(), Plan(tp=2), inputs)
