"""together: ring attention of all ranks of a mesh in one process, with gradients: what a simulation runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpar.ops.ring.algorithm import Rank, backward, forward
from fxpar.ops.ring.drive import Asking, lock_step
from fxpar.ops.ring.operator import as_results, rank_of, ring_attention
from fxpar.ops.ring.sight import Ids
from fxpar.sharding.mesh import Mesh

_SIGNATURE = inspect.signature(ring_attention)
_TENSORS = ("q", "k", "v", "q_segments", "kv_segments", "kv_valid")


def attend_together(mesh: Mesh, calls: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Tensor]:
    """What every rank's ``ring_attention(*args, **kwargs)`` returns, from the arguments of all of them, by rank."""
    bound = [_SIGNATURE.bind(*args, **kwargs).arguments for args, kwargs in calls]
    settings = {name: value for name, value in bound[0].items() if name not in (*_TENSORS, "axes")}
    groups = mesh.groups(bound[0]["axes"])
    return list(_Together.apply(groups, settings, *(b.get(name) for b in bound for name in _TENSORS)))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups: list[list[int]], settings: dict[str, Any], *tensors: Tensor | None):
        ctx.groups, ctx.settings = groups, settings
        ranks = _ranks(groups, settings, tensors)
        wide = _in_groups(groups, lambda r: forward(ranks[r]))
        outs = [as_results(ranks[r].q.dtype, out)[0] for r, (out, _) in enumerate(wide)]
        ctx.save_for_backward(*tensors, *outs, *(lse for _, lse in wide))
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        count = len(grads)
        tensors, saved = ctx.saved_tensors[: -2 * count], ctx.saved_tensors[-2 * count :]
        ranks = _ranks(ctx.groups, ctx.settings, tensors)
        found = _in_groups(ctx.groups, lambda r: backward(ranks[r], grads[r], saved[r], saved[count + r]))
        of_tensors = [[*as_results(rank.q.dtype, *wide), *[None] * (len(_TENSORS) - 3)]
                      for rank, wide in zip(ranks, found, strict=True)]
        return (None, None, *(g for mine in of_tensors for g in mine))


def _ranks(groups: Iterable[Sequence[int]], settings: dict[str, Any], tensors: Sequence[Tensor | None]) -> list[Rank]:
    """What the algorithm is told of every rank of the mesh."""
    found: dict[int, Rank] = {}
    for group in groups:
        for index, rank in enumerate(group):
            q, k, v, *ids = tensors[rank * len(_TENSORS) : (rank + 1) * len(_TENSORS)]
            assert q is not None and k is not None and v is not None
            found[rank] = rank_of(index, len(group), q, k, v, Ids(*ids), **settings)
    return [found[r] for r in range(len(found))]


def _in_groups(groups: Iterable[Sequence[int]], make: Callable[[int], Asking[Any]]) -> list[Any]:
    """By rank, what the ranks' generators return."""
    found = {rank: result for group in groups for rank, result in zip(group, lock_step([make(r) for r in group]), strict=True)}
    return [found[r] for r in range(len(found))]
