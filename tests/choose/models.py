"""What tests of suggestions search plans for: a small model whose parts all split, and a cluster of one's own."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fxpar.choose.facts
from fxpar.choose.facts import ModelFacts, facts_of
from fxpar.compiler import Captured, capture
from fxpar.cost.clusters import Cluster, cluster
from fxpar.plan import Plan

WIDTH, INNER, BLOCKS, ROWS = 64, 256, 4, 16
CLUSTER = """
[device]
name = "a device of one's own"
memory_mib = 8
memory_bandwidth = 1e12
source = "made up"

[flops]
float32 = 1e12
source = "made up"

[efficiency]
float32 = 0.5
source = "made up"

[[links]]
level = "host"
ranks = 4
alpha = 1e-7
beta = 1e10
peak = 1e10
source = "made up"

[[links]]
level = "network"
alpha = 1e-6
beta = 1e9
peak = 1e9
source = "made up"
"""


class Block(nn.Module):
    """Made by one weight and contracted by another: what tp splits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        loss: Tensor = self.head(x).square().mean()
        return loss


def blocks() -> tuple[nn.Module, tuple[Tensor]]:
    """What ``tests.choose.models:blocks`` names: a model and its inputs."""
    torch.manual_seed(0)
    return Blocks(), (torch.randn(ROWS, WIDTH),)


@functools.cache
def captured() -> Captured:
    return capture(*blocks())


def cluster_file(folder: Path) -> str:
    path = folder / "own.toml"
    path.write_text(CLUSTER)
    return str(path)


@functools.cache
def machine() -> Cluster:
    with tempfile.TemporaryDirectory() as folder:
        return cluster(cluster_file(Path(folder)))


@functools.cache
def facts() -> ModelFacts:
    """Of plans that recompute nothing: the fewest graphs are traced."""
    with mock.patch.object(fxpar.choose.facts, "RECOMPUTE", ("none",)):
        return facts_of(captured(), Plan(outputs="loss"), machine())
