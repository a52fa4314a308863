"""A model captured once, and partitioned under many plans: as if each plan had had a capture of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxpar
from fxpar import compiler
from fxpar.program import Program
from fxpar.run.agreement import fingerprint
from fxpar.testing import assert_equivalent
from tests import zoo

PLANS = ("dp=2", "tp=2", "tp=4", "dp=4,zero=1", "dp=2,zero=3", "dp=4,dp_replicate=2,zero=3", "dp=2,tp=2,zero=2",
         "tp=2,sequence_parallel=false", "dp=2,recompute=full", "dp=2,microbatches=2", "dp=2,zero=3,param_dtype=bf16",
         "tp=2,param_dtype=bf16,reduce_dtype=bf16", "dp=2,tp=2,outputs=loss", "tp=8", "dp=2,tp=4,zero=3")  # fmt: skip
MODELS = ("llama", "gpt2", "t5", "mixtral", "bert", "qwen3_moe", "nanogpt")


def count_captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    traced = compiler.trace

    def counted(*args: Any) -> Program:
        made.append(args)
        return traced(*args)

    monkeypatch.setattr(compiler, "trace", counted)
    return made


def check_plans(name: str, plans: list[str]) -> None:
    model, inputs = zoo.build(name)
    captured = fxpar.capture(model, inputs)
    for plan in (*plans, plans[0]):
        mine, fresh = captured.partition(plan), fxpar.compile_program(model, plan, inputs)
        assert fingerprint(mine) == fingerprint(fresh)
        assert mine.notes == fresh.notes and mine.mesh == fresh.mesh and mine.sinks == fresh.sinks


SOME = st.lists(st.sampled_from(PLANS), min_size=2, max_size=3, unique=True)


@pytest.mark.slow
@settings(max_examples=2)
@given(st.sampled_from(MODELS), SOME)
def test_plans_after_one_capture_are_those_of_captures_of_their_own(name, plans):
    check_plans(name, plans)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.sampled_from(MODELS), SOME)
def test_any_plans_after_one_capture_are_those_of_captures_of_their_own(name, plans):
    check_plans(name, plans)


def test_partitioning_leaves_the_inferred_program_as_it_is():
    captured = fxpar.capture(*zoo.build("llama"))
    captured.partition("dp=2")
    (shared,) = captured._inferred.values()

    def looks() -> tuple:
        known = [{key: str(value) for key, value in node.meta.items()} for node in shared.graph.nodes]
        return str(shared.graph), known, list(shared.notes), shared.mesh

    before = looks()
    for plan in ("tp=4", "dp=2,tp=2,zero=3", "dp=3"):
        try:
            captured.partition(plan)
        except fxpar.PlanError:
            assert plan == "dp=3"
        assert looks() == before


def test_a_model_is_captured_once_for_plans_that_trace_alike(monkeypatch):
    made = count_captures(monkeypatch)
    captured = fxpar.capture(*zoo.build("llama"))
    for plan in ("dp=2", "tp=2", "dp=2,zero=3", "dp=2,tp=2", "dp=2,zero=3,recompute=full"):
        captured.partition(plan)
    assert len(made) == 1
    captured.partition("dp=2,param_dtype=bf16")
    captured.partition("tp=2,param_dtype=bf16")
    assert len(made) == 2


def test_a_model_that_changed_is_captured_again(monkeypatch):
    model, inputs = zoo.build("llama")
    captured = fxpar.capture(model.eval(), inputs)
    evaluated = captured.partition("dp=2")
    model.train()
    next(model.parameters()).requires_grad_(False)
    made = count_captures(monkeypatch)
    trained = captured.partition("dp=2")
    assert made and trained.training and not evaluated.training
    assert fingerprint(trained) == fingerprint(fxpar.compile_program(model, "dp=2", inputs))


def test_several_plans_are_inspected_as_each_by_itself(monkeypatch):
    model, inputs = zoo.build("llama")
    plans = ["dp=2", "tp=2", "dp=2,zero=3"]
    alone = [fxpar.inspect(model, plan, inputs) for plan in plans]
    made = count_captures(monkeypatch)
    together = fxpar.inspect(model, plans, inputs)
    assert len(made) == 1 and together == alone
    assert fxpar.inspect(fxpar.capture(model, inputs), plans[1]) == alone[1]


@pytest.mark.slow
def test_several_plans_are_compared_with_one_device(monkeypatch):
    model, inputs = zoo.build("llama")
    made = count_captures(monkeypatch)
    assert_equivalent(model, ("dp=2", "tp=2", "dp=2,zero=3"), inputs)
    assert len(made) == 1
    captured = fxpar.capture(model, inputs)
    assert_equivalent(captured, "dp=2,tp=2", lowered=True)
    loss = fxpar.simulate(captured, "tp=2").step(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss.detach())


def test_the_plan_that_is_wrong_is_named(monkeypatch):
    model, inputs = zoo.build("llama")
    with pytest.raises(fxpar.PlanError, match="`dp`=3"):
        fxpar.inspect(model, ["dp=2", "dp=3"], inputs)
