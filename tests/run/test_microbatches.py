"""`train_step` in microbatches, in real processes: every step is that of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.errors import PlanError
from tests.processes import launch

PLANS = ["dp=2,zero=1,microbatches=2", "dp=2,zero=3,microbatches=4", "tp=2,microbatches=2"]
STEPS = 3


class Net(nn.Module):
    """Labels of which parts count other numbers; a penalty, dropout, a buffer, attributes, rows by position."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.shift = nn.Linear(8, 16), nn.Linear(16, 5), nn.Parameter(torch.randn(5))
        self.register_buffer("calls", torch.zeros(()))
        self.drop = drop

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        h = F.dropout(F.gelu(self.up(x)), self.drop, self.training)
        logits = self.down(h) + self.shift.expand(len(x), 5)
        weight = 1 + torch.arange(len(x)) / len(x)
        rows = F.cross_entropy(logits, y, reduction="none", ignore_index=-100)
        loss = (rows * weight).sum() / (weight * (y != -100)).sum() + 0.1 * self.down.weight.square().sum() + 0.1 * self.calls
        self.loss, self.rows = loss.detach(), rows.detach()
        return {"loss": loss, "logits": logits}


def case(drop: float = 0.0) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    y = torch.arange(8) % 5
    y[:3] = -100
    return Net(drop), {"x": torch.randn(8, 8), "y": y}


def state(module: Any) -> dict[str, Tensor]:
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for n, v in values.items()}


def train(rank: int, plans: list[str], drop: float) -> list[Any]:
    out = []
    for plan in plans:
        model, batch = case(drop)
        dp = fxpar.Plan.parse(plan).dp
        module = fxpar.parallelize(model, plan, {k: v.chunk(dp)[0] for k, v in batch.items()})
        mine = {k: v.chunk(dp)[module.replica] for k, v in batch.items()}
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        module.seed, losses = 7, []
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses.append(module.train_step(**mine).item())
            optimizer.step()
        out.append((losses, state(module), (module.loss, module.rows), module.replica, dp))
    return out


@pytest.mark.multiproc
def test_steps_in_processes_are_those_of_one_process():
    model, batch = case()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for per_rank in launch(2, train, PLANS, 0.0, timeout=300):
        for have, values, (stored, rows), replica, dp in per_rank:
            assert have == pytest.approx(losses, rel=1e-6)
            assert stored.item() == pytest.approx(losses[-1], rel=1e-6)
            torch.testing.assert_close(rows, model.rows.chunk(dp)[replica])
            for name, value in state(model).items():
                torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)


def test_dropout_is_that_of_the_whole_batch():
    whole, parts = train(0, ["dp=1", "microbatches=4"], 0.3)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    plain, batch = case()
    assert abs(parts[0][0] - plain(**batch)["loss"].item()) > 1e-3


def test_forward_outside_of_a_step_is_that_of_its_own_rows():
    model, batch = case()
    module = fxpar.parallelize(model, "microbatches=2", batch)
    losses = [module(**{k: v.chunk(2)[i] for k, v in batch.items()})["loss"].item() for i in range(2)]
    plain, _ = case()
    want = [plain(**{k: v.chunk(2)[i] for k, v in batch.items()})["loss"].item() for i in range(2)]
    assert losses == pytest.approx(want, rel=1e-6)


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.up(x), dim=-1)
        return F.cross_entropy(z @ z.t(), torch.arange(len(x)))


def test_a_step_that_cannot_be_is_refused_and_a_loop_by_hand_runs():
    """It is the mean of the microbatches' losses, as `no_sync` says."""
    x = torch.randn(8, 8)
    model = Contrastive()
    want = sum(model(part) for part in x.chunk(2)) / 2
    want.backward()
    grad = model.up.weight.grad.clone()
    model.zero_grad()
    module = fxpar.parallelize(model, "microbatches=2", (x,))
    with pytest.raises(PlanError, match=r"`microbatches`=2: operator .*z @ z\.t\(\).*no_sync\(\)"):
        module.train_step(x)
    for part in x.chunk(2):
        (module(part) / 2).backward()
    torch.testing.assert_close(module.up.weight.grad.full_tensor(), grad)
