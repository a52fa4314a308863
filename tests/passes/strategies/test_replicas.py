"""What ranks hold alike of a parameter gets the same gradient, bit by bit, however each of them rounds."""

import pytest
import torch
from torch import Tensor, fx

import fxpar
from fxpar.backends import simulate
from fxpar.ops import collectives
from tests import zoo


class Rounded(torch.autograd.Function):
    """The value itself; its gradient is off by rounding, on each rank otherwise."""

    @staticmethod
    def forward(ctx, x: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * (1 + 1e-7 * ctx.rank), None


@pytest.mark.parametrize("name, plan, averaged", [
    ("t5", "dp=2", 2),  # the tables of relative positions, looked up in alike by all replicas
    ("gpt2", "dp=2", 1),  # the table of positions
    ("mixtral", "dp=2", 4),  # experts run on the tokens of all replicas
    ("gpt2", "tp=2,sequence_parallel=false", 15),  # norms, and what is added after sums
    ("t5", "dp=2,tp=2,sequence_parallel=false", 14),
    ("t5", "dp=2,zero=3", 0),  # stored in parts: nothing is held twice
    ("llama", "dp=2,tp=2", 0),  # all gradients are summed
    ("llama", "tp=2,sequence_parallel=false", 5),
    ("vit", "tp=2", 18),  # a sequence that does not divide
])  # fmt: skip
def test_replicas_stay_the_same(name, plan, averaged, monkeypatch):
    model, batch = zoo.build(name)
    simulation = fxpar.simulate(model, plan, batch)
    nodes = [n for n in simulation.program.graph.nodes if n.target is collectives.average]
    assert len(nodes) == averaged
    call, seen = simulate._call, {}

    def rounding(node: fx.Node, env: dict, rank: int) -> object:
        out = call(node, env, rank)
        return Rounded.apply(out, rank) if isinstance(out, Tensor) and out.requires_grad else out

    monkeypatch.setattr(simulate, "_call", rounding)
    monkeypatch.setattr("fxpar.verify.step._check_replicas", lambda name, parts, total, sharding, mesh: seen.update(
        {name: (parts, sharding)}))
    simulation.step(**batch)
    mesh = simulation.program.mesh
    for name, (parts, sharding) in seen.items():
        split = tuple(a for dim in sharding for part in dim for a in part.axes)
        for rank, part in enumerate(parts):
            first = next(r for r in range(mesh.world_size) if mesh.index(r, split) == mesh.index(rank, split))
            assert torch.equal(part, parts[first]), name


def test_without_training_nothing_is_averaged():
    model, batch = zoo.build("t5")
    program = fxpar.compile_program(model.requires_grad_(False), "dp=2", batch)
    assert not any(n.target is collectives.average for n in program.graph.nodes)
