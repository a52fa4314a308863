"""Graphs to try passes on: made by hand, with values, or split by AOTAutograd from a model under a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import partitioners

import fxpar
from fxpar import compat
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.remat import choose_recomputation
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.runtime import use_runtime
from fxpar.program import Program
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.layout import take
from fxpar.sharding.mesh import BoundMesh

c10d = torch.ops._c10d_functional
WAIT = c10d.wait_tensor.default


class Made:
    """A graph under construction, with values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.feeds: list[Tensor] = []

    def input(self, name: str, dtype: torch.dtype = torch.float32, turned: bool = False) -> fx.Node:
        """turned: the transposed tensor is the contiguous one."""
        node = self.graph.placeholder(name)
        value = torch.randn(4, 4, generator=torch.Generator().manual_seed(len(self.feeds))).to(dtype)
        node.meta["val"] = value.t().contiguous().t() if turned else value
        self.feeds.append(node.meta["val"])
        return node

    def call(self, name: str, target: Any, *args: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, name=name)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def waited(self, name: str, target: Any, value: fx.Node, *args: Any) -> fx.Node:
        return self.call(f"wait_{name}", WAIT, self.call(f"start_{name}", target, value, *args))

    def reduced(self, name: str, value: fx.Node, group: str) -> fx.Node:
        return self.waited(name, c10d.all_reduce.default, value, "sum", group)

    def scattered(self, name: str, value: fx.Node, group: str) -> fx.Node:
        return self.waited(name, c10d.reduce_scatter_tensor.default, value, "sum", 1, group)

    def gathered(self, name: str, value: fx.Node, group: str) -> fx.Node:
        return self.waited(name, c10d.all_gather_into_tensor.default, value, 1, group)

    def run(self) -> list[Tensor]:
        return list(fx.Interpreter(fx.GraphModule(nn.Module(), self.graph)).run(*(f.clone() for f in self.feeds)))

    def names(self) -> list[str]:
        return [n.name for n in self.graph.nodes if n.op == "call_function"]


def keeps_values(made: Made, apply: Callable[[fx.Graph], None]) -> Made:
    """A graph behind a pass that changes none of its results."""
    before = made.run()
    apply(made.graph)
    made.graph.lint()
    assert all(map(torch.equal, made.run(), before))
    return made


def local_feed(program: Program, model: nn.Module, batch: dict[str, Tensor], rank: int = 0) -> list[Tensor]:
    """A rank's inputs of a program, in order."""
    values = {"dropout_seed": torch.tensor(7)} | dict(model.named_parameters()) | batch
    return [take(values[s.name].detach(), sharding_at(n), program.mesh, rank).clone().requires_grad_(s.requires_grad)
            for n, s in program.source_of().items()]


def runtime_of(program: Program) -> GroupRuntime:
    runtime = GroupRuntime(BoundMesh(program.mesh, "cpu"))
    runtime.prepare(program.module)
    return runtime


class Halves:
    """A training step's forward and backward graph, as the partitioner splits them under a plan."""

    def __init__(self, model: nn.Module, plan: str, batch: dict[str, Tensor], monkeypatch: Any):
        program = fxpar.compile_program(model, plan, batch)
        feed = local_feed(program, model, batch)
        made: list[tuple[fx.GraphModule, fx.GraphModule]] = []
        split = partitioners.min_cut_rematerialization_partition

        def seen(*args: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            made.append(split(*args, **options))
            return made[-1]

        with monkeypatch.context() as patch, use_runtime(runtime_of(program)):
            patch.setattr(partitioners, "min_cut_rematerialization_partition", seen)
            graph, _ = tensor_inputs_only(program.module, feed)
            with compat.memory_budget(program.plan.memory_budget):
                compat.partition_eagerly(graph, feed, lambda joint: choose_recomputation(joint, program.plan))
        self.forward, self.backward = (half.graph for half in made[0])

    @property
    def saved(self) -> list[fx.Node]:
        """What the forward makes and keeps for the backward: no parameter, and no input."""
        made = {n.name: n for n in self.forward.nodes if n.op == "call_function"}
        return [made[n.name] for n in self.backward.find_nodes(op="placeholder") if n.name in made]

    @property
    def saved_bytes(self) -> int:
        return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in self.saved)


def schedule(graph: fx.Graph, plan: fxpar.Plan) -> None:
    """All graph passes of the inductor backend, in order."""
    for _, apply in inductor.graph_passes(plan):
        apply(graph)


def calls(graph: fx.Graph, *names: str) -> int:
    """How often operators of these names are called, those that are wrapped for their random state included."""
    return sum(_name(n) in names for n in graph.nodes if n.op == "call_function")


def _name(node: fx.Node) -> str:
    wrapped = [a for a in (node.target, *node.args) if isinstance(a, torch._ops.OpOverload)]
    return wrapped[0].overloadpacket.__name__ if wrapped else ""
