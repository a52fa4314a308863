"""Models of many families under many plans, each against the plain model on one device."""

import pytest

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
