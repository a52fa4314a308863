"""The counter-based generator: its integers, which no change of how they are computed may change."""

from __future__ import annotations

import pytest
import torch

from fxpar.ops.rng import dropout_mask, seed_of_site

MASK = 0xFFFFFFFF


def mixed(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def drawn(index: int, seed: int, p: float, site: int) -> bool:
    """In Python's integers."""
    h = mixed(index & MASK ^ (seed * 0x9E3779B1 + site * 0x632BE5AB) & MASK)
    return mixed(h + (index >> 32) * 0x9E3779B1 + (seed >> 32) + site & MASK) >= int(p * 2**32)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("first", [0, 2**31 - 60, 2**31, 2**32 - 60, 2**40])
def test_draws_these_integers(seed, first):
    """Of a part of a tensor that begins at `first`; its global size decides how wide the index is."""
    for p, site in ((0.1, 0), (0.5, 7), (0.9, 1000), (0.0, 3), (1.0, 4)):
        grid = (((128, first, first + 128),),)
        found = dropout_mask(torch.empty(128), torch.tensor(seed), p=p, site=site, grid=grid)
        assert found.tolist() == [drawn(first + i, seed, p, site) for i in range(128)]
        as_tensor = dropout_mask(torch.empty(128), torch.tensor(seed), p=p, site=torch.tensor(site), grid=grid)
        own_seed = dropout_mask(torch.empty(128), seed_of_site(torch.tensor(seed), torch.tensor(site)), p=p, site=0, grid=grid)
        assert torch.equal(as_tensor, found) and torch.equal(own_seed, found)


def test_keeps_what_it_promises_to_keep():
    for p in (0.1, 0.5, 0.9):
        assert abs(dropout_mask(torch.empty(400, 500), torch.tensor(3), p=p, site=1).float().mean() - (1 - p)) < 0.004
