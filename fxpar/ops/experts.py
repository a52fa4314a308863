"""Rows in the order of their experts: what a mixture of experts does to tokens, without a place in the whole batch.

`order_of` sorts rows by the expert that each is for, `take_rows` and `put_back` bring rows into that order and out of it, and
`expert_product` multiplies each by its expert's matrix. Of a part of the tokens they make that part of the result, whatever
order the rows have between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxpar.ops.grouped_mm import grouped_mm


def order_of(experts: Tensor) -> Tensor:
    """experts [n] integer, of every row -> [n] int64: the rows, those of the first expert first; of one expert in their order."""
    return torch.sort(experts, stable=True).indices


def take_rows(x: Tensor, order: Tensor, times: int) -> Tensor:
    """x [n / times, ...], order [n] -> [n, ...]: the rows of `x`, each of which stands for `times` in a row, in that order."""
    return x[order // times] if times > 1 else x[order]


def put_back(rows: Tensor, order: Tensor) -> Tensor:
    """The inverse of ``take_rows(x, order, 1)``: rows [n, ...], order [n] -> [n, ...]."""
    places = torch.arange(len(order), device=order.device)
    return rows[torch.empty_like(order).scatter(0, order, places)]


def group_ends(experts: Tensor, count: int) -> Tensor:
    """experts [n], sorted -> [count] int32: behind which row each expert's end, as `grouped_mm` takes it."""
    numbers = torch.arange(count, dtype=experts.dtype, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True, out_int32=True)


def expert_product(rows: Tensor, weights: Tensor, experts: Tensor, order: Tensor) -> Tensor:
    """rows [n, k], weights [e, k, m], experts [n] -> [n, m]: each row times its expert's matrix; zero for experts from `e` on.
    Rows and experts are in the `order` that sorts the experts."""
    return grouped_mm(rows, weights, group_ends(experts, len(weights)))
