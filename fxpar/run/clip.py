"""Gradient clipping over every rank, each element counted once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.elementwise import scale_
from fxpar.sharding.mesh import Axes, BoundMesh


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float, norm_type: float, bound: BoundMesh,
                   runtime: GroupRuntime) -> Tensor:
    """See `ParallelModule.clip_grad_norm_`. Gradients sharded over the same axes share one all-reduce of a scalar."""
    grads = [p.grad for p in dict.fromkeys(parameters) if p.grad is not None]
    groups: dict[Axes, list[Tensor]] = {}
    for grad in grads:
        axes: Axes = ()
        local = grad
        if isinstance(grad, DTensor):
            axes = tuple(a for a, p in zip(bound.mesh.names, grad.placements, strict=True) if not p.is_replicate())
            local = compat.local_part(grad)
        groups.setdefault(axes, []).append(local)
    device = grads[0].device if grads else torch.device("cpu")
    parts = []
    for axes in sorted(groups):
        norms = torch.stack([n.to(torch.float32) for n in torch._foreach_norm(groups[axes], norm_type)])
        part = norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()
        axes = tuple(a for a in axes if bound.mesh.size(a) > 1)
        parts.append(runtime.all_reduce(part, axes, "max" if math.isinf(norm_type) else "sum") if axes else part)
    if not parts:
        return torch.zeros((), device=device)
    total = torch.stack(parts).max() if math.isinf(norm_type) else torch.stack(parts).sum() ** (1 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for tensors in groups.values():
        scale_(tensors, scale.to(tensors[0].device))
    return total
