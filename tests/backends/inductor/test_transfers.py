"""Gathers of parameters and reductions of gradients stand before products, and graphs are cut around them: made by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import fx, nn

from fxpar import compat
from fxpar.backends.inductor import buckets, pieces, prefetch, transfers
from fxpar.backends.remat import UNSHARD
from tests.graphs import Made, keeps_values

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
BLOCKS = 9
GATHER, SCATTER = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default


def chain(made: Made, x: fx.Node, name: str, count: int = 8) -> fx.Node:
    """Operators that are kernels together."""
    for k in range(count):
        x = made.call(f"{name}_{k}", aten.tanh.default if k % 2 else aten.neg.default, x)
    return x


def deep(group: str) -> Made:
    """Blocks of which each gathers its parameter, and returns a gradient that is scattered."""
    made = Made()
    x, *parameters = (made.input(name) for name in ("x", *(f"p{i}" for i in range(BLOCKS))))
    out = []
    for i, p in enumerate(parameters):
        wait = made.gathered(f"p{i}", p, group)
        wait.args[0].meta["custom"] = {UNSHARD: True}
        scaled = made.call(f"scaled_{i}", aten.mul.Tensor, x, wait)
        y = chain(made, scaled, f"norm_{i}")
        x = made.call(f"use_{i}", aten.mm.default, y, wait)
        out.append(made.scattered(f"g{i}", made.call(f"grad_{i}", aten.mm.default, y, x), group))
    made.graph.output((x, *out))
    return made


def scheduled(group: str) -> Made:
    made = deep(group)
    prefetch.prefetch_parameters(made.graph, 1, by_block=True)
    buckets.bucket_reductions(made.graph, 1, by_block=True)
    return made


def cut(made: Made) -> compat.Pieces:
    found = pieces.cut_into_pieces(fx.GraphModule(nn.Module(), made.graph))
    assert found is not None
    return found


def test_what_brings_parameters_in_and_takes_gradients_out(one_thread):
    made = deep(one_thread)
    kinds = transfers.transfers_of(made.graph)
    names = {kind: {n.name for n, k in kinds.items() if k == kind} for kind in kinds.values()}
    assert names[transfers.GATHERED] == {n.name for n in made.graph.find_nodes(op="call_function", target=GATHER)}
    assert names[transfers.REDUCED] == {n.name for n in made.graph.find_nodes(op="call_function", target=SCATTER)}
    assert len(names[transfers.TAKEN_OUT]) == BLOCKS and all(n.users for n in made.graph.nodes if n in kinds)


def test_what_a_collective_makes_for_another_operator_is_no_transfer(one_thread):
    made = Made()
    x = made.input("x")
    passed = made.scattered("s", made.call("y", aten.mm.default, x, x), one_thread)
    made.graph.output((made.call("z", aten.mul.Tensor, passed, made.call("w", aten.neg.default, x)), passed))
    assert transfers.transfers_of(made.graph) == {}


def test_transfers_stand_before_products(one_thread):
    made = keeps_values(scheduled(one_thread), transfers.transfers_before_products)
    kinds, nodes = transfers.transfers_of(made.graph), [n for n in made.graph.nodes if n.op != "placeholder"]
    followed = [b for a, b in pairwise(nodes) if a in kinds and b not in kinds]
    needed = [n for n in followed if any(k in kinds for k in n.all_input_nodes)]
    assert followed and all(transfers.is_kernel(n) or n in needed or n.op == "output" for n in followed)
    assert len(needed) <= 2  # what the first block waits for cannot begin later


def test_nothing_moves_past_what_writes(one_thread):
    made = Made()
    x, p = made.input("x"), made.input("p")
    start = made.gathered("p", p, one_thread).args[0]
    written = made.call("written", aten.mul_.Tensor, p, 2.0)
    used = made.call("use", aten.mm.default, x, written)
    made.graph.output((used, *start.users))
    assert start.next is not written
    transfers.transfers_before_products(made.graph)
    order = [n.name for n in made.graph.nodes]
    assert order.index(start.name) < order.index("written")


@pytest.mark.parametrize("before_products", [False, True])
def test_blocks_at_both_ends_are_the_pieces_of_those_between(one_thread, before_products):
    made = scheduled(one_thread)
    if before_products:
        transfers.transfers_before_products(made.graph)
    found = cut(made)
    bodies = Counter(p.kind for p in found.pieces if any(transfers.is_kernel(n) for n in found.graphs[p.kind].graph.nodes))
    assert max(bodies.values()) >= BLOCKS - 1
    inputs = [torch.randn(n.meta["val"].shape) for n in made.graph.find_nodes(op="placeholder")]
    want = fx.Interpreter(fx.GraphModule(nn.Module(), made.graph)).run(*inputs)
    assert all(map(torch.equal, compat.interpret_pieces(found, fx.Interpreter)(list(inputs)), want))
