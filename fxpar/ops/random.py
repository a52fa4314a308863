"""Counter-based random tensors: each element depends on its global index, a seed and a site alone, as dropout's masks do.

What `torch.rand`, `torch.randn` and their relatives draw in a model is drawn from here, so that a plan does not change it. A
word of 32 bits is made of an element's index by two rounds of an integer mixer (triple32, Wellons 2018) under two keys, which
are made of the seed, the site, and the number of the word. No stream of it is one of dropout's (fxpar/ops/rng.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fxpar.ops.rng import Grid, global_index, shifted, signed

Kind = Literal["uniform", "normal", "exponential", "integer"]
"""uniform: in [0, 1), multiples of the dtype's precision. normal: mean 0, variance 1. exponential: rate 1, never 0.
integer: int64, from 0 to 2^63 - 1."""

_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B1
_MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)


def drawn(size: list[int], seed: Tensor, *, kind: Kind, site: int | Tensor, dtype: torch.dtype, device: torch.device,
          grid: Grid | None = None) -> Tensor:
    """A random tensor of that size, whatever part of the global one it is.

    size: local. seed: int64 scalar. site: which random operator of the model this is, a number or an int64 scalar. grid: where
    the local elements lie in the global tensor (default: `size` is that of the full tensor).
    """
    index, seed = global_index(size, grid, device), seed.to(device)

    def word(number: int) -> Tensor:
        return _word(index, seed, site, number)

    if kind == "integer":
        made = (_unsigned(word(0)) & 0x7FFFFFFF) << 32 | _unsigned(word(1))
    elif kind == "uniform":
        made = _fraction(word, 0, digits(dtype))
    else:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        logarithm = -torch.log(_inside(word, 0, wide))
        made = logarithm
        if kind == "normal":
            made = torch.sqrt(2 * logarithm) * torch.cos(2 * math.pi * _inside(word, 2, wide))
    return made.to(dtype)


def digits(dtype: torch.dtype) -> int:
    """How many bits a fraction of this dtype has; integers of so many bits it has exactly."""
    return 1 - int(math.log2(torch.finfo(dtype).eps))


def _fraction(word: Callable[[int], Tensor], number: int, bits: int) -> Tensor:
    """In [0, 1), with so many bits, made of one or two words from `number` on."""
    if bits <= 32:
        return (_unsigned(word(number)) >> (32 - bits)).to(torch.float32) * 2.0**-bits
    low = _unsigned(word(number + 1)) >> (64 - bits)
    return ((_unsigned(word(number)) << (bits - 32)) | low).to(torch.float64) * 2.0**-bits


def _inside(word: Callable[[int], Tensor], number: int, dtype: torch.dtype) -> Tensor:
    """In (0, 1): a logarithm can be taken, and is never 0."""
    bits = digits(dtype) - 1
    return _fraction(word, number, bits) + 0.5 * 2.0**-bits


def _word(index: Tensor, seed: Tensor, site: int | Tensor, number: int) -> Tensor:
    """32 bits, as int32, for each global index (int64)."""
    key = _mix((seed ^ ((site * _GOLDEN + number) & _MASK)).to(torch.int32))
    other = _mix(key ^ (seed >> 32).to(torch.int32) ^ signed(_GOLDEN))
    h = _mix(index.to(torch.int32) ^ key)
    return _mix(h + (index >> 32).to(torch.int32) * signed(_GOLDEN) + other)


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit integers, on int32 tensors, whose products wrap: a GPU multiplies 64-bit integers in many steps."""
    for shift, multiplier in zip((17, 11, 15), _MULTIPLIERS, strict=True):
        h = (h ^ shifted(h, shift)) * signed(multiplier)
    return h ^ shifted(h, 14)


def _unsigned(h: Tensor) -> Tensor:
    return h.to(torch.int64) & _MASK
