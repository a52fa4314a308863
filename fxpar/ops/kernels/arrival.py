"""Where rows belong, in one kernel: of those that arrive from other ranks, and of those whose order is undone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
LONGEST = 2048
"""How many runs of rows a kernel looks through."""


@triton.jit
def _arrive(RUNS, ORDER, EXPERTS, rows, runs, ranks, first, ROWS: tl.constexpr, RUNS_UP: tl.constexpr):
    """A program for each ROWS places: the run of each is as many as end before it."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, RUNS_UP)
    ends = tl.load(RUNS + number, mask=number < runs, other=rows)
    run = tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), axis=1)
    there = place < rows
    further = tl.load(RUNS + runs + run, mask=there, other=0)
    tl.store(ORDER + place, place + further, mask=there)
    tl.store(EXPERTS + place, (first + run // ranks).to(EXPERTS.dtype.element_ty), mask=there)


@triton.jit
def _invert(ORDER, INVERSE, rows, ROWS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = place < rows
    tl.store(INVERSE + tl.load(ORDER + place, mask=there, other=0), place, mask=there)


def place_arrivals(runs: Tensor, rows: int, ranks: int, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """runs [2, at most LONGEST] int64, as `fxpar.ops.exchange.arriving` takes them, on a GPU -> order and experts [rows]."""
    order = torch.empty(rows, dtype=torch.int64, device=runs.device)
    experts = torch.empty(rows, dtype=dtype, device=runs.device)
    if rows:
        count = runs.shape[1]
        _arrive[(triton.cdiv(rows, ROWS),)](runs, order, experts, rows, count, ranks, first, ROWS, triton.next_power_of_2(count))
    return order, experts


def invert_order(order: Tensor) -> Tensor:
    """order [n] int64, a permutation, on a GPU -> [n]: where each number stands in it."""
    inverse = torch.empty_like(order)
    if order.numel():
        _invert[(triton.cdiv(order.numel(), ROWS),)](order, inverse, order.numel(), ROWS)
    return inverse
