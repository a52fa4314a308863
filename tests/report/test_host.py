"""What the host does in a step, by kind, as a profile has it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxpar
from fxpar.report.host import KINDS


def event(name: str, begin: float, end: float, thread: int = 1, device: str = "CPU") -> SimpleNamespace:
    times = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=times, thread=thread, device_type=f"DeviceType.{device}")


def test_a_range_counts_without_what_is_inside_of_it():
    events = [
        event("fxpar: call", 0, 1000),
        event("fxpar: inputs", 1000, 1500),
        event("fxpar: forward", 2000, 9000),
        event("all_gather over dp for layers.0.up and 3 more", 2000, 2600),
        event("wait for all_gather over dp for layers.0.up and 3 more", 3000, 3100),
        event("layers.0.up: mm", 4000, 5000),
        event("aten::mm", 4100, 4900),
        event("the model: add; layers.0.up: mul", 5000, 5500),
        event("layers.0.up: mm", 4000, 8000, device="CUDA"),
        event("CompiledBackward", 0, 3000, thread=2),
        event("reduce_scatter over dp+cp for layers.0.up", 1000, 2000, thread=2),
        event("fxpar: gradients", 3000, 3200, thread=2),
        event("fxpar: clip_grad_norm_", 9000, 9300),
        event("Optimizer.step#AdamW.step", 9400, 9900),
        event("Optimizer.zero_grad#AdamW.zero_grad", 9900, 10000),
    ]
    found = fxpar.host_time(SimpleNamespace(events=lambda: events), steps=2)
    want = [(2, 1600), (1, 100), (2, 1500), (2, 4800 + 2000), (1, 1000), (2, 700), (1, 300), (2, 600)]
    for (kind, _), (count, microseconds) in zip(KINDS, want, strict=True):
        assert found.parts[kind] == pytest.approx((count / 2, microseconds / 2e6)), kind
    assert found.total == pytest.approx(12.6e-3 / 2)
    text = str(found).splitlines()
    assert len(text) == len(KINDS) + 2
    assert text[1].split()[-2:] == ["1", "0.80"] and text[-1].split() == ["all", "of", "it", "6.30"]


def test_a_step_is_told_apart():
    torch.manual_seed(0)
    module = fxpar.parallelize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), "dp=1", (torch.randn(2, 4),))
    opt = torch.optim.AdamW(module.parameters(), fused=True)

    def step() -> None:
        module(torch.randn(2, 4)).sum().backward()
        module.clip_grad_norm_(1.0)
        opt.step()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = fxpar.host_time(profile)
    assert [count for count, _ in found.parts.values()][-5:] == [1, 1, 3, 1, 1] and all(s >= 0 for _, s in found.parts.values())


def test_a_profile_of_something_else_is_an_error():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2) + 1
    with pytest.raises(fxpar.InputError, match="no ranges of a parallel module"):
        fxpar.host_time(profile)
