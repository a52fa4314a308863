"""Elementwise work on many tensors by one kernel each: `scale_` in place, `spread` to two places, `add` of two lists.

A `Launch` is that work on the same memory again and again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fxpar.ops.table import ALIGNED, BLOCK, table


@functools.cache
def _kernels() -> Any:
    """One program a row of the table: the number of elements, then the addresses."""
    import triton
    import triton.language as tl

    @triton.jit
    def address(place, like):
        return tl.multiple_of(tl.load(place).to(tl.pointer_type(like.dtype.element_ty)), 16)

    @triton.jit
    def scale(table, factor, like, BLOCK: tl.constexpr):
        by = tl.load(factor)
        if by != 1.0:
            row = table + 2 * tl.program_id(0)
            count = tl.load(row)
            x = address(row + 1, like)
            blocked = count // BLOCK * BLOCK
            for start in range(0, blocked, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(x + at, tl.load(x + at) * by)
            at = blocked + tl.arange(0, BLOCK)
            tl.store(x + at, tl.load(x + at, mask=at < count) * by, mask=at < count)

    @triton.jit
    def spread(table, source, to, BLOCK: tl.constexpr):
        row = table + 4 * tl.program_id(0)
        count = tl.load(row)
        x, first, second = address(row + 1, source), address(row + 2, to), address(row + 3, to)
        blocked = count // BLOCK * BLOCK
        for start in range(0, blocked, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(x + at).to(to.dtype.element_ty)
            tl.store(first + at, value)
            tl.store(second + at, value)
        at = blocked + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count).to(to.dtype.element_ty)
        tl.store(first + at, value, mask=at < count)
        tl.store(second + at, value, mask=at < count)

    @triton.jit
    def add(table, like, BLOCK: tl.constexpr):
        row = table + 4 * tl.program_id(0)
        count = tl.load(row)
        to, one, other = address(row + 1, like), address(row + 2, like), address(row + 3, like)
        blocked = count // BLOCK * BLOCK
        for start in range(0, blocked, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(to + at, tl.load(one + at) + tl.load(other + at))
        at = blocked + tl.arange(0, BLOCK)
        tl.store(to + at, tl.load(one + at, mask=at < count) + tl.load(other + at, mask=at < count), mask=at < count)

    return SimpleNamespace(scale=scale, spread=spread, add=add)


class Launch:
    """A kernel over one table, to be started any number of times.

    kind: "spread" or "add". dtypes: of what "spread" reads and writes; the one of "add". The first of a kind is started by
    Triton, which looks at every argument; the others start what that compiled.
    """

    def __init__(self, kind: str, rows: Tensor, dtypes: tuple[torch.dtype, ...]):
        self.kind, self.rows, self.dtypes = kind, rows, dtypes
        self._start: Callable[[], Any] | None = None

    def __call__(self) -> None:
        if self._start is None:
            self._start = self._first()
        else:
            self._start()

    def _first(self) -> Callable[[], Any]:
        """Start it now; how to start it next time."""
        grid = len(self.rows), 1, 1
        examples = [_example(dtype, self.rows.device) for dtype in self.dtypes]
        key = self.kind, self.dtypes, self.rows.device
        compiled = _compiled.get(key)
        if compiled is None:
            general = functools.partial(getattr(_kernels(), self.kind)[grid], self.rows, *examples, BLOCK)
            compiled = general()
            if not hasattr(compiled, "packed_metadata"):  # Triton interprets kernels
                return general
            _compiled[key] = compiled
            return functools.partial(compiled[grid], self.rows.data_ptr(), *(x.data_ptr() for x in examples), BLOCK)
        start = functools.partial(compiled[grid], self.rows.data_ptr(), *(x.data_ptr() for x in examples), BLOCK)
        start()
        return start


_compiled: dict[tuple[str, tuple[torch.dtype, ...], torch.device], Any] = {}
"""What Triton compiled of a kernel for these dtypes."""


@functools.cache
def _example(dtype: torch.dtype, device: torch.device) -> Tensor:
    """By which a kernel knows a dtype; it is not read."""
    return torch.empty(ALIGNED, dtype=dtype, device=device)


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place by `factor`, a float32 scalar on their device that the host does not look at.

    On a GPU nothing is read or written if the factor is exactly 1.
    """
    groups: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            groups.setdefault((t.dtype, t.is_contiguous(), t.data_ptr() % ALIGNED), []).append(t)
    for group in groups.values():
        rows = table(group)
        if rows is not None:
            _kernels().scale[(len(rows),)](rows, factor, group[0], BLOCK)
        else:
            torch._foreach_mul_(group, factor)


@torch.no_grad()
def spread(source: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """first[i] and second[i], of its size and of one dim, become source[i], which is read once."""
    rows = table(source, first, second)
    if rows is not None and first[0].dtype == second[0].dtype:
        _kernels().spread[(len(rows),)](rows, source[0], first[0], BLOCK)
    elif source:
        to = [*itertools.chain(*zip(first, second, strict=True))]
        flat = [x.reshape(-1) for x in source]
        torch._foreach_copy_(to, [*itertools.chain(*zip(flat, flat, strict=True))])


@torch.no_grad()
def add(to: Sequence[Tensor], one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """to[i] becomes one[i] + other[i], of its size and dtype; it may be either of them."""
    rows = table(to, one, other)
    if rows is not None and to[0].dtype == one[0].dtype == other[0].dtype:
        _kernels().add[(len(rows),)](rows, to[0], BLOCK)
        return
    for x, y, z in zip(to, one, other, strict=True):
        torch.add(y, z, out=x)
