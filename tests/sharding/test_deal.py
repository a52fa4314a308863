"""Dealing sequences to ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpar.plan import Plan
from fxpar.sharding.deal import deal, dealt_from, undeal
from fxpar.sharding.factors import Factor
from fxpar.sharding.layout import Piece, in_order, is_dealt, order_on, put, shard_shape, take
from fxpar.sharding.mesh import Mesh, from_plan

small = st.integers(1, 4)


def test_each_rank_gets_one_chunk_from_either_end():
    assert deal(torch.arange(8), 0, 1, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@given(small, small, small, small)
def test_undealt_it_is_as_it_was(outer, ranks, length, inner):
    x = torch.arange(2 * outer * 2 * ranks * length * inner).reshape(2, -1)
    made = deal(x, 1, outer, ranks)
    assert torch.equal(undeal(made, 1, outer, ranks), x)
    alone = made.reshape(2, outer, -1, inner)
    assert torch.equal(alone, torch.stack([deal(part, 1, 1, ranks) for part in x.reshape(2, outer, -1, inner).unbind(1)], 1))


@given(small, small, small)
def test_to_deal_twice_is_to_deal_to_the_product(one, other, length):
    x = torch.arange(2 * one * other * length)
    parts = deal(x, 0, 1, one).reshape(one, -1)
    assert torch.equal(torch.cat([deal(p, 0, 1, other) for p in parts]), deal(x, 0, 1, one * other))


@given(small, small)
def test_where_it_came_from(ranks, length):
    x = torch.arange(2 * ranks * length)
    assert torch.equal(dealt_from(x, len(x), ranks), deal(x, 0, 1, ranks))


@given(small, small)
def test_causal_work_is_even(ranks, length):
    """The pairs of a query and a key that it sees, rank by rank."""
    at = deal(torch.arange(2 * ranks * length), 0, 1, ranks).reshape(ranks, -1)
    assert len({int((part + 1).sum()) for part in at}) == 1


@pytest.mark.parametrize("axes", [("cp",), ("cp", "tp")])
def test_a_dealt_piece_is_taken_and_put_back(axes):
    mesh = Mesh(("cp", "tp"), (2, 2))
    tiles = ((Piece(3),), (Piece(8, axes, 2), Piece(2)))
    x = torch.randn(3, 16)
    parts = [take(x, tiles, mesh, rank) for rank in range(4)]
    assert all(p.shape == shard_shape(tiles, mesh) for p in parts) and torch.equal(put(parts, tiles, x.shape, mesh), x)
    assert not torch.equal(parts[1], take(x, in_order(tiles), mesh, 1))


@pytest.mark.parametrize("plan, names, ring, a2a", [
    ("dp=2,cp=4,tp=2", ("dp", "cp", "tp"), ("cp",), ()),
    ("cp=4,cp_comm=allgather", ("cp",), ("cp",), ()),
    ("cp=4,cp_comm=a2a", ("cp",), (), ("cp",)),
    ("cp=2,cp_comm=a2a+p2p", ("cp",), (), ("cp",)),
    ("cp=8,tp=2,cp_comm=a2a+p2p", ("cp0", "cp1", "tp"), ("cp0",), ("cp1",)),
])  # fmt: skip
def test_the_axes_of_a_plan(plan, names, ring, a2a):
    mesh = from_plan(Plan.parse(plan))
    assert mesh.names == names and mesh.axes("ring") == ring and mesh.axes("a2a") == a2a
    assert mesh.axes("cp") == ring + a2a and mesh.size(*mesh.axes("cp")) == Plan.parse(plan).cp


def test_zero_stores_over_replicas_and_context_ranks():
    mesh = from_plan(Plan.parse("dp=4,dp_replicate=2,cp=2,tp=2,zero=3"))
    assert mesh.axes("zero") == ("dp_shard", "cp") and mesh.data == ("dp_replicate", "dp_shard", "cp")


def test_heads_are_split_by_tp_first():
    mesh = from_plan(Plan.parse("cp=2,tp=2,cp_comm=a2a"))
    heads, sequence = Factor(8, 0), Factor(8, 1)
    heads.role, sequence.causal = "heads", True
    assert order_on(heads, mesh) == ("tp", "cp") and order_on(sequence, mesh) == ("cp", "tp")
    assert is_dealt(sequence, "cp", mesh) and not is_dealt(sequence, "tp", mesh) and not is_dealt(heads, "cp", mesh)
