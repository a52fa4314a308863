"""Rows that go to the ranks of their experts, and come back: by all ranks at once, and by each on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxpar.backends.transport.threads import Threads
from fxpar.ops.exchange import arriving, exchange_plan, runs_of, to_experts, to_tokens
from fxpar.ops.experts import (
    INVERSE,
    combine,
    experts_here,
    of_mine,
    order_of,
    order_of_mine,
    places,
    put_back,
    take_mine,
    take_rows,
)
from fxpar.ops.rows_together import exchange_together, plan_together
from fxpar.ops.runtime import use_runtime
from fxpar.sharding.mesh import Mesh

MESH, AXES = Mesh(("dp", "tp"), (2, 2), {"ep": ("tp",)}), ("tp",)
EXPERTS = 4


def routed(rows: int, none: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Of each rank the experts of its rows, sorted, and rows that say whose they are. none: some are of no expert."""
    torch.manual_seed(rows)
    made = []
    for rank in range(MESH.world_size):
        experts = torch.randint(EXPERTS + none, (rows,)).sort().values
        made.append((experts, experts[:, None] * 100.0 + rank * 10 + torch.arange(rows)[:, None]))
    return made


def alone(given: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """What each rank's rows become where experts are, and behind the way back, with the gradient of the way there."""
    threads = Threads(MESH)

    def body(rank: int) -> Any:
        experts, rows = given[rank]
        rows = rows.clone().requires_grad_()
        with use_runtime(threads.runtime(rank)):
            order, arrived, splits, room = exchange_plan(experts, AXES, EXPERTS)
            there = to_experts(rows, AXES, order, splits, experts, room)
            (there * arrived[:, None]).sum().backward()
            return arrived, there.detach(), to_tokens(there.detach(), AXES, order, splits, experts, room), rows.grad

    return threads.run(body)


@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_go_to_their_experts_and_come_back(rows, none):
    given = routed(rows, none)
    for rank, (arrived, there, back, grad) in enumerate(alone(given)):
        first = MESH.index(rank, AXES) * 2
        mine = (first, first + 1, *([EXPERTS] if none and first else []))
        group = next(g for g in MESH.groups(AXES) if rank in g)
        want = [row for e in mine for r in group for row in given[r][1][given[r][0] == e]]
        assert arrived.tolist() == sorted(arrived.tolist()) and {*arrived.tolist()} <= {*mine}
        torch.testing.assert_close(there, torch.stack(want) if want else there.new_zeros(0, 1))
        torch.testing.assert_close(back, given[rank][1])
        torch.testing.assert_close(grad[:, 0], given[rank][0].float())


def test_all_ranks_at_once_do_what_each_does():
    given = routed(7)
    plans = plan_together(MESH, [e for e, _ in given], AXES, EXPERTS)
    arguments = [(rows, AXES, order, splits, experts, room)
                 for (experts, rows), (order, _, splits, room) in zip(given, plans, strict=True)]
    there = exchange_together(to_experts, MESH, arguments)
    for (arrived, rows, _, _), (_, experts, *_), mine in zip(alone(given), plans, there, strict=True):
        assert torch.equal(arrived, experts) and torch.equal(rows, mine)
    back = exchange_together(to_tokens, MESH, [(x, *rest) for x, (_, *rest) in zip(there, arguments, strict=True)])
    assert all(torch.equal(x, rows) for x, (_, rows) in zip(back, given, strict=True))


def test_parts_of_experts_add_up():
    """Two ranks that have all tokens, and half of the experts each; the row of no expert is the last one's."""
    experts, x = torch.tensor([3, 0, 1, 4, 2, 2]), torch.randn(3, 5, requires_grad=True)
    total, grads = torch.zeros(3, 5), torch.zeros(3, 5)
    for first in (0, 2):
        order = order_of_mine(experts, first, 2, 4)
        here = experts_here(experts[places(order)], first, 2)
        of_none = (experts[places(order)] == 4) & (first == 2)
        assert here.tolist() == sorted(here.tolist()) and torch.equal((here < 2) | of_none, order >= 0)
        rows = of_mine(take_mine(x, order, 2), order)
        total += combine(rows, places(order), 2).detach()
        grads += torch.autograd.grad(rows.sum(), x)[0]
    torch.testing.assert_close(total, x.detach() * 2)
    torch.testing.assert_close(grads, torch.full((3, 5), 2.0))


def test_no_gradient_comes_back_from_rows_of_others():
    """Not even one that is no number."""
    experts, x = torch.tensor([0, 3]), torch.ones(2, 1, requires_grad=True)
    order = order_of_mine(experts, 0, 2, 4)
    rows = take_mine(x, order, 1)
    (grad,) = torch.autograd.grad((of_mine(rows, order) / (rows * (order >= 0)[:, None])).nan_to_num(0).sum() + rows.sum(), x)
    assert grad[1] == 0 and grad.isfinite().all()


def test_bringing_rows_into_an_order_and_out_of_it():
    x, scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(6, dtype=torch.float64, requires_grad=True)
    order = order_of(torch.tensor([2, 0, 1, 1, 0, 2]), 3)
    assert torch.equal(put_back(take_rows(x, order, 2), order), x.repeat_interleave(2, 0))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, order, 2), x)
    assert torch.autograd.gradcheck(lambda x, s: combine(take_rows(x, order, 2), order, 2, s), (x, scores))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks, experts, rows", [(1, 1, 5), (2, 4, 0), (2, 4, 1000), (64, 4, 40_000)])
def test_kernels_say_the_same_of_where_rows_belong(ranks, experts, rows):
    if not torch.cuda.is_available():
        pytest.skip("a GPU is needed")
    torch.manual_seed(rows)
    counts = torch.bincount(torch.randint(ranks * (experts + 1), (rows,)), minlength=ranks * (experts + 1)).view(ranks, -1)
    runs = runs_of(counts)
    want, got = (arriving(r, rows, ranks, 3, torch.int64) for r in (runs, runs.cuda()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True))
    assert torch.equal(want[0].sort().values, torch.arange(rows)) and torch.equal(INVERSE(got[0]).cpu(), INVERSE(want[0]))
