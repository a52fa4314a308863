"""Context parallelism on real ranks, against the plain model in one process."""

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
VOCAB, LENGTH, WIDTH = 24, 16, 16


class Block(nn.Module):
    """Causal attention with half as many key heads as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.kv(h).chunk(2, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Net(nn.Module):
    """Two blocks between tables of tokens and positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.blocks(self.embed(ids) + self.places))
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), "logits": logits}


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randint(VOCAB, (4, LENGTH))


def full(t: Any) -> Tensor:
    return getattr(t, "full_tensor", lambda: t)().detach().clone()


def one_step(module: Any, ids: Tensor, clip: Any) -> dict[str, Any]:
    """Of training: the loss, the gradients, and the logits before it."""
    out = module(ids)
    out["loss"].backward()
    made = {k: full(v) for k, v in out.items()} | {"grads": {n: full(p.grad) for n, p in module.named_parameters()}}
    clip(0.1)
    torch.optim.AdamW(module.parameters(), lr=1e-2).step()
    return made


def trained(rank: int, plan: str, backend: str, folder: Path) -> dict[str, Any]:
    """A step of a replica, and the parameters that a plain model then loads from a checkpoint."""
    model, ids = net()
    dp = fxpar.Plan.parse(plan).dp
    module = fxpar.parallelize(model, plan, {"ids": ids.chunk(dp)[0]}, backend=backend)
    made = one_step(module, ids.chunk(dp)[module.replica], module.clip_grad_norm_)
    fxpar.save_checkpoint(folder, module)
    one = Net()
    fxpar.load_checkpoint(folder, one)
    return {**made, "replica": module.replica, "saved": {n: p.detach() for n, p in one.named_parameters()}}


def check(plan: str, backend: str, folder: Path) -> None:
    model, ids = net()
    want = one_step(model, ids, lambda most: nn.utils.clip_grad_norm_(model.parameters(), most))
    dp = fxpar.Plan.parse(plan).dp
    for mine in launch(4, trained, plan, backend, folder, timeout=300 if backend == "inductor" else 120):
        torch.testing.assert_close(mine["logits"], want["logits"].chunk(dp)[mine["replica"]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine["loss"], want["loss"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine["grads"], want["grads"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine["saved"], {n: p.detach() for n, p in model.named_parameters()}, atol=2e-5, rtol=1e-4)


PLANS = ["cp=4", "cp=2,tp=2,zero=1", "cp=4,cp_comm=a2a+p2p", "cp=4,cp_comm=a2a", "cp=2,tp=2,zero=2,cp_comm=a2a",
         "dp=2,cp=2,zero=3,cp_comm=a2a", "cp=4,cp_comm=allgather", "cp=2,tp=2,cp_comm=allgather"]  # fmt: skip


def test_a_step_is_that_of_one_device(tmp_path):
    check("dp=2,cp=2,zero=3", "eager", tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_kind_of_communication_in_both_backends(plan, backend, tmp_path):
    check(plan, backend, tmp_path / "saved")
