"""A module that changes between steps: modes of submodules, and which parameters are trained, as the plain model has them."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import fxpar
from fxpar.errors import MismatchError
from tests.harness import RANDOM
from tests.processes import launch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)}) for _ in range(2))
        self.drop, self.head = nn.Dropout(1.0), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer["norm"](layer["linear"](x)))
        return F.cross_entropy(self.head(x + self.drop(x)), y)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(8, 6, generator=generator), "y": torch.randint(4, (8,), generator=generator)}


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def change(module: nn.Module, kind: str, name: str, value: bool) -> None:
    if kind == "mode":
        module.get_submodule(name).train(value)
    else:
        module.get_parameter(name).requires_grad_(value)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    loss = module(**inputs)
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def choices(r: Random, plain: nn.Module, count: int) -> list[list[tuple[str, str, bool]]]:
    """Per step, what changes before it."""
    modes = [("mode", n) for n, _ in plain.named_modules()]
    trained = [("trained", n) for n, _ in plain.named_parameters()]
    return [[(*r.choice(modes if r.random() < 0.5 else trained), r.random() < 0.5) for _ in range(r.randint(0, 3))]
            for _ in range(count)]


def train(module: nn.Module, changes: list[list[tuple[str, str, bool]]], inputs: dict[str, Tensor]) -> list[Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for before in changes:
        for one in before:
            change(module, *one)
        losses.append(step(module, optimizer, inputs))
    state = {n: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for n, t in module.state_dict().items()}
    return [losses, state]


def same(have: list[Any], want: list[Any]) -> None:
    assert have[0] == pytest.approx(want[0], rel=1e-5)
    for name, value in want[1].items():
        torch.testing.assert_close(have[1][name], value, rtol=1e-4, atol=1e-6)


@settings(max_examples=3)
@given(RANDOM)
def test_changes_between_steps_are_the_plain_models(r):
    plain = model()
    changes = choices(r, plain, 5)
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", batch())
    same(train(module, changes, batch()), train(plain, changes, batch()))


def of_a_rank(rank: int, plan: str, changes: list) -> list[Any]:
    parsed = fxpar.Plan.parse(plan)
    inputs = {k: v.chunk(parsed.dp)[rank % parsed.dp] for k, v in batch().items()}
    return train(fxpar.parallelize(model(), plan, inputs), changes, inputs)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "dp=2", "tp=2"])
def test_changes_between_steps_on_two_ranks(plan):
    changes = choices(Random(3), model(), 6)
    want = train(model(), changes, batch())
    for have in launch(2, of_a_rank, plan, changes):
        same(have, want)


def one_rank_differs(rank: int, kind: str, name: str) -> str:
    inputs = {k: v.chunk(2)[rank] for k, v in batch().items()}
    module = fxpar.parallelize(model(), "dp=2", inputs)
    if rank:
        change(module, kind, name, False)
    with pytest.raises(MismatchError) as error:
        module(**inputs)
    return str(error.value)


@pytest.mark.multiproc
@pytest.mark.parametrize("kind, name, said", [
    ("mode", "layers.1.norm", "the mode (training) of submodule 'layers.1.norm': rank 0 with True, rank 1 with False"),
    ("trained", "head.weight", "whether parameter 'head.weight' wants gradients: rank 0 with True, rank 1 with False"),
    ("mode", "", "the mode (training) of submodule (the model itself): rank 0 with True, rank 1 with False"),
])  # fmt: skip
def test_a_change_on_one_rank_is_an_error_on_all(kind, name, said):
    for text in launch(2, one_rank_differs, kind, name):
        assert said in text
