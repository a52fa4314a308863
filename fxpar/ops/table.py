"""Tables by which one Triton kernel goes through many tensors: a program takes a row, which says where it finds what."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fxpar import compat
from fxpar.ops.kernels import has_triton

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
    places = [[(t.data_ptr(), t.numel(), t.dtype, t.is_contiguous()) for t in column] for column in columns]
    return table_at(places, columns[0][0].device)


Place = tuple[int, int, torch.dtype, bool]
"""Of a tensor its address, how many elements it has, of which dtype, and whether it is contiguous."""
_Columns = Sequence[Sequence[Place]]
_later: _Later | None = None


def table_at(columns: _Columns, device: torch.device) -> Tensor | None:
    """As `table`, of tensors at these places."""
    if device.type != "cuda":
        return None
    key = tuple(place for column in columns for place in column)
    return (_table if _later is None else _table.__wrapped__)(key, len(columns), device)


def are_for_a_recording() -> bool:
    """Whether tables that are made now are for a recording alone, and not to be kept for anything else."""
    return _later is not None


class _Later:
    """Tables that are written once a recording is over: what copies them to the GPU cannot be recorded.

    tables: in memory of their own, which the recording is to keep.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream
        self.tables: list[tuple[Tensor, _Columns]] = []

    def table(self, columns: _Columns, device: torch.device) -> Tensor:
        count = sum(-(-size // CHUNK) for _, size, *_ in columns[0])
        with compat.unrecorded(self.stream):  # which is not recorded, so that its memory is no recording's
            made = torch.empty(count, 1 + len(columns), dtype=torch.int64, device=device)
        self.tables.append((made, columns))
        return made


@contextlib.contextmanager
def written_later(stream: torch.cuda.Stream) -> Iterator[Callable[[], list[Tensor]]]:
    """Inside, tables are made that are for the recording under way alone. What is yielded is to be called when it is over: it
    writes them, in the order of the current stream, and returns them, to be kept as long as the recording. stream: one that is
    not recorded."""
    global _later
    mine = _later = _Later(stream)

    def write() -> list[Tensor]:
        for made, columns in mine.tables:
            made.copy_(rows(columns, made.device))
        return [made for made, _ in mine.tables]

    try:
        yield write
    finally:
        _later = None


@functools.lru_cache(maxsize=1024)
def _table(key: tuple[tuple[int, int, torch.dtype, bool], ...], count: int, device: torch.device) -> Tensor | None:
    columns = [key[i : i + len(key) // count] for i in range(0, len(key), len(key) // count)]
    if any(len({dtype for *_, dtype, _ in column}) > 1 for column in columns) or not all(map(_fits, key)) or not has_triton():
        return None
    return rows(columns, device) if _later is None else _later.table(columns, device)


def rows(columns: _Columns, device: torch.device) -> Tensor:
    """The table of k columns of (address, elements, dtype, contiguous).

    The host looks at the tensors and not at their chunks, which are many: memory moves from step to step while an allocator
    settles, or whenever something else was run in between.
    """
    index, count, start = _chunks(tuple(size for _, size, *_ in columns[0]), device)
    addresses = [list(row) for row in zip(*([address for address, *_ in column] for column in columns), strict=True)]
    widths = [column[0][2].itemsize for column in columns]
    begins = torch.tensor([*addresses, widths], dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return torch.cat([count, begins[index] + start * begins[-1:]], 1)


@functools.lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chunks of tensors of these sizes: [chunks] which tensor's, [chunks, 1] how many elements, from which one on."""
    of = [(i, min(CHUNK, size - start), start) for i, size in enumerate(sizes) for start in range(0, size, CHUNK)]
    index, count, start = torch.tensor(of, dtype=torch.int64).to(device).unbind(1)
    return index, count[:, None], start[:, None]


def _fits(tensor: tuple[int, int, torch.dtype, bool]) -> bool:
    address, size, dtype, contiguous = tensor
    return contiguous and size > 0 and address % ALIGNED == 0 and dtype.is_floating_point and dtype != torch.float64
