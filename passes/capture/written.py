"""Functions of PyTorch that read values in Python, which a trace has none of, written without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_nll_loss(input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6,
                      reduction: str = "mean") -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, which does not look whether variances are negative."""
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if input.shape[:-1] == var.shape != input.shape:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()  # the gradient passes the bound, as PyTorch's does
    loss = 0.5 * (var.log() + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * torch.log(torch.full((), 2 * torch.pi, dtype=loss.dtype, device=loss.device))
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def cov(input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """`torch.cov` of rows that all count the same."""
    if fweights is not None or aweights is not None or input.dim() > 2:
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    rows = input.reshape(1, -1) if input.dim() < 2 else input
    rows = rows.to(torch.promote_types(rows.dtype, torch.get_default_dtype())) if not rows.dtype.is_floating_point and \
        not rows.dtype.is_complex else rows
    centred = rows - rows.mean(1, keepdim=True)
    return (centred @ centred.mH / max(rows.shape[1] - correction, 0)).squeeze()


def corrcoef(input: Tensor) -> Tensor:
    """`torch.corrcoef`."""
    c = cov(input)
    if not c.dim():
        return c / c
    deviation = c.diagonal().real.sqrt() if c.is_complex() else c.diagonal().sqrt()
    c = c / deviation[:, None] / deviation[None, :]
    return torch.complex(c.real.clip(-1, 1), c.imag.clip(-1, 1)) if c.is_complex() else c.clip(-1, 1)


WRITTEN: dict[Any, Callable] = {
    F.gaussian_nll_loss: gaussian_nll_loss,
    torch.cov: cov, torch.Tensor.cov: cov, torch.corrcoef: corrcoef, torch.Tensor.corrcoef: corrcoef,
}  # fmt: skip
"""What is called, and what is traced instead: the same values and gradients."""


class Counts:
    """How many batches a batch norm with ``momentum=None`` has seen: a tensor, whose value it reads, to divide 1 by it.

    `stand_in` gives it a number to read, and `batch_norm` computes with the tensor where it is given that number's reciprocal.
    """

    def __init__(self) -> None:
        self._by_reciprocal: dict[float, Tensor] = {}

    def stand_in(self, count: Tensor) -> float:
        """A power of two, of which the reciprocal is exact, and which is no momentum of anybody's."""
        number = 2.0 ** (100 + len(self._by_reciprocal) % 800)
        self._by_reciprocal[1.0 / number] = count
        return number

    def batch_norm(self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                   weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
                   eps: float = 1e-5) -> Tensor:
        """`torch.nn.functional.batch_norm`; the running statistics are means of all batches where that is asked for."""
        count = self._by_reciprocal.get(momentum)
        if count is None or not training or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        before = running_mean.clone(), running_var.clone()
        out = F.batch_norm(input, running_mean, running_var, weight, bias, True, 1.0, eps)
        with torch.no_grad():
            for buffer, old in zip((running_mean, running_var), before, strict=True):
                part = 1.0 / count.to(buffer.dtype)
                buffer.copy_(old * (1 - part) + buffer.clone() * part)
        return out
