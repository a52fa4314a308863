"""What is seen of a run: the meter's numbers, the report of the program that trains, the names in a profile."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.cost.clusters import cluster
from fxpar.errors import InputError, PlanError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


@pytest.fixture
def parallel() -> fxpar.ParallelModule:
    return fxpar.parallelize(Mlp(), "dp=1", (torch.randn(8, 16),))


def test_a_meter_measures_steps(parallel, monkeypatch):
    now = iter((10.0, 12.0, 13.0, 15.0, 100.0, 104.0))
    meter = fxpar.Meter(parallel, "dgx-h100", window=2)
    meter._ends[0] = next(now)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(fxpar.run.meter, "stage", lambda _: contextlib.nullcontext())
    flops = 2 * 8 * (2 * 16 * 64 + 3 * 64 * 8)
    assert parallel.report().flops == flops
    first = meter.step(tokens=32)
    assert (first["seconds"], first["tokens_per_second"], first["tokens_per_second_per_rank"]) == (2, 16, 16)
    assert first["tflops_per_rank"] == pytest.approx(flops / 2 / 1e12)
    assert first["mfu"] == pytest.approx(flops / 2 / cluster("dgx-h100").peak("float32"))
    assert meter.step(tokens=32)["seconds"] == 1.5  # the mean of both
    last = meter.step(tokens=64)
    assert last["seconds"] == 1.5 and last["tokens_per_second"] == 48 / 1.5  # the window has the last two
    meter.reset()
    last = meter.step()
    assert last["seconds"] == 4 and "tokens_per_second" not in last


def test_without_a_gpu_there_is_no_mfu(parallel):
    made = fxpar.Meter(parallel).step(tokens=8)
    assert {*made} == {"seconds", "tokens_per_second", "tokens_per_second_per_rank", "tflops_per_rank"}


def test_mistakes_are_refused(parallel):
    with pytest.raises(InputError, match="window=0"):
        fxpar.Meter(parallel, window=0)
    with pytest.raises(PlanError, match="abacus"):
        fxpar.Meter(parallel, "abacus")


def test_the_report_of_training_survives_an_evaluation(parallel):
    before = parallel.report().flops
    parallel.eval()
    parallel.eval_step(torch.randn(4, 16))
    parallel.train()
    assert parallel.report().flops == before


def test_a_profile_has_the_names_of_modules(parallel):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        parallel(torch.randn(8, 16))
    names = {event.key for event in profile.key_averages()}
    assert {"up: linear", "down: linear", "the model: relu"} <= names
