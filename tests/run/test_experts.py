"""Expert parallelism on real ranks, against the plain model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from tests.processes import launch

pytestmark = pytest.mark.multiproc
VOCAB, LENGTH, WIDTH, EXPERTS, CHOSEN = 32, 16, 16, 4, 2


class Experts(nn.Module):
    """Rows sorted by expert, and multiplied in groups, beside an expert that all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 32) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, 32, WIDTH) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens).softmax(-1)
        weights, experts = scores.topk(CHOSEN, -1)
        sorted_experts, order = experts.flatten().sort(stable=True)
        ends = torch.histc(sorted_experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
        rows = F.grouped_mm(F.silu(F.grouped_mm(tokens[order // CHOSEN], self.up, offs=ends)), self.down, offs=ends)
        rows = rows * weights.flatten()[order][:, None]
        mixed = torch.zeros_like(tokens).index_add(0, order // CHOSEN, rows)
        balance = EXPERTS * (scores.mean(0) * F.one_hot(experts, EXPERTS).float().mean((0, 1))).sum()
        return x + mixed.view_as(x) + self.shared(x), balance


class Mixture(nn.Module):
    """Attention and experts, twice, between an embedding and a head. balance: the part of a loss that makes all experts equally
    busy. two: the experts that all tokens are sent to."""

    def __init__(self, balance: float = 0.1, two: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.balance = balance
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        for layer in self.layers:
            with torch.no_grad():
                layer.router.weight.mul_(0.1 if two else 1)
                layer.router.bias.index_put_((torch.tensor(two, dtype=torch.long),), torch.tensor(2.0))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x, balance = self.embed(ids), torch.zeros(())
        for qkv, layer in zip(self.qkv, self.layers, strict=True):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x, more = layer(x)
            balance = balance + more
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        return {"loss": loss + self.balance * balance, "logits": logits}


def mixture(*options: Any) -> tuple[Mixture, Tensor]:
    torch.manual_seed(0)
    return Mixture(*options), torch.randint(VOCAB, (4, LENGTH))


def full(t: Any) -> Tensor:
    return getattr(t, "full_tensor", lambda: t)().detach().clone()


def steps(module: Any, ids: Tensor, clip: Any) -> dict[str, Any]:
    """Three steps of training: losses, norms of gradients, and the first gradients."""
    made: dict[str, Any] = {"losses": [], "norms": []}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(3):
        loss = module(ids)["loss"]
        loss.backward()
        made["losses"].append(full(loss))
        made.setdefault("grads", {n: full(p.grad) for n, p in module.named_parameters()})
        made["norms"].append(full(clip(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return made


def trained(rank: int, plan: str, backend: str, folder: Path, options: tuple) -> dict[str, Any]:
    """Three steps of a replica, and the parameters that a plain model, and another plan, then load from a checkpoint."""
    model, ids = mixture(*options)
    dp = fxpar.Plan.parse(plan).dp
    module = fxpar.parallelize(model, plan, {"ids": ids.chunk(dp)[0]}, backend=backend)
    made = steps(module, ids.chunk(dp)[module.replica], module.clip_grad_norm_)
    fxpar.save_checkpoint(folder, module)
    one_device = Mixture()
    fxpar.load_checkpoint(folder, one_device)
    other = fxpar.parallelize(Mixture(), "dp=4,ep=2,zero=3,ep_dispatch=allgather", {"ids": ids[:1]}, backend="eager")
    fxpar.load_checkpoint(folder, other)
    return {**made, "saved": {n: p.detach() for n, p in one_device.named_parameters()},
            "other": {n: full(p) for n, p in other.named_parameters()}}


def check(plan: str, backend: str, folder: Path, *options: Any) -> None:
    model, ids = mixture(*options)
    want = steps(model, ids, lambda most: nn.utils.clip_grad_norm_(model.parameters(), most))
    after = {n: p.detach() for n, p in model.named_parameters()}
    for mine in launch(4, trained, plan, backend, folder, options, timeout=400 if backend == "inductor" else 120):
        torch.testing.assert_close(mine["losses"], want["losses"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine["norms"], want["norms"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine["grads"], {n: want["grads"][n] for n in mine["grads"]}, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(mine["saved"], after, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(mine["other"], mine["saved"], atol=0, rtol=0)


def test_steps_are_those_of_one_device(tmp_path):
    check("dp=2,tp=2,ep=4,zero=1", "eager", tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("plan", [
    "dp=4,ep=4", "dp=4,ep=2,zero=3,recompute=selective", "dp=2,tp=2,ep=2", "dp=2,cp=2,ep=4,recompute=full", "dp=4,ep=4,zero=1",
    "dp=2,tp=2,ep=4,ep_dispatch=allgather,zero=3",
])  # fmt: skip
def test_steps_of_other_plans(plan, tmp_path):
    check(plan, "eager", tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,tp=2,ep=4,zero=1", "dp=4,ep=4,recompute=selective", "dp=4,ep=2,zero=3"])
def test_compiled_steps(plan, tmp_path):
    check(plan, "inductor", tmp_path / "saved")


@pytest.mark.slow
def test_steps_in_stages(tmp_path):
    """Without the loss that balances, which microbatches estimate."""
    check("dp=2,pp=2,ep=2,microbatches=2", "eager", tmp_path / "saved", 0.0)


@pytest.mark.slow
def test_ranks_without_any_row(tmp_path):
    check("dp=4,ep=4", "eager", tmp_path / "saved", 0.1, (0, 3))
