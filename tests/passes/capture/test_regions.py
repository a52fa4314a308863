"""What a model writes within torch.no_grad(): no gradient flows through it."""

from __future__ import annotations

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
