"""Models of many families under many plans, each against the plain model on one device."""

import itertools

import pytest

import fxpar
from fxpar.errors import CaptureError, PlanError, UnsupportedOperator
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from tests import zoo

PLANS = ["dp=2", "dp=4", "tp=2", "tp=4", "dp=2,tp=2", "dp=2,tp=4"]
PLANS += [f"{plan},sequence_parallel=false" for plan in PLANS if "tp" in plan]
STORED = ["dp=2,zero=1", "dp=4,zero=2", "dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=2", "dp=4,dp_replicate=2,tp=2,zero=3"]


def check(name, plans, train=True):
    """The model, captured once, under each of the plans."""
    model, inputs = zoo.build(name)
    captured = fxpar.capture(model.train(train), inputs)
    for plan in map(Plan.parse, plans):
        if zoo.rows(name) % plan.dp:
            with pytest.raises(PlanError, match=f"`dp`={plan.dp}: must divide the global batch of {zoo.rows(name)}"):
                assert_equivalent(captured, plan)
        else:
            assert_equivalent(captured, plan)


NAMES = [*zoo.MODELS, *zoo.HELD_OUT]
MORE = {name: ["tp=4,sequence_parallel=false"] for name in NAMES[::3]}
IN_PARTS = {name: [plan] for name, plan in zip(zoo.MODELS, itertools.cycle(STORED[2:4]), strict=False)}


@pytest.mark.parametrize("name", NAMES)
def test_model(name):
    check(name, ["dp=2,tp=2", *MORE.get(name, []), *IN_PARTS.get(name, [])])


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("plan", [*PLANS, *STORED])
@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.HELD_OUT])
def test_every_model_plan_and_mode(name, plan, train):
    check(name, [plan], train)


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
