"""`logsumexp` over a long last dim, in parts that a kernel holds in registers; its gradient, where ranks hold parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONGEST, SHORTEST = 128, 32
"""Elements of a part: the largest power of two between them that divides the row."""

LOG2_E = 1 / math.log(2)


def _exp(x: Tensor) -> Tensor:
    """``x.exp()``: a GPU has one instruction for powers of two, and takes eight for powers of e."""
    return (x * LOG2_E).exp2()


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, part: int) -> Tensor:
        parts = x.unflatten(-1, (-1, part))
        most = parts.amax(-1, keepdim=True)
        most = torch.where(most.isfinite(), most, 0.0)
        out = torch.logsumexp(_exp(parts - most).sum(-1).log() + most.squeeze(-1), -1)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out = ctx.saved_tensors
        return grad.unsqueeze(-1) * _exp(x - out.unsqueeze(-1)), None


def logsumexp(x: Tensor) -> Tensor:
    """``torch.logsumexp(x, -1)``: x [..., n], floating point -> [...].

    A row that does not fit into registers is read twice, for its maximum and for its sum. Parts of it that do are
    read once; what is left to do is a logsumexp over the parts. A row that cannot be cut, or is short, stays in one piece.
    """
    part = min(LONGEST, x.shape[-1] & -x.shape[-1])
    if part < SHORTEST or x.shape[-1] < LONGEST * SHORTEST:
        return torch.logsumexp(x, -1)
    return _InParts.apply(x, part)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(x, out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out = ctx.saved_tensors
        return grad * _exp(x - out), None


def known_logsumexp(x: Tensor, out: Tensor) -> Tensor:
    """`out`, the logsumexp of every rank's x together along a dim (kept, of size 1), with its gradient to x.

    Nothing as large as x is kept for it but x, which in a compiled program is made again from what it was cast from.
    """
    return _Known.apply(x, out)
