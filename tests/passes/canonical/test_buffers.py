"""Buffers that a forward changes, and that its backward needs as they were."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fxpar
from fxpar.ops.before import before
from fxpar.run import engine
from fxpar.testing import assert_equivalent
from tests.recorder import Pretended


class Scaled(nn.Module):
    """Divides by a buffer that it has written, multiplies by one that it writes later, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.ones(()))
        self.register_buffer("largest", torch.full((16,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(self.up(x)) / self.calls * self.largest.clone()
        with torch.no_grad():
            self.largest.copy_(torch.maximum(self.largest * 0.9, h.abs().amax(0)))
        return self.down(h.tanh())


def normed() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(8, 16)), nn.Tanh(), spectral_norm(nn.Linear(16, 4)))


MODELS = {"scaled": Scaled, "spectral norm": normed}
PLANS = ["dp=2", "dp=2,zero=3", "dp=2,tp=2", "dp=1,recompute=full", "dp=2,zero=3,recompute=selective"]


def copied(model: nn.Module, plan: str) -> int:
    program = fxpar.compile_program(model, plan, (torch.randn(8, 8),))
    return sum(n.target is before for n in program.graph.nodes)


def test_what_is_copied():
    """Buffers that are written and that an output is made of; not running statistics, nor anything while nothing is written."""
    assert (copied(Scaled(), "dp=2"), copied(Scaled().eval(), "dp=2")) == (2, 2)
    assert copied(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "dp=2") == 0
    assert copied(normed(), "dp=2") > 0 == copied(normed().eval(), "dp=2")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_one_device_says_the_same(plan, model):
    assert_equivalent(MODELS[model](), plan, (torch.randn(8, 8),))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan, backend", [("dp=1,zero=3", "eager"), ("dp=1,recompute=full", "inductor"),
                                           ("dp=1,recompute=selective", "inductor"), ("dp=1", "recorded")])
def test_steps_are_those_of_the_plain_module(plan, backend, model):
    torch.manual_seed(0)
    plain = MODELS[model]()
    device, recorded = Pretended(), backend == "recorded"
    with mock.patch.object(engine, "device_of", lambda _: device):
        module = fxpar.parallelize(copy.deepcopy(plain), plan, (torch.randn(8, 8),), cuda_graphs=recorded,
                                   backend="inductor" if recorded else backend)
    for _ in range(8):
        x = torch.randn(8, 8)
        for each in (plain, module):
            each.zero_grad()
            each(x).square().mean().backward()
        for name, p in plain.named_parameters():
            got = module.get_parameter(name).grad
            torch.testing.assert_close(got.full_tensor() if hasattr(got, "full_tensor") else got, p.grad, rtol=1e-5, atol=1e-6)
        for name, b in plain.named_buffers():
            torch.testing.assert_close(dict(module.named_buffers())[name], b)
    assert bool(device.plays) == recorded
