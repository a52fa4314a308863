"""`pick`: one element per row, the label's logit in a cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor


class _Pick(torch.autograd.Function):
    """Gather along the last dim, with a backward that is a comparison instead of a scatter, so that it fuses."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.width, ctx.dtype = x.shape[-1], x.dtype
        inside = (index >= 0) & (index < x.shape[-1])
        safe = torch.where(inside, index, 0)
        return torch.where(inside, x.gather(-1, safe.unsqueeze(-1)).squeeze(-1), 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        columns = torch.arange(ctx.width, device=grad.device, dtype=torch.int32)
        at = index.clamp(-1, ctx.width).to(torch.int32)  # compared once per element of x: half as wide is twice as fast
        return torch.where(columns == at.unsqueeze(-1), grad.unsqueeze(-1), 0.0).to(ctx.dtype), None


def pick(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]`` per row: x [..., v], index [...] int64 -> [...]; 0 where the index lies outside [0, v).

    That zero is what lets ranks that hold different columns add their results.
    """
    return _Pick.apply(x, index)
