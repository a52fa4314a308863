"""Zeros in the rows behind the last that counts, of which only the device knows the number."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 512


@triton.jit
def _zero(x: Any, first: Any, rows: Any, columns: tl.constexpr, stride: Any, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr) -> None:
    """A program for each ROWS rows; those with none to fill end at once."""
    begin = tl.load(first)
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start + ROWS > begin:
        row = start + tl.arange(0, ROWS)[:, None]
        for column in range(0, columns, COLUMNS):
            at = column + tl.arange(0, COLUMNS)[None, :]
            zeros = tl.zeros([ROWS, COLUMNS], x.dtype.element_ty)
            tl.store(x + row * stride + at, zeros, mask=(row >= begin) & (row < rows) & (at < columns))


def zero_rows_(x: Tensor, first: Tensor) -> Tensor:
    """x [rows, columns], whose rows are dense, on a GPU: zeros, in place, in the rows from `first` on, a 0-d integer tensor
    there. It reads nothing of `x`, so that it costs what it fills."""
    rows, columns = x.shape
    if x.numel():
        _zero[(triton.cdiv(rows, ROWS),)](x, first, rows, columns, x.stride(0), ROWS, COLUMNS)
    return x
