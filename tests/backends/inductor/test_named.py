"""named: what profiles of compiled code call its operators."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxpar
from fxpar import compat
from fxpar.backends.inductor.casts import GATHER_CASTS
from fxpar.backends.inductor.named import name_operators
from tests.processes import launch

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def of(node: fx.Node, module: str, back: bool = False) -> fx.Node:
    node.meta["fwd_nn_module_stack" if back else "nn_module_stack"] = {"": ("", nn.Module), module: (module, nn.Linear)}
    return node


@pytest.fixture
def names(monkeypatch) -> dict[str, str]:
    found: dict[str, str] = {}
    monkeypatch.setattr(compat, "name_in_code", lambda node, name, alone: found.update({node.name: name}))
    return found


def test_what_computes_is_called_after_its_module(names):
    graph = fx.Graph()
    x = graph.placeholder("x")
    mm = of(graph.call_function(aten.mm.default, (x, x)), "layers.0.up")
    view = of(graph.call_function(aten.view.default, (mm, [-1])), "layers.0.up")
    back = of(graph.call_function(aten.mul.Tensor, (view, view)), "layers.0.norm", back=True)
    plain = graph.call_function(aten.add.Tensor, (back, back))
    graph.output((plain,))
    name_operators(graph, {})
    assert names == {mm.name: "layers.0.up: mm", back.name: "layers.0.norm: mul backward", plain.name: "the model: add"}


def test_what_communicates_is_called_after_its_axes_and_whom_it_serves(names):
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    parts = [of(graph.call_function(aten.neg.default, (v,)), f"layers.{i}.up") for i, v in enumerate((x, y))]
    gather = of(graph.call_function(c10d.all_gather_into_tensor_coalesced.default, (parts, 2, "7")), "layers.0.up")
    first = graph.call_function(c10d.wait_tensor.default, (graph.call_function(aten.neg.default, (x,)),))
    wait = graph.call_function(c10d.wait_tensor.default, (graph.call_function(operator.getitem, (gather, 0)),))
    scatter = of(graph.call_function(c10d.reduce_scatter_tensor.default, (wait, "sum", 2, "8")), "layers.1.down", back=True)
    other = of(graph.call_function(c10d.all_reduce.default, (scatter, "sum", "9")), "layers.1.down")
    cast = of(graph.call_function(GATHER_CASTS, (parts, torch.bfloat16, 2, "8", [2])), "layers.0.up")
    graph.output((other, first, cast))
    name_operators(graph, {"7": "dp", "8": "dp+cp"})
    assert names[cast.name] == "all_gather over dp+cp for layers.0.up and 1 more"
    assert names[gather.name] == "all_gather over dp for layers.0.up and 1 more"
    assert names[wait.name] == "wait for all_gather over dp for layers.0.up and 1 more"
    assert names[scatter.name] == "reduce_scatter over dp+cp for layers.1.down"
    assert names[other.name] == "layers.1.down: all_reduce"  # over a group that nobody named


class Tower(nn.Module):
    """Equal layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}) for _ in range(8))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(x).square().sum()


def profiled(rank: int, plan: str, blocks: str, folder: str) -> tuple[list[float], list[str]]:
    """Losses of a step before, under and after a profiler; the ranges of the trace that it wrote."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    module = fxpar.parallelize(Tower(), plan, (x,), backend="inductor", blocks=blocks)
    losses = [float(module.train_step(x))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        losses.append(float(module.train_step(x)))
    losses.append(float(module.train_step(x)))
    file = Path(folder) / f"trace{rank}.json"
    profile.export_chrome_trace(str(file))
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return losses, [e["name"] for e in events if e.get("cat") == "user_annotation"]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["flat", "once"])
def test_a_trace_of_a_compiled_step_says_modules_and_collectives(tmp_path, blocks):
    for losses, names in launch(2, profiled, "tp=2", blocks, str(tmp_path), timeout=400):
        assert len(set(losses)) == 1
        for i in range(8):
            for end in ("up: mm", "up: mm backward", "down: mm", "down: mm backward"):
                assert f"layers.{i}.{end}" in names
            assert f"reduce_scatter over tp for layers.{i}.down" in names
            assert f"wait for all_gather over tp for layers.{i}.up" in names
        assert "head: mm backward" in names
