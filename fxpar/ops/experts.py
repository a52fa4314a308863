"""Rows in the order of their experts: what a mixture of experts does to tokens, without a place in the whole batch.

`order_of` sorts rows by the expert that each is for, `take_rows` brings rows into that order, `put_back` out of it, and `combine`
adds up those of one token besides; `expert_product` multiplies each by its expert's matrix, and `expert_rows` looks up its
expert's row of a table. Of a part of the tokens they make that part of the result, whatever order the rows have between.

A rank that has some of the experts, and all tokens of its group, has rows for other experts too. `order_of_mine` puts these
behind its own, as complements (``~row``), and the other functions here with "mine" in their names leave them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.kernels import has_triton

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("inverse_order(Tensor order) -> Tensor")
INVERSE = torch.ops.fxpar.inverse_order.default
"""order [n] int64, a permutation -> [n]: where each number stands in it."""


@torch.library.impl(_library, "inverse_order", "CompositeExplicitAutograd")
def _inverse(order: Tensor) -> Tensor:
    if order.is_cuda and has_triton():
        from fxpar.ops.kernels.arrival import invert_order

        return invert_order(order)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


@torch.library.register_fake("fxpar::inverse_order", lib=_library)
def _fake_inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order)


def order_of(experts: Tensor, count: int) -> Tensor:
    """experts [n] integer, of every row, below `count` -> [n] int64: the rows, those of the first expert first; of one expert in
    their order. Rows of no expert (`count` or more) are last."""
    return torch.sort(experts, stable=True).indices


def order_of_mine(experts: Tensor, first: int, count: int, total: int) -> Tensor:
    """The same of `count` of `total` experts, from `first` on; the other rows follow, as complements. Rows of no expert are the
    last expert's rank's, behind those of its own."""
    mine = experts_here(experts, first, count)
    mine = mine + ((mine == count) & ((experts < total) | (first + count < total)))
    order = torch.sort(mine, stable=True).indices
    return torch.where(mine[order] <= count, order, ~order)


def experts_here(experts: Tensor, first: int, count: int) -> Tensor:
    """The numbers of experts among the `count` from `first` on; `count` for all others."""
    here = experts - first
    return torch.where((here >= 0) & (here < count), here, count)


def places(order: Tensor) -> Tensor:
    """Of which row each is, complements as well."""
    return torch.where(order < 0, ~order, order)


def of_mine(rows: Tensor, order: Tensor) -> Tensor:
    """rows [n, ...] with zero for those of others, and no gradient of those."""
    return torch.where(_like(order >= 0, rows), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def take_mine(x: Tensor, order: Tensor, times: int) -> Tensor:
    """As `take_rows`; of others' rows no gradient comes back."""
    rows = take_rows(x, places(order), times)
    return torch.where(_like(order >= 0, rows), rows, rows.detach()) if rows.is_floating_point() else rows


def _like(values: Tensor, rows: Tensor) -> Tensor:
    """One value for each row."""
    return values.reshape(-1, *[1] * (rows.dim() - 1))


class _Take(torch.autograd.Function):
    """Its backward puts back and adds up in one order, and not as rows arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.times = times
        return x[order // times] if times > 1 else x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return combine(grad, ctx.saved_tensors[0], ctx.times), None, None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[INVERSE(order)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return take_rows(grad, ctx.saved_tensors[0], 1), None


def take_rows(x: Tensor, order: Tensor, times: int) -> Tensor:
    """x [n / times, ...], order [n] -> [n, ...]: the rows of `x`, each of which stands for `times` in a row, in that order."""
    made: Tensor = _Take.apply(x, order, times)
    return made


def sort_experts(experts: Tensor, order: Tensor) -> Tensor:
    """The experts [n] of rows in their order."""
    return take_rows(experts, order, 1)


def put_back(rows: Tensor, order: Tensor) -> Tensor:
    """The inverse of ``take_rows(x, order, 1)``: rows [n, ...], order [n] -> [n, ...]."""
    made: Tensor = _PutBack.apply(rows, order)
    return made


def combine(rows: Tensor, order: Tensor, times: int, scores: Tensor | None = None) -> Tensor:
    """rows [n, ...], order [n], scores [n] -> [n / times, ...]: put back, each multiplied by its score, and each `times` in a row
    added up."""
    back = put_back(rows, order)
    if scores is not None:
        back = back * _like(scores, back)
    return back.unflatten(0, (-1, times)).sum(1) if times > 1 else back


def group_ends(experts: Tensor, count: int) -> Tensor:
    """experts [n], sorted -> [count] int32: behind which row each expert's end, as `grouped_mm` takes it."""
    numbers = torch.arange(count, dtype=experts.dtype, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True, out_int32=True)


def expert_product(rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """rows [n, k], weights [e, k, m], experts [n], sorted -> [n, m]: each row times its expert's matrix; zero for experts from
    `e` on."""
    return grouped_mm(rows, weights, group_ends(experts, len(weights)))


def product_of_mine(rows: Tensor, weights: Tensor, ends: Tensor, ranks: int) -> Tensor:
    """`grouped_mm` of rows that are also those of other ranks, behind this one's: of `ranks` ranks, each has as many to multiply
    on average."""
    return grouped_mm(rows, weights, ends)


def expert_rows(table: Tensor, experts: Tensor) -> Tensor:
    """table [e, ...], experts [n] -> [n, ...]: each row's expert's; for experts from `e` on the last one's."""
    return table[experts.clamp(max=len(table) - 1)]
