"""Many tensors scaled, added, or written to two places, by one kernel; against each by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fxpar.ops import elementwise
from fxpar.ops.elementwise import Launch, add, scale_, spread
from fxpar.ops.table import BLOCK, CHUNK, rows

SIZES = [1, 17, BLOCK, BLOCK + 8, CHUNK - 1, CHUNK, 3 * CHUNK + 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASTS = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
         (torch.float32, torch.float16), (torch.float64, torch.float32)]  # fmt: skip
FACTORS = [1.0, 0.25, 0.3, float("inf")]


def made(device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n, device=device).to(dtype) for n in SIZES]


class Places:
    """Tensors of those sizes inside of larger ones, `offset` elements from where those begin."""

    def __init__(self, device: str, dtype: torch.dtype, offset: int):
        self.offset = offset
        self.around = [torch.full((n + 9,), -7, dtype=dtype, device=device) for n in SIZES]
        self.tensors = [y[offset : offset + n] for y, n in zip(self.around, SIZES, strict=True)]

    def check(self, want: list[Tensor]) -> None:
        """Each is what is wanted, and nothing beside it was written."""
        for y, x in zip(self.around, want, strict=True):
            assert torch.equal(y[self.offset : self.offset + len(x)], x)
            assert (y[: self.offset] == -7).all() and (y[self.offset + len(x) :] == -7).all()


def test_rows_say_where_every_chunk_begins():
    wide, narrow = torch.float32, torch.bfloat16
    sizes, places = [CHUNK - 1, 2 * CHUNK + 5, 3], [(2**40, 2**41), (2**42, 2**43), (64, 128)]
    columns = [[(place[i], size, (wide, narrow)[i], True) for place, size in zip(places, sizes, strict=True)] for i in (0, 1)]
    for _ in range(2):
        assert rows(columns, torch.device("cpu")).tolist() == [
            [CHUNK - 1, 2**40, 2**41],
            [CHUNK, 2**42, 2**43], [CHUNK, 2**42 + 4 * CHUNK, 2**43 + 2 * CHUNK], [5, 2**42 + 8 * CHUNK, 2**43 + 4 * CHUNK],
            [3, 64, 128],
        ]  # fmt: skip


class Jitted:
    """A kernel of Triton's, and what it compiled of it. starts: with which arguments it was started, by which way."""

    packed_metadata = None

    def __init__(self) -> None:
        self.starts: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def start(*args: object) -> Jitted:
            self.starts.append((grid, args))
            return self

        return start


def test_a_kernel_on_the_same_memory_is_started_by_addresses(monkeypatch):
    kernel = Jitted()
    monkeypatch.setattr(elementwise, "_kernels", lambda: SimpleNamespace(add=kernel))
    monkeypatch.setattr(elementwise, "_compiled", {})
    tables = [torch.zeros(n, 4, dtype=torch.int64) for n in (3, 5)]
    for each in tables:
        launch = Launch("add", each, (torch.float32,))
        for _ in range(2):
            launch()
    (first, (by_tensor, *_)), *others = kernel.starts
    assert first == (3, 1, 1) and by_tensor is tables[0]  # Triton compiles it for what it is given
    assert [(grid, args[0]) for grid, args in others] == [((len(t), 1, 1), t.data_ptr()) for t in (tables[0], *[tables[1]] * 2)]
    assert all(isinstance(args[1], int) and args[2] == BLOCK for _, args in others)


def test_an_interpreted_kernel_is_started_by_triton(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(elementwise, "_kernels", lambda: SimpleNamespace(add={(3, 1, 1): lambda rows, *rest: seen.append(rows)}))
    monkeypatch.setattr(elementwise, "_compiled", {})
    launch = Launch("add", torch.zeros(3, 4, dtype=torch.int64), (torch.float32,))
    launch()
    launch()
    assert [x is launch.rows for x in seen] == [True, True]


def check_scale(device: str, dtype: torch.dtype, factor: float) -> None:
    tensors = [*made(device, dtype), torch.randn(0, device=device).to(dtype)]
    tensors += [torch.randn(64, 33, device=device).to(dtype).t(), torch.randn(100, device=device).to(dtype)[3:]]
    by = torch.tensor(factor, device=device)
    want = [(t.double() * by.double()).to(dtype) for t in tensors]
    places = [t.data_ptr() for t in tensors]
    scale_(tensors, by)
    assert [t.data_ptr() for t in tensors] == places
    for have, each in zip(tensors, want, strict=True):
        torch.testing.assert_close(have, each, rtol=torch.finfo(dtype).eps, atol=0)


def check_spread(device: str, source: torch.dtype, to: torch.dtype, offset: int) -> None:
    x, first, second = made(device, source), Places(device, to, offset), Places(device, to, offset)
    for _ in range(2):  # the second time by the same table
        spread(x, first.tensors, second.tensors)
    for places in (first, second):
        places.check([value.to(to) for value in x])


def check_add(device: str, dtype: torch.dtype, offset: int) -> None:
    one, other, to = made(device, dtype), made(device, dtype, 1), Places(device, dtype, offset)
    want = [a + b for a, b in zip(one, other, strict=True)]
    add(to.tensors, one, other)
    to.check(want)
    add(one, one, other)
    assert all(map(torch.equal, one, want))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_scaled_in_place(dtype, factor):
    check_scale("cpu", dtype, factor)


@pytest.mark.parametrize("source, to", CASTS)
def test_both_places_have_what_was_read(source, to):
    check_spread("cpu", source, to, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_sum_is_where_it_belongs(dtype):
    check_add("cpu", dtype, 8)


def test_of_nothing_comes_nothing():
    scale_([], torch.tensor(0.5))
    spread([], [], [])
    add([], [], [])


@pytest.mark.gpu
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_each_is_scaled_in_place_by_one_kernel(dtype, factor):
    check_scale("cuda", dtype, factor)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 8, 3])
@pytest.mark.parametrize("source, to", CASTS)
def test_one_kernel_writes_both(source, to, offset):
    check_spread("cuda", source, to, offset)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 8, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_kernel_adds_all(dtype, offset):
    check_add("cuda", dtype, offset)


@pytest.mark.gpu
def test_a_factor_that_is_not_a_number_is_not_taken_for_one():
    x = torch.ones(CHUNK + 3, device="cuda")
    scale_([x], torch.tensor(float("nan"), device="cuda"))
    assert x.isnan().all()
