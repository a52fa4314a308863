"""Counter-based randomness: the mask of an element depends on its global index, a seed and a site alone.

So dropout does not depend on how a plan splits the tensor. The generator is two rounds of a 32-bit integer
mixer (the finalizer of MurmurHash3, Appleby 2011) over the index and the seed: pointwise integer operators that
Inductor fuses into the kernel that uses the mask. It is meant for dropout, not for cryptography or
for simulations that need long independent streams.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxpar.sharding.deal import dealt_from

Grid = tuple[tuple[tuple[int, ...], ...], ...]
"""Per tensor dim, major to minor: runs of ``(local size, global offset, global size)``; one that is dealt (see
fxpar/sharding/deal.py) also has the number of ranks, and its offset among what is dealt."""

_MASK = 0xFFFFFFFF
_INDEX, _SITE = 0x9E3779B1, 0x632BE5AB
_PER_SITE = _SITE * pow(_INDEX, -1, 2**32) & _MASK
"""What a seed has to grow by, to be mixed as if the site had grown by one."""


def signed(n: int) -> int:
    """The 32-bit integer whose bits are the last of `n`."""
    return ((n + 2**31) & _MASK) - 2**31


def shifted(h: Tensor, by: int) -> Tensor:
    """A logical shift: int32 brings its sign along."""
    return (h >> by) & (_MASK >> by)


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer on int32 tensors, whose products wrap: a GPU multiplies 64-bit integers in many steps."""
    h = (h ^ shifted(h, 16)) * signed(0x85EBCA6B)
    h = (h ^ shifted(h, 13)) * signed(0xC2B2AE35)
    return h ^ shifted(h, 16)


def coordinates(runs, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The global coordinates of a dim's local elements, from its runs."""
    at = torch.zeros((), dtype=dtype, device=device)
    for local, offset, full, *ranks in runs:
        here = torch.arange(local, dtype=dtype, device=device) + offset
        here = dealt_from(here, full, *ranks) if ranks else here
        at = (at.unsqueeze(-1) * full + here) if at.dim() else here
        at = at.reshape(-1)
    return at


def global_index(shape, grid, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The row-major global index of every local element; broadcastable to `shape`."""
    grid = grid or [((int(n), 0, int(n)),) for n in shape]
    index = torch.zeros((), dtype=dtype, device=device)
    stride = 1
    for back, runs in enumerate(reversed(list(grid))):
        at = coordinates(runs, device, dtype) if runs else torch.zeros(1, dtype=dtype, device=device)
        index = index + at.reshape(-1, *([1] * back)) * stride
        for _, _, full, *_ in runs:
            stride *= full
    return index


def dropout_mask(x: Tensor, seed: Tensor, *, p: float, site: int | Tensor, shape=None, grid=None) -> Tensor:
    """A boolean tensor like `x`: True with probability ``1 - p``, the same whatever part of the tensor this is.

    seed: int64 scalar; site: which random operator of the model this is, a number or an int64 scalar. shape: the mask's shape,
    where it is not `x`'s (dropout of whole channels). grid: where the local elements lie in the global tensor (default: x is the
    full tensor).
    """
    shape = x.shape if shape is None else shape
    total = math.prod(full for runs in grid for _, _, full, *_ in runs) if grid else math.prod(shape)
    dtype = torch.int32 if total <= 2**31 else torch.int64
    return kept(global_index(shape, grid, x.device, dtype), seed, p=p, site=site)


def kept(index: Tensor, seed: Tensor, *, p: float, site: int | Tensor) -> Tensor:
    """The mask of the elements with these global indices (int64, or int32 if they fit)."""
    threshold = int(p * 2**32)
    h = _mix(index.to(torch.int32) ^ (seed * _INDEX + site * _SITE).to(torch.int32))
    added = ((seed >> 32) + site).to(torch.int32)
    if index.dtype == torch.int64:
        added = added + (index >> 32).to(torch.int32) * signed(_INDEX)
    h = _mix(h + added) ^ -(2**31)  # in the order of unsigned integers
    return h >= signed(threshold - 2**31) if threshold < 2**32 else torch.zeros_like(h, dtype=torch.bool)


def seed_of_site(seed: Tensor, site: Tensor) -> Tensor:
    """The seed of which site 0 has the masks that `site` has of `seed`."""
    low = (seed + site * _PER_SITE) & _MASK
    return ((seed >> 32) + site) << 32 | low
