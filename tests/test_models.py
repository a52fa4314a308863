"""Models of many families under many plans, each against the plain model on one device."""

import pytest

from fxpar.errors import CaptureError, UnsupportedOperator
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from tests import zoo

PLANS = ["dp=2", "dp=4", "tp=2", "tp=4", "dp=2,tp=2", "dp=2,tp=4"]
PLANS += [f"{plan},sequence_parallel=false" for plan in PLANS if "tp" in plan]


def check(name, plan, train=True):
    model, inputs = zoo.build(name)
    assert_equivalent(model.train(train), Plan.parse(plan), inputs)


@pytest.mark.parametrize("plan", ["dp=2,tp=2", "tp=4,sequence_parallel=false"])
@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.HELD_OUT])
def test_model(name, plan):
    check(name, plan)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("plan", PLANS)
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
