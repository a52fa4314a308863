"""Parameters as DTensors: each rank holds the part that the sharding says, and DTensor knows which part that is."""

from __future__ import annotations

import functools
import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import fxpar
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.run import storage
from fxpar.sharding.factors import Factors, leaves
from fxpar.sharding.layout import Sharding, sharding_of, take
from fxpar.sharding.mesh import BoundMesh, Mesh
from tests import zoo
from tests.harness import random_dims, random_layout
from tests.processes import launch

MESH = Mesh(("dp", "tp"), (2, 2))
FUSED = {"gpt2": True, "phi3": True, "falcon": False}
"""Models with a fused qkv; whether tensor parallelism leaves each rank several pieces of it."""


def fused(r: Random) -> Any:
    """The dims of a fused weight of query, key and value, or of gate and up."""
    factors = Factors()
    rows = tuple(f for n in (r.choice([2, 3]), 4, r.choice([2, 8])) for f in factors.new(n))
    return factors.beside((rows, factors.new(r.choice([4, 6])))[: r.choice([1, 2, 2])])


def example(seed: int) -> tuple[Sharding, torch.Tensor]:
    r = Random(seed)
    dims = fused(r) if seed % 2 else random_dims(r)
    layout = random_layout(r, [f for d in dims for f in leaves(d)], MESH, 0.8)
    shape = [math.prod(f.size for f in d) for d in dims]
    return sharding_of(dims, layout, MESH), torch.arange(math.prod(shape)).reshape(shape)


def one_axis_a_dim(sharding: Sharding) -> bool:
    return all(len({a for piece in dim for a in piece.axes}) < 2 for dim in sharding)


def distributed(rank: int, seeds: list[int]) -> dict[str, int]:
    """How many examples of each kind agree; fails with the first that does not."""
    bound, seen = BoundMesh(MESH, "cpu"), {"one axis": 0, "two axes": 0, "strided": 0}
    for seed in seeds:
        sharding, x = example(seed)
        made = storage.distribute(x, sharding, bound, torch.device("cpu"))
        part = take(x, sharding, MESH, rank)
        text = f"seed {seed}: {sharding} as {made.placements!r}"
        assert made.shape == x.shape and torch.equal(made.to_local(), part), text
        assert torch.equal(distribute_tensor(x, bound.device_mesh, made.placements).to_local(), part), text
        assert torch.equal(storage.unshard(part, sharding, x.shape, bound, GroupRuntime(bound)), x), text
        assert torch.equal(made.full_tensor(), x), text
        seen["one axis" if one_axis_a_dim(sharding) else "two axes"] += 1
        seen["strided"] += any("Strided" in repr(p) for p in made.placements)
    return seen


@pytest.mark.multiproc
@pytest.mark.parametrize("examples", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_dtensor_and_take_agree_about_random_tilings(examples):
    for seen in launch(4, distributed, list(range(examples))):
        assert min(seen.values()) >= examples // 8


def test_a_meta_tensor_becomes_an_empty_part():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    bound = BoundMesh(Mesh(("dp",), (1,)), "cpu")
    made = storage.parameter(nn.Parameter(torch.empty(4, 2, device="meta")), ((), ()), bound, torch.device("cpu"))
    assert made.shape == (4, 2) and made.to_local().device.type == "cpu" and made.requires_grad


def gathered(t: Any) -> Tensor:
    """The full tensor, by DTensor's own means; fails where they disagree about it."""
    if not isinstance(t, DTensor):
        return t.detach().clone()
    full = t.detach().full_tensor()
    everywhere = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)
    assert torch.equal(t.full_tensor(), full) and torch.equal(everywhere.to_local(), full)
    assert torch.equal(everywhere.redistribute(placements=t.placements).to_local(), t.to_local())
    again = distribute_tensor(full, t.device_mesh, t.placements)
    assert torch.equal(again.to_local(), t.to_local()) and not (t - again).to_local().any()
    return full


def state_after_step(model: nn.Module, batch: Any, clip: Any) -> dict[str, dict[str, Tensor]]:
    """What a training loop has in its hands after one step, gathered."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**batch).loss.backward()
    norm = clip(1.0)
    gradients = {n: gathered(p.grad) for n, p in model.named_parameters()}
    optimizer.step()
    return {
        "norm": {"all": gathered(torch.as_tensor(norm))},
        "gradients": gradients,
        "parameters": {n: gathered(p) for n, p in model.named_parameters()},
        "moments": {n: gathered(optimizer.state[p]["momentum_buffer"]) for n, p in model.named_parameters()},
        "state dict": {n: gathered(t) for n, t in model.state_dict().items()},
    }


def state_of_rank(rank: int, plan: str, names: list[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    dp, tp = fxpar.Plan.parse(plan).dp, fxpar.Plan.parse(plan).tp
    out = {}
    for name in names:
        model, batch = zoo.build(name)
        mine = {k: v.chunk(dp)[rank // tp] for k, v in batch.items()}
        module = fxpar.parallelize(model.eval(), plan, mine, backend="eager")
        assert any("Strided" in repr(p.placements) for p in module.parameters()) == FUSED[name], name
        out[name] = state_after_step(module, mine, module.clip_grad_norm_)
    return out


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan, names", [("dp=2,tp=2,zero=3", ["gpt2"]), *(
    (plan, list(FUSED)) for plan in ("dp=2,tp=2,zero=3", "tp=4", "dp=2,tp=2,zero=1"))])
def test_whatever_is_held_of_fused_weights_can_be_gathered(plan, names):
    ranks = launch(4, state_of_rank, plan, names)
    for name in names:
        model, batch = zoo.build(name)
        want = state_after_step(model.eval(), batch, functools.partial(nn.utils.clip_grad_norm_, list(model.parameters())))
        for kind, tensors in want.items():
            for have in ranks:
                assert have[name][kind].keys() == tensors.keys()
                for n, t in tensors.items():
                    torch.testing.assert_close(have[name][kind][n], t, rtol=1e-3, atol=1e-5, msg=f"{name}: {kind} of {n}")
