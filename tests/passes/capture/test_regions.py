"""What a model writes within torch.no_grad(): no gradient flows through it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar import CaptureError
from fxpar.testing import assert_equivalent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.register_buffer("kept", torch.zeros(16))


class WritesAnElement(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        with torch.no_grad():
            self.kept[0] = h.amax()
            self.kept[1:3].add_(h.mean(0)[1:3], alpha=0.5)
        return (h - self.kept).square().mean()


class WritesAll(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        with torch.no_grad():
            self.kept.lerp_(h.mean(0), 0.1)
        return (h - self.kept).square().mean()


class WritesWhatHasAGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh() * 1
        with torch.no_grad():
            h.clamp_(-0.1, 0.1)
        return h.square().mean()


@pytest.mark.parametrize("model", [WritesAnElement, WritesAll])
def test_what_is_written_without_gradients(model):
    for plan in ("dp=1", "dp=2"):
        assert_equivalent(model(), plan, (torch.randn(4, 8),))


def test_a_value_with_a_gradient_is_not_written_to_without():
    with pytest.raises(CaptureError, match=r"a write within torch.no_grad\(\) into a value that has a gradient") as caught:
        fxpar.simulate(WritesWhatHasAGradient(), "dp=2", (torch.randn(4, 8),)).step(torch.randn(4, 8))
    assert "test_regions.py" in (caught.value.where or "")


class Through(Net):
    """Writes through a value without a gradient into one that has it, where `write` says so."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.up(x)).square().mean()


def through_data(h: Tensor) -> Tensor:
    h.data.mul_(2)
    return h


def through_a_view(h: Tensor) -> Tensor:
    h.detach()[:, :4].add_(1)
    return h + 1


def of_a_view(h: Tensor) -> Tensor:
    left = h[:, :4]
    left.data.add_(1)
    return h + 1


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.detach().mul_(2)
    return h


def in_autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h.detach().mul_(2)
        return h.float() * 1


def after_it_was_read(h: Tensor) -> Tensor:
    made = h * h
    h.data.mul_(2)
    return made


def of_nothing_else(h: Tensor) -> Tensor:
    return h / h.abs().amax().detach().clamp_(min=1e-3)


def of_a_clone(h: Tensor) -> Tensor:
    kept = h.detach().clone().clamp_(-1, 1)
    return h * kept


@pytest.mark.parametrize("write", [through_data, through_a_view, of_a_view, without_gradients, in_autocast, after_it_was_read])
def test_a_value_with_a_gradient_is_not_written_to_through_one_without(write):
    """PyTorch would give the new value the gradient of the one that was there before."""
    with pytest.raises(CaptureError, match=r"a write through detach\(\) or .data into a value that has a gradient") as caught:
        fxpar.parallelize(Through(write), "dp=1", (torch.randn(4, 8),))
    assert "test_regions.py" in (caught.value.where or "") and "detached clone" in str(caught.value)


@pytest.mark.parametrize("write", [of_nothing_else, of_a_clone])
def test_what_is_written_to_without_a_gradient_is_right(write):
    assert_equivalent(Through(write), "dp=2", (torch.randn(4, 8),))


class Inferred(Net):
    """Computes a scale without gradients, in the other way to say so."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        with torch.inference_mode():
            scale = h.abs().amax() + 1
            with torch.inference_mode(False):
                grown = self.up(x).sum()
        return (h / scale.clone()).square().mean() + grown / self.largest(h).clone()

    @torch.inference_mode()
    def largest(self, h: Tensor) -> Tensor:
        return h.abs().amax() + 2


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,tp=2,zero=3"])
def test_no_gradient_flows_through_inference_mode(plan):
    assert_equivalent(Inferred(), plan, (torch.randn(4, 8),))
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


class WithAConstant(Net):
    """PyTorch makes a fake of the constant, which is no inference tensor, outside of the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean() * self.factor


def test_a_module_is_captured_within_inference_mode():
    plain, x = WithAConstant(), torch.randn(2, 8)
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (torch.randn(4, 8),))
    with torch.inference_mode():
        torch.testing.assert_close(module(x), plain(x))


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return (y * 2 if torch.rand([]) < 0.5 else y).sum()


def test_a_refusal_is_all_that_is_written(capfd, caplog):
    with pytest.raises(CaptureError, match="control flow that depends on the values"):
        fxpar.simulate(Chooses(), "dp=2", (torch.ones(4, 4),))
    assert capfd.readouterr().err == "" and not [r for r in caplog.records if r.levelno >= logging.WARNING]
