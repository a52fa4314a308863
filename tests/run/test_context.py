"""Context parallelism on real ranks, against the plain model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.errors import PlanError
from tests.processes import launch

pytestmark = pytest.mark.multiproc
VOCAB, LENGTH, WIDTH = 24, 16, 16


class Block(nn.Module):
    """Causal attention with half as many key heads, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.kv(h).chunk(2, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + F.dropout(self.mlp(x), 0.1, self.training)


class Net(nn.Module):
    """Two blocks between tables of tokens and positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.blocks(self.embed(ids) + self.places))
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), "logits": logits}


def net(train: bool = False) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().train(train), torch.randint(VOCAB, (4, LENGTH))


def full(t: Any) -> Tensor:
    return getattr(t, "full_tensor", lambda: t)().detach().clone()


def parallel(plan: str, ids: Tensor, model: nn.Module, backend: str = "eager") -> tuple[fxpar.ParallelModule, Tensor]:
    dp = fxpar.Plan.parse(plan).dp
    module = fxpar.parallelize(model, plan, {"ids": ids.chunk(dp)[0]}, backend=backend)
    return module, ids.chunk(dp)[module.replica]


def step(rank: int, plan: str, backend: str) -> dict[str, Any]:
    """A replica's loss, logits and gradients."""
    model, ids = net()
    module, mine = parallel(plan, ids, model, backend)
    out = module(mine)
    out["loss"].backward()
    grads = {n: full(p.grad) for n, p in module.named_parameters()}
    return {"replica": module.replica, "loss": full(out["loss"]), "logits": full(out["logits"]), **grads}


def plain() -> tuple[dict[str, Tensor], Tensor]:
    model, ids = net()
    out = model(ids)
    out["loss"].backward()
    return {"loss": out["loss"].detach(), **{n: p.grad for n, p in model.named_parameters()}}, out["logits"].detach()


def check(plan: str, backend: str) -> None:
    want, logits = plain()
    dp = fxpar.Plan.parse(plan).dp
    for mine in launch(4, step, plan, backend, timeout=300 if backend == "inductor" else 120):
        torch.testing.assert_close(mine.pop("logits"), logits.chunk(dp)[mine.pop("replica")], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine, want, atol=1e-6, rtol=1e-5)


DEFAULT = ["cp=4,cp_comm=a2a+p2p", "dp=2,cp=2,zero=3,cp_comm=a2a"]
MORE = ["cp=4,cp_comm=allgather", "cp=4,cp_comm=a2a", "cp=2,tp=2,cp_comm=allgather", "cp=2,tp=2,zero=2,cp_comm=a2a",
        "dp=2,cp=2,cp_comm=allgather"]  # fmt: skip


@pytest.mark.parametrize("plan", DEFAULT)
def test_a_step_is_that_of_one_device(plan):
    check(plan, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("plan", [*DEFAULT, *MORE])
def test_every_kind_of_communication_in_both_backends(plan, backend):
    check(plan, backend)


def trained(rank: int, folder: Path) -> dict[str, Any]:
    """A few steps; what is saved is loaded by the plain model."""
    model, ids = net()
    module, mine = parallel("dp=2,cp=2,zero=1,cp_comm=allgather", ids, model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(2):
        module(mine)["loss"].backward()
        module.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    fxpar.save_checkpoint(folder, module)
    if rank == 0:
        one = Net()
        fxpar.load_checkpoint(folder, one)
        return {n: p.detach() for n, p in one.named_parameters()}
    return {}


def test_training_clips_saves_and_is_loaded_by_the_plain_model(tmp_path):
    model, ids = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(ids)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    found = launch(4, trained, tmp_path / "saved")[0]
    torch.testing.assert_close(found, {n: p.detach() for n, p in model.named_parameters()}, atol=2e-5, rtol=1e-4)


def refused(rank: int) -> str:
    with pytest.raises(PlanError) as caught:
        parallel("cp=2,cp_comm=allgather", torch.zeros(2, 14, dtype=torch.long), Net())
    return str(caught.value)


def test_a_length_that_chunks_do_not_divide_is_refused_with_one_that_they_do():
    for text in launch(2, refused):
        assert "4 does not divide" in text and "padding to 16" in text
