"""Numbers of parameters: sums over all of them, whatever ranks hold, and what would take one rank's for all is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from fxpar import InputError
from tests.processes import launch


class Tied(nn.Module):
    """Its embedding is its head, too: under pp the first and the last stage hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.embed.weight
        self.b.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in (self.a, self.b):
            h = h + F.gelu(layer(h))
        return F.cross_entropy(self.head(h).flatten(0, 1), ids.flatten())


FUNCTIONS: dict[str, Callable[[str, nn.Parameter], Any]] = {
    "squares": lambda name, p: 0.1 * p.square().sum(),
    "of matrices": lambda name, p: 0.01 * p.abs().sum() if p.dim() > 1 else 0,
    "of the tied one": lambda name, p: p.norm() ** 3 if name == "embed.weight" else 0.0,
    "of one stage": lambda name, p: p.norm(dim=0).sum() if name.startswith("b.") else 0,
    "means": lambda name, p: (p.float() - 0.5).square().mean(),
    "how many": lambda name, p: p.numel(),
}


def made(plan: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A plain model, the same in parallel, and rows for each."""
    torch.manual_seed(0)
    plain, ids, parsed = Tied(), torch.randint(0, 16, (4, 6)), fxpar.Plan.parse(plan)
    module = fxpar.parallelize(copy.deepcopy(plain), parsed, (ids[: 4 // parsed.dp],), backend="eager")
    return plain, module, ids, ids.chunk(parsed.dp)[module.replica]


def adds_up(rank: int, plan: str, names: list[str]) -> list[tuple[float, float]]:
    return numbers(names, *made(plan))


def numbers(names: list[str], plain: nn.Module, module: Any, ids: Tensor, mine: Tensor) -> list[tuple[float, float]]:
    """The loss with each penalty, and that of one device; their gradients are the same."""
    found = []
    for name in names:
        function = FUNCTIONS[name]
        module.zero_grad()
        plain.zero_grad()
        penalty = module.sum_over_parameters(function)
        have, want = module(mine) + penalty, plain(ids) + sum(function(n, p) for n, p in plain.named_parameters())
        assert not isinstance(have, DTensor), name
        have.backward()
        want.backward()
        found.append((have.item(), want.item()))
        for n, p in module.named_parameters():
            q = plain.get_parameter(n).grad
            assert (p.grad is None) == (q is None), (name, n)
            assert q is None or torch.allclose(p.grad.full_tensor(), q, atol=1e-5), (name, n)
    return found


def check(world: int, plan: str, names: list[str]) -> None:
    first, *others = launch(world, adds_up, plan, names)
    for have, want in first:
        assert have == pytest.approx(want, rel=1e-5)
    assert all(other == first for other in others)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world, plan", [
    (1, "dp=1"), (2, "dp=2"), (2, "tp=2"), (2, "dp=2,zero=3"), (2, "pp=2,microbatches=2"), (4, "pp=2,tp=2,microbatches=2"),
    (4, "pp=2,dp=2,zero=1,microbatches=2"), (3, "pp=3,microbatches=4"), (2, "pp=2,microbatches=2,schedule=zb1p"),
])  # fmt: skip
def test_a_sum_over_parameters_is_that_of_one_device(world, plan):
    check(world, plan, list(FUNCTIONS))


def of_a_pipeline(rank: int) -> None:
    plain, module, ids, mine = made("pp=2,microbatches=2")
    for have, want in numbers(["squares", "of one stage"], plain, module, ids, mine):
        assert have == pytest.approx(want, rel=1e-5)
    loss = module(ids) + 0.1 * sum(p.square().sum() for p in module.parameters())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss.item()
    assert any("it is one of those that this rank's stages hold" in str(w.message) for w in told)
    with pytest.raises(InputError, match=r"loss of Tied was computed along with parameters under pp=2.*sum_over_parameters"):
        loss.backward()
    module(ids).backward()
    for norm in (lambda: torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0),
                 lambda: torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])):
        with pytest.raises(InputError, match=r"write module\.clip_grad_norm_"):
            norm()


@pytest.mark.multiproc
def test_numbers_of_a_pipeline_are_those_of_all_stages_or_refused():
    launch(2, of_a_pipeline)
