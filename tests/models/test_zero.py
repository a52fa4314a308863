"""ZeRO on real ranks and in a simulation: a few steps of an optimizer, clipping, recomputation, and what is communicated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxpar
from tests.processes import launch

WEIGHT = LOSS = 1e-5
STEPS = 3
PLANS = {
    2: ["dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3"],
    4: ["dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=3"],
}
RECOMPUTED = ["dp=2,recompute=selective", "dp=2,zero=3,recompute=full", "dp=2,zero=3,recompute=0.5"]
ALL_RECOMPUTED = [f"dp=2{zero},recompute={how}" for zero in ("", ",zero=3") for how in ("selective", "full", 0.5)]


class Block(nn.Module):
    """Attention with a fused weight, one bias that no axis divides, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(16), nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.Dropout(0.2))
        self.odd = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 4).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, 16))
        return x + self.mlp(x) * self.odd


class Net(nn.Module):
    """Two blocks between a tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, 16), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


def net(train: bool = False) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net().train(train), {k: torch.randint(32, (8, 6)) for k in ("x", "target")}


def replica(plan: str, batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    dp, tp = fxpar.Plan.parse(plan).dp, fxpar.Plan.parse(plan).tp
    return {k: v.chunk(dp)[rank // tp] for k, v in batch.items()}


def module_of(plan: str, rank: int, train: bool = False) -> tuple[Any, dict[str, Tensor]]:
    model, batch = net(train)
    mine = replica(plan, batch, rank)
    return fxpar.parallelize(model, plan, mine, backend="eager"), mine


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(p.grad) for n, p in model.named_parameters()}


def close(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert have.keys() == want.keys()
    for name, theirs in want.items():
        error = (have[name] - theirs).double().norm() / theirs.double().norm()
        assert error <= tolerance, f"{name} is off by {error:.2g}"


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


# ---- optimizer steps ----


def trained(name: str, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Losses and weights of a few steps."""
    made, losses = optimizer(name, model), []
    for _ in range(STEPS):
        made.zero_grad()
        loss = model(**batch)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": {n: full(p) for n, p in model.named_parameters()}}


def train_ranks(rank: int, plans: list[str], names: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    out = {}
    for plan in plans:
        for name in names:
            module, batch = module_of(plan, rank)
            out[plan, name] = trained(name, module, batch)
    return out


@pytest.mark.multiproc
@pytest.mark.parametrize("world, plans, names", [
    pytest.param(2, PLANS[2], ["AdamW", "SGD"], marks=pytest.mark.slow),
    (4, PLANS[4], ["AdamW"]),
    pytest.param(4, [*PLANS[4], "dp=4,zero=1", "dp=4,dp_replicate=2,zero=1", "dp=2,tp=2,zero=2"], ["AdamW", "SGD"],
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_training_on_ranks_equals_one_process(world, plans, names):
    want = {name: trained(name, *net()) for name in names}
    start = {n: p.detach() for n, p in net()[0].named_parameters()}
    for per_rank in launch(world, train_ranks, plans, names):
        for (_, name), have in per_rank.items():
            assert have["losses"] == pytest.approx(want[name]["losses"], rel=LOSS)
            close(have["weights"], want[name]["weights"], WEIGHT)
            assert all((have["weights"][n] - p).norm() > 100 * WEIGHT * p.norm() for n, p in start.items())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("plan", ["dp=2,zero=1", "dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=2"])
def test_training_in_a_simulation_equals_one_process(plan, name):
    model, batch = net()
    want = trained(name, copy.deepcopy(model), batch)
    simulation, made, losses = fxpar.simulate(model, plan, batch), optimizer(name, model), []
    for _ in range(STEPS):
        step = simulation.step(**batch)
        for n, p in model.named_parameters():
            p.grad = step.grads[n]
        made.step()
        losses.append(step.loss.item())
    assert losses == pytest.approx(want["losses"], rel=LOSS)
    close({n: p.detach() for n, p in model.named_parameters()}, want["weights"], WEIGHT)


# ---- on two ranks: all in one launch ----


class Issued(TorchDispatchMode):
    """Every collective that is issued inside, in order."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "_c10d_functional":
            name, operand = function.overloadpacket.__name__, args[0]
            if name != "wait_tensor":
                self.calls.append((name, tuple(operand.shape), operand.dtype))
        return function(*args, **kwargs or {})


def step_of(plan: str, rank: int, train: bool = False) -> dict[str, Any]:
    """One step: its loss, its gradients, and what was communicated in the forward and in the backward."""
    module, batch = module_of(plan, rank, train)
    module.seed = 5
    module(**batch)  # compiled
    module.dropout_seeds.calls = 0
    with Issued() as forward:
        loss = module(**batch)
    with Issued() as backward:
        loss.backward()
    return {"loss": loss.item(), "gradients": gradients(module), "forward": forward.calls, "backward": backward.calls}


def clipped(plan: str, rank: int) -> dict[str, Any]:
    """Norms that clipping returns, and gradients before and after."""
    module, batch = module_of(plan, rank)
    out: dict[str, Any] = {"norms": {}}
    module(**batch).backward()
    out["before"], out["dtypes"] = gradients(module), {p.grad.dtype for p in module.parameters()}
    for kind in (1.0, 3.0, float("inf")):
        out["norms"][kind] = float(module.clip_grad_norm_(1e9, kind))
    out["norms"][2.0] = float(module.clip_grad_norm_(0.5))
    out["after"] = gradients(module)
    return out


CLIPPED = ["dp=2,zero=3,param_dtype=bf16", "dp=2,zero=1"]
STAGES = ["dp=2,recompute=none", *PLANS[2]]


def all_of(rank: int, steps: list[str], clips: list[str]) -> dict[str, Any]:
    return {plan: step_of(plan, rank, train=True) for plan in steps} | {("clip", p): clipped(p, rank) for p in clips}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return launch(2, all_of, [*STAGES, *RECOMPUTED], CLIPPED)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (one,) = launch(1, all_of, ["dp=1"], [])
    return one["dp=1"]


@pytest.mark.multiproc
@pytest.mark.parametrize("plan", [*STAGES, *RECOMPUTED])
def test_a_step_with_dropout_equals_one_process(ranks, alone, plan):
    for have in ranks:
        assert have[plan]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        close(have[plan]["gradients"], alone["gradients"], 1e-5)


@pytest.mark.slow
@pytest.mark.multiproc
def test_every_way_to_recompute_equals_one_process(alone):
    for have in launch(2, all_of, ALL_RECOMPUTED, []):
        for plan in ALL_RECOMPUTED:
            assert have[plan]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            close(have[plan]["gradients"], alone["gradients"], 1e-5)


@pytest.mark.multiproc
@pytest.mark.parametrize("plan", [*STAGES, *RECOMPUTED])
def test_ranks_issue_the_same_collectives_in_the_same_order(ranks, plan):
    first, second = ((have[plan]["forward"], have[plan]["backward"]) for have in ranks)
    assert first == second and first[1]


@pytest.mark.multiproc
def test_what_is_communicated_in_each_half(ranks):
    def counts(plan: str) -> list[int]:
        made = ranks[0][plan]
        return [sum(name == kind for name, *_ in made[half]) for half in ("forward", "backward")
                for kind in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")]

    parameters = list(net()[0].named_parameters())
    scalars = sum(p.numel() == 1 for _, p in parameters)
    parts = len(parameters) - scalars
    # The forward sums the loss and the number of its rows.
    assert counts("dp=2,recompute=none") == [0, 0, 2, 0, 0, len(parameters)]
    assert counts("dp=2,zero=1") == counts("dp=2,zero=2") == [parts, 0, 2, 0, parts, scalars]
    gathered = counts("dp=2,zero=3")
    assert gathered[:3] == [parts, 0, 2] and gathered[4:] == [parts, scalars]
    assert 2 * 4 <= gathered[3] < parts  # the weights of two blocks, and not the table that the head needs at once


@pytest.mark.multiproc
@pytest.mark.parametrize("plan", CLIPPED)
def test_clipping_is_by_the_norm_of_the_full_gradients(ranks, plan):
    for have in (rank["clip", plan] for rank in ranks):
        assert have["dtypes"] == {torch.float32}
        flat = torch.cat([g.reshape(-1) for g in have["before"].values()]).double()
        for kind, norm in have["norms"].items():
            assert norm == pytest.approx(flat.norm(kind).item(), rel=1e-5)
        assert have["norms"][2.0] > 0.5
        close(have["after"], {n: g * (0.5 / flat.norm()).float() for n, g in have["before"].items()}, 1e-5)
