"""Many tensors scaled at once, against each by itself."""

from __future__ import annotations

import pytest
import torch

from fxpar.ops.scale import CHUNK, scale_

SIZES = [0, 1, 17, 4096, CHUNK - 1, CHUNK, 3 * CHUNK + 5]


def compare(device: str, dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n, device=device).to(dtype) for n in SIZES]
    tensors += [torch.randn(64, 33, device=device).to(dtype).t(), torch.randn(100, device=device).to(dtype)[3:]]
    by = torch.tensor(factor, device=device)
    want = [(t.double() * by.double()).to(dtype) for t in tensors]
    places = [t.data_ptr() for t in tensors]
    scale_(tensors, by)
    assert [t.data_ptr() for t in tensors] == places
    for have, each in zip(tensors, want, strict=True):
        torch.testing.assert_close(have, each, rtol=torch.finfo(dtype).eps, atol=0)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_scaled_in_place(dtype, factor):
    compare("cpu", dtype, factor)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3, float("inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_each_is_scaled_in_place_by_one_kernel(dtype, factor):
    compare("cuda", dtype, factor)


@pytest.mark.gpu
def test_a_factor_that_is_not_a_number_is_not_taken_for_one():
    x = torch.ones(CHUNK + 3, device="cuda")
    scale_([x], torch.tensor(float("nan"), device="cuda"))
    assert x.isnan().all()


def test_nothing_to_scale():
    scale_([], torch.tensor(0.5))
