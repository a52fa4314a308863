"""Parameters that no loss of a backward pass depends on have no gradient, whatever the plan: optimizers leave them alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from tests.processes import launch


class TwoHeads(nn.Module):
    """A loss for each of two heads, and a third that no test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 2)
        self.third = nn.Linear(16, 3)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        h = F.gelu(self.body(x))
        return {"left": F.cross_entropy(self.left(h), target), "right": self.right(h).square().mean(),
                "third": self.third(h).square().mean()}


ORDERS = {"one alone": ["left", "left"], "one after the other": ["left", "right"], "one, both, one": ["right", "both", "left"],
          "the other under no_sync": ["no_sync right", "left"], "one under no_sync": ["no_sync left", "no_sync left", "left"]}
SHORT = ("one, both, one", "the other under no_sync")


def losses(out: dict[str, Tensor], wanted: str) -> Tensor:
    return out["left"] + out["right"] if wanted == "both" else out[wanted]


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], order: list[str]) -> dict[str, list[Tensor | None]]:
    """Of every parameter after each backward that is not under no_sync, and its value after two steps that decay weights."""
    torch.manual_seed(0)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), []
    for _ in range(2):
        for wanted in order:
            later = wanted.startswith("no_sync") and hasattr(model, "no_sync")
            with model.no_sync() if later else contextlib.nullcontext():
                losses(model(*batch), wanted.split()[-1]).backward()
            if not wanted.startswith("no_sync"):
                seen.append({n: None if p.grad is None else whole(p.grad) for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    seen.append({n: whole(p.detach()) for n, p in model.named_parameters()})
    return {n: [each[n] for each in seen] for n in seen[0]}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def made() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return TwoHeads(), (torch.randn(8, 6), torch.randint(4, (8,)))


def on_ranks(rank: int, plan: str, backend: str, orders: tuple[str, ...]) -> list[dict[str, list[Tensor | None]]]:
    out = []
    for order in orders:
        model, batch = made()
        part = tuple(x[:4] for x in batch)
        module = fxpar.parallelize(model, plan, batch if plan == "tp=2" else part, backend=backend)
        out.append(gradients(module, tuple(x.chunk(module.replica.count)[module.replica] for x in batch), ORDERS[order]))
    return out


def compare(plan: str, backend: str, orders: tuple[str, ...]) -> None:
    wanted = [gradients(*made(), ORDERS[order]) for order in orders]
    for rank in launch(2, on_ranks, plan, backend, orders):
        for order, one, have in zip(orders, wanted, rank, strict=True):
            for name, values in one.items():
                for number, (want, got) in enumerate(zip(values, have[name], strict=True)):
                    assert (want is None) == (got is None), f"{order}: {name} after {number}: {got}"
                    if want is not None:
                        error = (got - want).norm() / want.norm().clamp(min=1e-6)
                        assert error < (1e-4 if number == len(values) - 1 else 1e-5), f"{order}: {name} after {number}: {error}"


@pytest.mark.multiproc
def test_parameters_behind_other_losses_have_no_gradient():
    compare("dp=2,recompute=full", "eager", SHORT)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=2", "dp=2,zero=3", "dp=2,recompute=full", "tp=2"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_same_of_all_plans(plan, backend):
    compare(plan, backend, tuple(ORDERS))
