"""Zeros in the rows behind the last that counts, of which only the device knows the number."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 512


@triton.jit
def zero(X, FIRST, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program for each ROWS rows; those with none to fill end at once."""
    begin = tl.load(FIRST)
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start + ROWS > begin:
        row = start + tl.arange(0, ROWS)[:, None]
        unfilled = (row >= begin) & (row < rows)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            zeros = tl.zeros([ROWS, COLUMNS], X.dtype.element_ty)
            tl.store(X + row * stride + column, zeros, mask=unfilled & (column < columns))


def zero_rows_(x: Tensor, first: Tensor) -> Tensor:
    """x [rows, columns], whose rows are dense, on a GPU: zeros, in place, in the rows from `first` on, a 0-d integer tensor
    there. It reads nothing of `x`, so that it costs what it fills."""
    rows, columns = x.shape
    if x.numel():
        zero[(triton.cdiv(rows, ROWS),)](x, first, rows, columns, x.stride(0), ROWS, COLUMNS)
    return x
