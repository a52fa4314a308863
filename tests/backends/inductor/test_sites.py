"""Numbers of random operators as inputs of their graphs: the same is drawn, and equal layers are equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxpar
from fxpar import compat
from fxpar.backends import repeats
from fxpar.backends.inductor.sites import sites_as_inputs
from fxpar.backends.remat import DRAWN
from fxpar.backends.trace import tensor_inputs_only
from tests.graphs import local_feed

LAYERS = 5


class Draws(nn.Module):
    """Every layer drops, attends with dropout, and adds noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(F.dropout(x, 0.3)).unflatten(-1, (2, 4)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.2).transpose(1, 2).flatten(2) + torch.rand_like(x)
        return x.square().mean()


def graph() -> tuple[fx.GraphModule, list[Tensor]]:
    """The program as a backend has it, and its inputs."""
    torch.manual_seed(0)
    model, batch = Draws(), {"x": torch.randn(2, 5, 8)}
    program = fxpar.compile_program(model, "dp=1", batch)
    feed = local_feed(program, model, batch)
    return tensor_inputs_only(program.module, feed, fused=True)[0], feed


def test_the_same_numbers_are_drawn():
    plain, feed = graph()
    want = plain(*feed)
    sites = sites_as_inputs(plain, feed)
    plain.graph.lint()
    assert sorted(int(x) for x in sites) == sorted([*range(2 * LAYERS), *range(LAYERS)])
    assert all(torch.equal(a, b) for a, b in zip(plain(*feed, *sites), want, strict=True))
    other = plain(*feed, *(x + 1 for x in sites))
    assert not torch.equal(other[0], want[0])


def test_layers_are_equal():
    plain, feed = graph()
    assert repeats.find(plain.graph, lambda n: None, LAYERS - 1) is None
    sites_as_inputs(plain, feed)
    assert repeats.find(plain.graph, lambda n: None, LAYERS - 1) is not None


def test_each_is_an_input_of_its_own():
    """Behind the others, in memory of its own, on the seed's device; marks stay."""
    plain, feed = graph()
    before = plain.graph.find_nodes(op="placeholder")
    marked = [n for n in plain.graph.nodes if n.meta.get("custom", {}).get(DRAWN)]
    sites = sites_as_inputs(plain, feed)
    places = plain.graph.find_nodes(op="placeholder")
    assert places[: len(before)] == before and len(places) == len(before) + len(sites)
    assert len({compat.storage_of(x) for x in sites}) == len(sites)
    assert all(x.dtype == torch.int64 and x.shape == () and not x.requires_grad for x in sites)
    assert marked == [n for n in plain.graph.nodes if n.meta.get("custom", {}).get(DRAWN)] and len(marked) == LAYERS


@pytest.mark.parametrize("example", ["real", "fake"])
def test_inputs_are_like_the_seed(example):
    plain, feed = graph()
    mode = compat.FakeTensorMode()
    given = [mode.from_tensor(x) for x in feed] if example == "fake" else feed
    assert all(isinstance(x, compat.FakeTensor) == (example == "fake") for x in sites_as_inputs(plain, given))


def test_a_program_that_draws_nothing_takes_nothing_more():
    plain = fx.symbolic_trace(nn.Linear(2, 2))
    assert sites_as_inputs(plain, [torch.ones(2)]) == []
