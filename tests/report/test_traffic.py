"""What reports say is gathered again under zero=3 is what the compiled graphs gather."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxpar
from fxpar.report.memory import trace
from fxpar.report.traffic import rows_of
from tests import zoo


class Residual(nn.Module):
    """A norm and two products, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def tower() -> nn.Module:
    """Residual blocks, of which the first one's input has no gradient, and a head."""
    return nn.Sequential(*(Residual() for _ in range(2)), nn.Linear(16, 32))


def gathers(graph: fx.Graph) -> int:
    """Parameters that a graph gathers, in buckets or one by one."""
    found = [n for n in graph.nodes if "all_gather" in str(n.target)]
    return sum(len(n.args[0]) if isinstance(n.args[0], list | tuple) else 1 for n in found)


def compare(captured: fxpar.Captured, plan: str) -> None:
    program = captured.partition(plan)
    graphs, _ = trace(program, briefly=False)
    rows = [r for r in rows_of(program, 1) if r.kind == "all_gather"]
    told = [sum(r.count for r in rows if r.phase == phase) for phase in ("forward", "backward")]
    assert told == [gathers(graph) for graph in graphs] and told[1]


def test_what_is_gathered_again():
    compare(fxpar.capture(tower(), (torch.empty(32, 8, 16),)), "dp=2,zero=3,recompute=full")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_is_gathered_again_by_other_plans(recompute):
    compare(fxpar.capture(tower(), (torch.empty(32, 8, 16),)), f"dp=2,zero=3,recompute={recompute}")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["nanogpt", "llama"])
def test_what_models_gather_again(model, recompute):
    built, inputs = zoo.build(model)
    compare(fxpar.capture(built, inputs), f"dp=2,zero=3,recompute={recompute}")
