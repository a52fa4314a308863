"""`grouped_mm`: rows in groups, each times a matrix of its own (the experts of a mixture), with its two gradients.

To compilers these are opaque operators with static shapes: how many rows a group has is read where the operator runs,
forward and backward, so that a graph with them can be traced, differentiated and compiled without knowing it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpar.ops.kernels import has_triton

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("grouped_mm(Tensor x, Tensor weights, Tensor ends) -> Tensor")
_library.define("grouped_mm_weights(Tensor x, Tensor y, Tensor ends) -> Tensor")
grouped_mm = torch.ops.fxpar.grouped_mm.default
"""x [t, k], weights [e, k, n], ends [e] integer -> [t, n]: the rows of group i, which end before row ``ends[i]`` and begin where
the group before ends, times ``weights[i]``; zero in the rows after the last group. Raises ValueError for operands that do
not agree, and for ends that are not in order or lie beyond the rows."""
grouped_mm_weights = torch.ops.fxpar.grouped_mm_weights.default
"""x [t, k], y [t, n], ends [e] -> [e, k, n]: of each group ``x.T @ y``, zero where it has no rows. (The gradient of the
weights, with y the cotangent.) Raises as `grouped_mm` does."""

ALIGNED = 16
"""Bytes that PyTorch's kernel wants rows and the tensor itself to be a multiple of, and to begin at."""


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has one kernel for all groups: on GPUs, in bf16. (Of a GPU that is not there, it is assumed.)"""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.library.impl(_library, "grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    _require(x.dim() == 2 and weights.dim() == 3 and x.shape[1] == weights.shape[1], x, weights, ends, len(weights))
    if has_kernel(x.device, x.dtype):
        left, right = _aligned(x), _aligned(weights)
        if left is not None and right is not None:
            out = F.grouped_mm(left, right, offs=ends.to(torch.int32))
            return _zero_rows_(out, ends[-1])
    out = x.new_zeros(x.shape[0], weights.shape[2])
    for i, (start, end) in enumerate(_groups(ends, len(x))):
        torch.mm(x[start:end], weights[i], out=out[start:end])
    return out


def _zero_rows_(out: Tensor, first: Tensor) -> Tensor:
    """Zeros in the rows from `first` on, which the host does not look at."""
    if has_triton() and out.stride(1) == 1:
        from fxpar.ops.kernels.rows import zero_rows_

        return zero_rows_(out, first)
    return out.masked_fill_((torch.arange(len(out), device=out.device) >= first).unsqueeze(1), 0)


@torch.library.impl(_library, "grouped_mm_weights", "CompositeExplicitAutograd")
def _grouped_mm_weights(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    _require(x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0], x, y, ends, len(ends))
    if has_kernel(x.device, x.dtype):
        left, right = _aligned(x), _aligned(y)
        if left is not None and right is not None:
            return F.grouped_mm(left.mT, right, offs=ends.to(torch.int32))
    out = x.new_empty(len(ends), x.shape[1], y.shape[1])
    for i, (start, end) in enumerate(_groups(ends, len(x))):
        torch.mm(x[start:end].mT, y[start:end], out=out[i])
    return out


def _require(agree: bool, x: Tensor, other: Tensor, ends: Tensor, groups: int) -> None:
    integers = ends.dim() == 1 and len(ends) == groups and not (ends.is_floating_point() or ends.dtype == torch.bool)
    if not agree or not integers or x.dtype != other.dtype:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, other, ends))
        raise ValueError(f"a grouped product of operands {shapes}: they do not agree")


def _groups(ends: Tensor, rows: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of every group, read from the device."""
    bounds = [0, *ends.tolist()]
    if bounds != sorted(bounds) or bounds[-1] > rows:
        raise ValueError(f"groups that end at {bounds[1:]}, of {rows} rows: the ends must be in order and at most the rows")
    return list(itertools.pairwise(bounds))


def _aligned(t: Tensor) -> Tensor | None:
    """`t` as PyTorch's kernel takes it, copied if need be; None if its rows are no multiple of 16 bytes."""
    if t.shape[-1] * t.element_size() % ALIGNED:
        return None
    for way in (t, t.mT) if t.dim() == 3 else (t,):
        steps = [n * t.element_size() % ALIGNED for n in way.stride()[:-1]]
        if way.stride(-1) == 1 and not any(steps) and t.data_ptr() % ALIGNED == 0:
            return t
    return t.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("fxpar::grouped_mm", lib=_library)
def _fake(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    _require(x.dim() == 2 and weights.dim() == 3 and x.shape[1] == weights.shape[1], x, weights, ends, len(weights))
    return x.new_empty(x.shape[0], weights.shape[2])


@torch.library.register_fake("fxpar::grouped_mm_weights", lib=_library)
def _fake_weights(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    _require(x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0], x, y, ends, len(ends))
    return x.new_empty(len(ends), x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, ends = ctx.saved_tensors
    wants_x, wants_weights, _ = ctx.needs_input_grad
    of_x = grouped_mm(grad, weights.mT, ends) if wants_x else None
    of_weights = None
    if wants_weights:  # of weights that are a parameter transposed, so that the parameter's gradient lies as it does
        transposed = weights.stride(1) == 1 and weights.stride(2) != 1
        of_weights = grouped_mm_weights(grad, x, ends).mT if transposed else grouped_mm_weights(x, grad, ends)
    return of_x, of_weights, None


def _backward_of_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, ends = ctx.saved_tensors
    wants_x, wants_y, _ = ctx.needs_input_grad
    return (grouped_mm(y, grad.mT, ends) if wants_x else None), (grouped_mm(x, grad, ends) if wants_y else None), None


torch.library.register_autograd("fxpar::grouped_mm", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("fxpar::grouped_mm_weights", _backward_of_weights, setup_context=_save, lib=_library)
