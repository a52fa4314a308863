"""Bands: matrices that are constant along each diagonal, kept as one number per diagonal.

An attention mask is rows x columns, but what it is made of is small: two ranges, compared. So a constant is
kept as one of

    Plain   its distinct elements: a tensor that has extent 1 in every dim along which the value is uniform
    Band    one number per diagonal: element [..., i, j] is ``data[j - i + rows - 1]``

and an operator is computed by running *that operator* on these small tensors, so that dtypes, promotion and
rounding are its own. Worked example, 4 x 4:

    q = arange(4).view(4, 1)      Plain, 4 numbers
    k = arange(4).view(1, 4)      Plain, 4 numbers
    k <= q                        Band, on the diagonals -3 .. 3:   1 1 1 1 0 0 0
    k > q - 2                     Band                              0 0 1 1 1 1 1
    (k <= q) & (k > q - 2)        Band                              0 0 1 1 0 0 0

Every function here returns None where its result is no band, or is not known to be one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# No operator is run that would make more elements than this.
LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Plain:
    """shape: the value's. data: as many dims, each either of full extent, or 1 where the value is uniform."""

    shape: tuple[int, ...]
    data: Tensor

    @property
    def full(self) -> Tensor:
        """The value as a tensor (a view: it takes no memory)."""
        return self.data.expand(self.shape)


@dataclass(frozen=True, slots=True)
class Band:
    """shape: [..., rows, columns], both at least 2. data: a number per diagonal, the lower left one first."""

    shape: tuple[int, ...]
    data: Tensor


MaskValue = Plain | Band


# ---- between tensors and values ----


def plain(t: Tensor) -> Plain:
    """`t` narrowed along the dims in which it is uniform: by stride, and by value where that is cheap."""
    shape = tuple(t.shape)
    for dim, size in enumerate(shape):
        if size > 1 and t.stride(dim) == 0:
            t = t.narrow(dim, 0, 1)
    if t.numel() <= LIMIT and not t.is_complex():
        for dim in range(t.dim()):
            first = t.narrow(dim, 0, 1)
            if t.shape[dim] > 1 and _same(t, first):
                t = first.clone()
    return Plain(shape, t)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, after broadcasting: 0. and -0. differ, a NaN equals itself."""
    if a.is_floating_point():
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(bits), b.contiguous().view(bits)
    return bool((a == b).all())


def diagonals(value: MaskValue, rows: int, columns: int) -> Tensor | None:
    """What the value, broadcast to [..., rows, columns], holds on each diagonal.

    One dim of rows + columns - 1 elements; or, if the value is uniform, one element, in no dims if the value
    has none (dtype promotion knows the difference) and in one dim otherwise.
    """
    if isinstance(value, Band):
        return value.data if value.shape[-2:] == (rows, columns) else None
    data = value.data
    if data.numel() == 1:
        return data.reshape(()) if data.dim() == 0 else data.reshape(1)
    leading = (1,) * (data.dim() - 2)
    if tuple(data.shape) != (*leading, rows, columns) or 1 in (rows, columns) or data.is_complex():
        return None
    matrix = data.reshape(rows, columns)
    if not _same(matrix[1:, 1:], matrix[:-1, :-1]):
        return None
    return torch.cat([matrix[:, 0].flip(0), matrix[0, 1:]])


def from_diagonals(shape: tuple[int, ...], data: Tensor) -> MaskValue:
    """A Band; or what is simpler, if it is uniform, or has a single row or column."""
    rows, columns = shape[-2:]
    if _same(data, data[:1]):
        return Plain(shape, data[:1].clone().reshape((1,) * len(shape)))
    if rows == 1 or columns == 1:
        data = data if rows == 1 else data.flip(0)
        return Plain(shape, data.reshape(*(1,) * (len(shape) - 2), rows, columns))
    return Band(shape, data)


# ---- where bands come from ----


def of_ranges(target: Any, a: MaskValue, b: MaskValue, rows: int, columns: int) -> Tensor | None:
    """The diagonals of a column and a row of evenly spaced integers, compared, subtracted or added.

    Takes: a comparison, a subtraction, or an addition (of a range that ascends and one that descends).
    Why the result depends on the diagonal alone: ``(s*j + x) - (s*i + y)`` is ``s*(j - i) + x - y``. So it is
    enough to compute one element of each diagonal, the one in the first row or column.
    """
    diagonal = torch.arange(1 - rows, columns)
    at = {(rows, 1): (-diagonal).clamp(min=0), (1, columns): diagonal.clamp(min=0)}
    steps, picked = [], []
    for value in (a, b):
        extent = ((1, 1) + tuple(value.data.shape))[-2:]
        if isinstance(value, Band) or extent not in at or value.data.numel() != math.prod(extent):
            return None
        steps.append(_step(value.data.reshape(-1)))
        picked.append(value.data.reshape(-1)[at[extent]])
    if steps[0] is None or steps[1] is None:
        return None
    if steps[0] != (-steps[1] if target.overloadpacket is aten.add else steps[1]):
        return None
    return target(*picked)


def _step(line: Tensor) -> int | None:
    """The step of evenly spaced integers that are so small that two of them cannot overflow together."""
    if line.is_floating_point() or line.is_complex() or line.dtype == torch.bool:
        return None
    bound = torch.iinfo(line.dtype).max // 4
    if int(line.min()) < -bound or int(line.max()) > bound:
        return None
    line = line.to(torch.int64)
    steps = line[1:] - line[:-1]
    return int(steps[0]) if len(steps) and bool((steps == steps[0]).all()) else None


def triangle(value: MaskValue, lower: bool, boundary: int) -> MaskValue | None:
    """`tril` or `triu` of a matrix that is uniform or a band."""
    rows, columns = value.shape[-2:]
    data = diagonals(value, rows, columns)
    if data is None:
        return None
    diagonal = torch.arange(1 - rows, columns)
    dropped = diagonal > boundary if lower else diagonal < boundary
    return from_diagonals(value.shape, data.expand(diagonal.shape).masked_fill(dropped, 0))


# ---- views of bands ----


def reshaped(band: Band, shape: tuple[int, ...]) -> MaskValue | None:
    """A view of other shape and the same order of elements, broadcasting included.

    If the last two dims are as they were, they are the same dims: neither has extent 1.
    """
    return Band(shape, band.data) if shape[-2:] == band.shape[-2:] else None


def permuted(band: Band, order: Sequence[int], shape: tuple[int, ...]) -> MaskValue | None:
    rows, columns = len(band.shape) - 2, len(band.shape) - 1
    if tuple(order[-2:]) == (rows, columns):
        return Band(shape, band.data)
    return Band(shape, band.data.flip(0)) if tuple(order[-2:]) == (columns, rows) else None


def sliced(band: Band, dim: int, start: int, shape: tuple[int, ...]) -> MaskValue:
    """The slice of extent ``shape[dim]`` that begins at `start`, in steps of 1."""
    rows, columns = band.shape[-2:]
    kept = shape[dim]
    if dim == len(shape) - 2:  # the rows above and below take the highest and the lowest diagonals with them
        first = rows - start - kept
        return from_diagonals(shape, band.data[first : first + kept + columns - 1])
    if dim == len(shape) - 1:
        return from_diagonals(shape, band.data[start : start + rows + kept - 1])
    return Band(shape, band.data)
