"""Gradient clipping over every rank, each element counted once."""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from fxpar import compat
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.elementwise import scale_
from fxpar.sharding.mesh import Axes, BoundMesh


def clip_grad_norm(parameters: dict[nn.Parameter, bool], max_norm: float, norm_type: float, bound: BoundMesh,
                   runtime: GroupRuntime) -> Tensor:
    """See `ParallelModule.clip_grad_norm_`. Gradients sharded over the same axes share one all-reduce of a scalar.

    parameters: this rank's, and whether its kind is the one that counts it, where several hold it.
    """
    grads, groups, axes_of = [], defaultdict[Axes, list[Tensor]](list), functools.cache(functools.partial(_split_over, bound))
    for grad, counts in zip(compat.gradients(list(parameters)), parameters.values(), strict=True):
        if grad is None:
            continue
        grads.append(compat.memory(grad) if isinstance(grad, DTensor) else grad)
        if counts:
            groups[axes_of(grad.placements) if isinstance(grad, DTensor) else ()].append(grads[-1])
    device = grads[0].device if grads else torch.device(bound.device_mesh.device_type)
    parts = []
    for axes in sorted(groups):
        norms = torch.stack([n if n.dtype == torch.float32 else n.to(torch.float32)
                             for n in torch._foreach_norm(groups[axes], norm_type)])
        part = norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()
        axes = tuple(a for a in axes if bound.mesh.size(a) > 1)
        parts.append(runtime.all_reduce(part, axes, "max" if math.isinf(norm_type) else "sum") if axes else part)
    parts = parts or [torch.zeros((), device=device)]
    joined = torch.stack(parts).max() if math.isinf(norm_type) else torch.stack(parts).sum()
    if bound.across is not None:
        dist.all_reduce(joined, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=bound.across)
    total = joined if math.isinf(norm_type) else joined ** (1 / norm_type)
    if grads:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        scale_(grads, scale.to(device))
    return total


def _split_over(bound: BoundMesh, placements: tuple[Placement, ...]) -> Axes:
    return tuple(a for a, p in zip(bound.mesh.names, placements, strict=True) if not p.is_replicate())
