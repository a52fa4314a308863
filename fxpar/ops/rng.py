"""Counter-based randomness: the mask of an element depends on its global index, a seed and a site alone.

So dropout does not depend on how a plan splits the tensor. The generator is two rounds of a 32-bit integer
mixer (the finalizer of MurmurHash3, Appleby 2011) over the index and the seed: pointwise integer operators that
Inductor fuses into the kernel that uses the mask. It is meant for dropout, not for cryptography or
for simulations that need long independent streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[tuple[tuple[int, int, int], ...], ...]
"""Per tensor dim, major to minor: runs of ``(local size, global offset, global size)``."""

_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer on int64 tensors that hold 32-bit values."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def coordinates(runs, device: torch.device) -> Tensor:
    """The global coordinates of a dim's local elements, from its runs of (local size, offset, global size)."""
    at = torch.zeros((), dtype=torch.int64, device=device)
    for local, offset, whole in runs:
        here = torch.arange(local, dtype=torch.int64, device=device) + offset
        at = (at.unsqueeze(-1) * whole + here) if at.dim() else here
        at = at.reshape(-1)
    return at


def global_index(shape, grid, device: torch.device) -> Tensor:
    """The row-major global index of every local element; int64, broadcastable to `shape`."""
    grid = grid or [((int(n), 0, int(n)),) for n in shape]
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for back, runs in enumerate(reversed(list(grid))):
        at = coordinates(runs, device) if runs else torch.zeros(1, dtype=torch.int64, device=device)
        index = index + at.reshape(-1, *([1] * back)) * stride
        for _, _, whole in runs:
            stride *= whole
    return index


def dropout_mask(x: Tensor, seed: Tensor, *, p: float, site: int, shape=None, grid=None) -> Tensor:
    """A boolean tensor like `x`: True with probability ``1 - p``, the same whatever part of the tensor this is.

    seed: int64 scalar; site: which random operator of the model this is. shape: the mask's shape, where it is not
    `x`'s (dropout of whole channels). grid: where the local elements lie in the global tensor (default: x is whole).
    """
    return kept(global_index(x.shape if shape is None else shape, grid, x.device), seed, p=p, site=site)


def kept(index: Tensor, seed: Tensor, *, p: float, site: int) -> Tensor:
    """The mask of the elements with these global indices (int64)."""
    h = _mix((index & _MASK) ^ ((seed * 0x9E3779B1 + site * 0x632BE5AB) & _MASK))
    h = _mix((h + (index >> 32) * 0x9E3779B1 + (seed >> 32) + site) & _MASK)
    return h >= int(p * 2**32)
