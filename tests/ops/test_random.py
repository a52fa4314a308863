"""Counter-based random tensors: parts of them are parts of the whole, and their numbers are distributed as they say."""

import math

import pytest
import torch

from fxpar.ops.random import digits, drawn

SEED = torch.tensor(7)


def draw(kind, n=200_000, site=0, seed=SEED, dtype=torch.float32, size=None, grid=None):
    return drawn([n] if size is None else size, seed, kind=kind, site=site, dtype=dtype, device=torch.device("cpu"), grid=grid)


@pytest.mark.parametrize("kind", ["uniform", "normal", "exponential", "integer"])
def test_a_part_is_a_part_of_the_whole(kind):
    dtype = torch.int64 if kind == "integer" else torch.float32
    whole = draw(kind, size=[6, 4, 10], dtype=dtype)
    part = draw(kind, size=[3, 4, 4], dtype=dtype, grid=(((3, 3, 6),), ((4, 0, 4),), ((2, 0, 2), (2, 2, 5))))
    assert torch.equal(part, whole[3:].reshape(3, 4, 2, 5)[..., 2:4].reshape(3, 4, 4))


@pytest.mark.parametrize("kind", ["uniform", "normal", "exponential", "integer"])
@pytest.mark.parametrize("seed", [7, -1, 2**62 + 5])
def test_a_site_may_be_a_tensor(kind, seed):
    dtype = torch.int64 if kind == "integer" else torch.float64
    for site in (0, 3, 2**20):
        want = draw(kind, 64, site, torch.tensor(seed), dtype)
        assert torch.equal(draw(kind, 64, torch.tensor(site), torch.tensor(seed), dtype), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_uniform_numbers_have_the_dtypes_precision_and_are_below_one(dtype):
    u = draw("uniform", dtype=dtype)
    assert u.dtype is dtype and 0 <= u.min() and u.max() < 1
    scaled = u.double() * 2.0 ** digits(dtype)
    assert torch.equal(scaled, scaled.round()) and (scaled % 2 == 1).any()
    assert abs(u.double().mean() - 0.5 + 2.0 ** -digits(dtype) / 2) < 4 / math.sqrt(12 * len(u))


def test_each_bit_of_each_site_seed_and_index_counts():
    integers = torch.stack([draw("integer", 4096, site=s, seed=torch.tensor(seed), dtype=torch.int64)
                            for s in range(8) for seed in (0, 1, 2**33, 2**33 + 1)])
    bits = (integers[..., None] >> torch.arange(63)) & 1
    flat = bits.double().reshape(-1, 63)
    assert (flat.mean(0) - 0.5).abs().max() < 5 / (2 * math.sqrt(len(flat)))
    rows = bits.reshape(32, -1).double() * 2 - 1
    apart = rows @ rows.T / rows.shape[1] - torch.eye(32)
    assert apart.abs().max() < 5 / math.sqrt(rows.shape[1])


def test_neighbours_are_independent():
    x = draw("normal", size=[400, 500]).double()
    for shifted in (x.roll(1, 1), x.roll(1, 0), x.roll((1, 1), (0, 1))):
        assert abs((x * shifted).mean()) < 5 / math.sqrt(x.numel())


def test_moments_of_normal_and_exponential_numbers():
    n = 200_000
    x, e = draw("normal", n).double(), draw("exponential", n).double()
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - want) < 5 * math.sqrt(spread / n)
    inside = (x.abs() < 1).double().mean()
    assert abs(inside - 0.6826894921370859) < 5 * math.sqrt(0.22 / n)
    assert e.min() > 0 and abs(e.mean() - 1) < 5 / math.sqrt(n)
    assert abs((e > 2).double().mean() - math.exp(-2)) < 5 * 0.35 / math.sqrt(n)


@pytest.mark.parametrize("size", [[], [0, 3], [1, 1], [5]], ids=str)
def test_any_size(size):
    assert list(draw("normal", size=size).shape) == size
