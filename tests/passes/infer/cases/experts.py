"""Random arguments for rows in the order of their experts. By itself an operator does not know what an order was made from."""

from __future__ import annotations

import torch

from fxpar.ops.experts import combine, expert_product, expert_rows, order_of, put_back, sort_experts, take_rows
from tests.harness import Gen
from tests.passes.infer.cases.registry import case


@case(order_of)
def order(g: Gen):
    return g.i(3, g.pick(4, 6, 8)), 3


@case(sort_experts)
def sorted_experts(g: Gen):
    ids = g.i(3, g.pick(4, 6, 8))
    return ids, order_of(ids, 3)


@case(take_rows)
def take(g: Gen):
    tokens, times = g.pick(2, 4, 6), g.pick(1, 2, 3)
    return g.f(tokens, *g.shape(0, 2)), torch.randperm(tokens * times, generator=g.torch), times


@case(put_back)
def back(g: Gen):
    rows = g.pick(4, 6, 8)
    return g.f(rows, *g.shape(0, 2)), torch.randperm(rows, generator=g.torch)


@case(combine)
def combined(g: Gen):
    tokens, times = g.pick(2, 4, 6), g.pick(1, 2, 3)
    return g.f(tokens * times, *g.shape(0, 2)), torch.randperm(tokens * times, generator=g.torch), times


@case(expert_product)
def product(g: Gen):
    """Some rows may be of an expert that is not there."""
    experts, rows = g.pick(2, 3, 4), g.pick(4, 6, 8)
    return g.f(rows, 32), g.f(experts, 32, g.pick(32, 64)), g.i(experts + 1, rows).sort().values


@case(expert_rows)
def table(g: Gen):
    experts = g.pick(2, 3, 4)
    return g.f(experts, *g.shape(0, 2)), g.i(experts + 1, g.pick(4, 6, 8)).sort().values
