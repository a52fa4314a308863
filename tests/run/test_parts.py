"""What programs compute outside of the model of tensors that ranks hold parts of alone: of outputs, and of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from tests.processes import launch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down, self.head = nn.Embedding(12, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)[:, None]
        x = F.scaled_dot_product_attention(x, x, x)[:, 0]
        return self.head(x + self.down(F.gelu(self.up(x))))


Pair = Callable[[Tensor, Tensor], Tensor]
PAIRS: dict[str, Pair] = {
    "mse": F.mse_loss, "smooth l1": F.smooth_l1_loss, "huber": F.huber_loss, "l1": F.l1_loss,
    "soft margin": lambda a, b: F.soft_margin_loss(a, b.detach().sign()),
    "bce": lambda a, b: F.binary_cross_entropy(a.sigmoid(), b.detach().sigmoid()),
    "bce of logits": lambda a, b: F.binary_cross_entropy_with_logits(a, b.detach().sigmoid()),
    "kl": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
    "log sigmoid": lambda a, b: F.logsigmoid(a.norm(dim=-1)).mean() + F.logsigmoid(b).mean(),
}  # fmt: skip
"""Losses of two tensors that are split alike."""
ONES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda z: F.cosine_embedding_loss(z[:, 0], z[:, 1] * 2, torch.ones_like(z[:, 0, 0])),
    "normalised": lambda z: F.normalize(z.mean(1), dim=-1).cumsum(-1).square().sum(),
    "distances": lambda z: torch.cdist(z, z).mean(),
    "unbound": lambda z: sum(((i + 1) * t.square().mean() for i, t in enumerate(z.unbind(1))), torch.zeros(())),
    "listed": lambda z: z[:, [1, 2]].square().mean() + z[..., [0, 3]].sum(), "where positive": lambda z: z[z > 0].sum(),
    "pooled": lambda z: F.avg_pool1d(z, 2).square().mean(), "clipped": lambda z: F.hardtanh(z).mean() + F.softplus(z).mean(),
}  # fmt: skip
"""What is computed of one output."""


def _grads(net: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in net.named_parameters()}
    found["loss"] = loss.detach()
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def _wrong(rank: int, plan: str) -> list[str]:
    torch.manual_seed(0)
    plain, ids = Net(), torch.randint(12, (4, 8))
    model = fxpar.parallelize(copy.deepcopy(plain), plan, (ids,))
    other = fxpar.parallelize(copy.deepcopy(plain), plan, (ids.flip(1),))
    wrong = []

    def compare(name: str, want: dict[str, Tensor | None], have: dict[str, Tensor | None]) -> None:
        for n, w in want.items():
            h = have[n]
            if (w is None) != (h is None) or (w is not None and h is not None and not torch.allclose(h, w, atol=1e-6, rtol=1e-4)):
                wrong.append(f"{name}: {n}")

    for name, pair in PAIRS.items():
        with torch.no_grad():
            taught = plain(ids.flip(1)), other(ids.flip(1))
        compare(f"{name} of outputs", _grads(plain, pair(plain(ids), taught[0])), _grads(model, pair(model(ids), taught[1])))
        compare(f"{name} of parameters", _grads(plain, pair(plain.up.weight, plain.down.weight.T)),
                _grads(model, pair(model.up.weight, model.down.weight.T)))
    for name, one in ONES.items():
        compare(name, _grads(plain, one(plain(ids))), _grads(model, one(model(ids))))
    return wrong


@pytest.mark.parametrize("plan", ["tp=2", pytest.param("cp=2", marks=pytest.mark.slow)])
def test_losses_of_parts_are_those_of_one_device(plan):
    assert launch(2, _wrong, plan) == [[], []]
