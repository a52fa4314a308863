"""Tables by which one Triton kernel goes through many tensors: a program takes a row, which says where it finds what."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK, BLOCK, ALIGNED = 32768, 2048, 16
"""Elements of a program, and of a step of it; bytes that addresses have to be a multiple of, to be read at full speed."""


def table(*columns: Sequence[Tensor]) -> Tensor | None:
    """[chunks, 1 + k] int64: how many elements a chunk has, and where it begins in each of k tensors of one size.

    columns: k lists of tensors, side by side. None if a kernel cannot go through them: where a list is empty or of several
    dtypes, or a tensor is not on a GPU, has gaps, is float64 or no floating-point one, or begins where it is slow to read.
    Made once for the same memory.
    """
    if not all(columns) or not columns[0][0].is_cuda:
        return None
    key = tuple((t.data_ptr(), t.numel(), t.dtype, t.is_contiguous()) for column in columns for t in column)
    return _table(key, len(columns), columns[0][0].device)


@functools.lru_cache(maxsize=4096)
def _table(key: tuple[tuple[int, int, torch.dtype, bool], ...], count: int, device: torch.device) -> Tensor | None:
    columns = [key[i : i + len(key) // count] for i in range(0, len(key), len(key) // count)]
    if any(len({dtype for *_, dtype, _ in column}) > 1 for column in columns) or not all(map(_fits, key)) or not _has_triton():
        return None
    rows = [(min(CHUNK, row[0][1] - start), *(address + start * dtype.itemsize for address, _, dtype, _ in row))
            for row in zip(*columns, strict=True) for start in range(0, row[0][1], CHUNK)]
    return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _fits(tensor: tuple[int, int, torch.dtype, bool]) -> bool:
    address, size, dtype, contiguous = tensor
    return contiguous and size > 0 and address % ALIGNED == 0 and dtype.is_floating_point and dtype != torch.float64


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
