"""Parameters as DTensors: each rank holds the part that the tiling says, and DTensor knows which part that is."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from fxpar import storage
from fxpar.backends.runtime import GroupRuntime
from fxpar.mesh import BoundMesh, Mesh
from fxpar.passes.factors import Factors, leaves
from fxpar.passes.layout import Tiling, take, tiling
from tests.harness import random_dims, random_layout
from tests.processes import launch

MESH = Mesh(("dp", "tp"), (2, 2))


def fused(r: Random) -> Any:
    """The dims of a fused weight of query, key and value, or of gate and up."""
    factors = Factors()
    rows = tuple(f for n in (r.choice([2, 3]), 4, r.choice([2, 8])) for f in factors.new(n))
    return factors.beside((rows, factors.new(r.choice([4, 6])))[: r.choice([1, 2, 2])])


def example(seed: int) -> tuple[Tiling, torch.Tensor]:
    r = Random(seed)
    dims = fused(r) if seed % 2 else random_dims(r)
    layout = random_layout(r, [f for d in dims for f in leaves(d)], MESH, 0.8)
    shape = [math.prod(f.size for f in d) for d in dims]
    return tiling(dims, layout, MESH), torch.arange(math.prod(shape)).reshape(shape)


def one_axis_a_dim(tiles: Tiling) -> bool:
    return all(len({a for piece in dim for a in piece.axes}) < 2 for dim in tiles)


def distributed(rank: int, seeds: list[int]) -> dict[str, int]:
    """How many examples of each kind agree; fails with the first that does not."""
    bound, seen = BoundMesh(MESH, "cpu"), {"one axis": 0, "two axes": 0, "strided": 0}
    for seed in seeds:
        tiles, x = example(seed)
        made = storage.distribute(x, tiles, bound, torch.device("cpu"))
        part = take(x, tiles, MESH, rank)
        text = f"seed {seed}: {tiles} as {made.placements!r}"
        assert made.shape == x.shape and torch.equal(made.to_local(), part), text
        assert torch.equal(distribute_tensor(x, bound.device_mesh, made.placements).to_local(), part), text
        assert torch.equal(storage.whole(part, tiles, x.shape, bound, GroupRuntime(bound)), x), text
        if one_axis_a_dim(tiles):
            assert torch.equal(made.full_tensor(), x), text
        seen["one axis" if one_axis_a_dim(tiles) else "two axes"] += 1
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
