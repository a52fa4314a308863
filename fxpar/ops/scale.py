"""`scale_`: many tensors scaled in place; by 1 at no cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK, BLOCK, ALIGNED = 65536, 4096, 16


@functools.cache
def _kernel() -> Any:
    """The Triton kernel; None where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def scale_chunks(table, factor, like, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
        by = tl.load(factor)
        if by != 1.0:
            row = table + 2 * tl.program_id(0)
            chunk = tl.multiple_of(tl.load(row), 16).to(tl.pointer_type(like.dtype.element_ty))
            count = tl.load(row + 1)
            for start in range(0, CHUNK, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(chunk + at, tl.load(chunk + at, mask=at < count) * by, mask=at < count)

    return scale_chunks


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place by `factor`, a float32 scalar on their device that the host does not look at.

    On a GPU one kernel does it for all, and reads and writes nothing if the factor is exactly 1.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    rest: list[Tensor] = []
    for t in tensors:
        fits = t.is_cuda and t.is_contiguous() and t.is_floating_point() and t.data_ptr() % ALIGNED == 0 and t.numel()
        (groups.setdefault(t.dtype, []) if fits and t.dtype != torch.float64 and _kernel() else rest).append(t)
    for group in groups.values():
        table = _table(tuple((t.data_ptr(), t.numel(), t.element_size()) for t in group), factor.device)
        _kernel()[(len(table),)](table, factor, group[0], CHUNK, BLOCK)
    if rest:
        torch._foreach_mul_(rest, factor)


@functools.lru_cache(maxsize=8)
def _table(tensors: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """[chunks, 2] int64: where each chunk begins, and how many elements it has."""
    rows = [(address + start * size, min(CHUNK, count - start))
            for address, count, size in tensors for start in range(0, count, CHUNK)]
    return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
