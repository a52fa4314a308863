"""blocks: attention of a block of queries to a block of keys, and how the results for several blocks of keys become one.

What no kernel can be told in words is told as a mask, in tiles of queries, so that no mask has more than `TILE` elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxpar.ops.ring.kernels import ALL, Seen, accumulates_in, choose, takes_bands
from fxpar.ops.ring.sight import Sight

TILE = 2**24
"""Elements of a mask, at most (but for that of one query)."""
ROWS = 256
"""Queries of a tile, at least, where a window limits the keys."""


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> tuple[Tensor, Tensor]:
    """q [b, h, lq, d], k [b, kv, lk, d], v [b, kv, lk, e] -> out [b, h, lq, e], lse [b, h, lq]: over these keys alone, 0 and -inf
    for queries that see none of them."""
    sight = sight.simplified(q.shape[2], k.shape[2])
    told = _told(q, k, v, sight)
    if told is not None:
        return choose(q, k, v, told, scale).forward(q, k, v, told, scale)
    wide = accumulates_in(q.dtype)
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), q.new_full(q.shape[:3], -math.inf, dtype=wide)
    for rows, keys in _tiles(q, k, sight):
        seen = Seen(mask=sight.mask(rows, keys, q.device))
        part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        here, its = choose(*part, seen, scale).forward(*part, seen, scale)
        assert seen.mask is not None
        blind = ~seen.mask.any(-1)
        out[:, :, rows] = here.to(wide).masked_fill_(blind.unsqueeze(-1), 0)
        lse[:, :, rows] = its.masked_fill(blind, -math.inf)
    return out, lse


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight, scale: float,
                    grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add to `grads`, of q, k and v, what these keys contribute. out, lse: over all keys of all blocks, lse infinite (not
    -inf) for queries that see none at all."""
    sight = sight.simplified(q.shape[2], k.shape[2])
    told = _told(q, k, v, sight)
    parts = [(slice(0, q.shape[2]), slice(0, k.shape[2]))] if told is not None else _tiles(q, k, sight)
    for rows, keys in parts:
        seen = told or Seen(mask=sight.mask(rows, keys, q.device))
        part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        kernel = choose(*part, seen, scale)
        found = kernel.backward(grad[:, :, rows], *part, out[:, :, rows], lse[:, :, rows], seen, scale)
        for into, where, mine in zip(grads, (rows, keys, keys), found, strict=True):
            into[:, :, where] += mine


def _told(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Seen | None:
    """What is seen, as kernels can be told without a mask."""
    if sight.ids:
        return None
    queries, keys = q.shape[2], k.shape[2]
    if sight.shift is None:
        return ALL
    if sight.shift == 0 and sight.window is None and queries == keys:
        return Seen(causal=True)
    right = sight.shift - (keys - queries)
    left = keys if sight.window is None else sight.window - 1 - right
    if takes_bands(q, v) and left >= 0 and right >= 0:
        return Seen(band=(left, right))
    return None


def _tiles(q: Tensor, k: Tensor, sight: Sight) -> Iterator[tuple[slice, slice]]:
    """Runs of queries, and of the keys that they may see."""
    queries, keys = q.shape[2], k.shape[2]
    size = max(1, TILE // (q.shape[0] * keys))
    if sight.window is not None:
        size = max(1, min(max(ROWS, sight.window), TILE // (q.shape[0] * 2 * sight.window)))
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        reach = sight.reach(rows, keys)
        if reach.stop > reach.start:
            yield rows, reach


class Merged:
    """Attention to the blocks seen so far: `out` and `lse` as `attend` returns them."""

    def __init__(self, q: Tensor, v: Tensor):
        b, h, length, _ = q.shape
        wide = accumulates_in(q.dtype)
        self.out = q.new_zeros(b, length, h, v.shape[3], dtype=wide).transpose(1, 2)
        self.lse = q.new_full((b, h, length), -math.inf, dtype=wide)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """What queries `rows` get from keys that were not seen yet."""
        mine, before = self.out[:, :, rows], self.lse[:, :, rows]
        both = torch.logaddexp(before, lse)
        top = both.masked_fill(both == -math.inf, 0)
        mine.mul_((before - top).exp_().unsqueeze(-1))
        mine.addcmul_(out, (lse - top).exp_().unsqueeze(-1))
        before.copy_(both)
