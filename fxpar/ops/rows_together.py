"""Exchanges of rows with their experts (see fxpar/ops/exchange.py) by all ranks of a mesh at once, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpar.ops.exchange import Arrival, arriving, leaving, runs_of, to_experts
from fxpar.ops.experts import put_back, take_rows
from fxpar.sharding.mesh import Axes, Mesh


def plan_together(mesh: Mesh, experts: Sequence[Tensor], axes: Axes, count: int) -> list[Arrival]:
    """What `exchange_plan` returns on each rank."""
    ranks = mesh.size(*axes)
    out: list[Any] = [None] * mesh.world_size
    for group in mesh.groups(axes):
        mine = torch.stack([leaving(experts[r], count, ranks) for r in group])
        for i, r in enumerate(group):
            splits = torch.stack([mine[i].sum(1), mine[:, i].sum(1)])
            rows = int(mine[:, i].sum())
            order, arrived = arriving(runs_of(mine[:, i]), rows, ranks, count // ranks * i, experts[r].dtype)
            out[r] = order, arrived, splits, order.new_empty(rows, dtype=torch.uint8)
    return out


class _RowsTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: Mesh, axes: Axes, splits: Sequence[Tensor], back: bool, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.given = mesh, axes, splits, back
        return _sent(mesh, axes, splits, back, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mesh, axes, splits, back = ctx.given
        return None, None, None, None, *_sent(mesh, axes, splits, not back, grads)


def _sent(mesh: Mesh, axes: Axes, splits: Sequence[Tensor], back: bool, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = [x.split(s[int(back)].tolist()) for x, s in zip(rows, splits, strict=True)]
    out = list(rows)
    for group in mesh.groups(axes):
        for i, r in enumerate(group):
            out[r] = torch.cat([parts[s][i] for s in group])
    return tuple(out)


def exchange_together(target: Callable[..., Tensor], mesh: Mesh, arguments: Sequence[Any]) -> list[Tensor]:
    """What `to_experts` or `to_tokens` returns on each rank, from its arguments there."""
    rows, axes, orders, splits, *_ = zip(*arguments, strict=True)
    if target is to_experts:
        made = _RowsTogether.apply(mesh, axes[0], splits, False, *rows)
        return [take_rows(x, order, 1) for x, order in zip(made, orders, strict=True)]
    rows = tuple(put_back(x, order) for x, order in zip(rows, orders, strict=True))
    return list(_RowsTogether.apply(mesh, axes[0], splits, True, *rows))
