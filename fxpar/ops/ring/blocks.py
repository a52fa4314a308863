"""blocks: attention of a block of queries to a block of keys, and how the results for several blocks of keys become one.

What no kernel can be told in words is told as a mask, in tiles of queries, so that no mask has more than `TILE` elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxpar.ops.ring.kernels import ALL, MATH, BlockKernel, Seen, accumulates_in, choose, for_masks, takes_bands
from fxpar.ops.ring.sight import Sight

TILE = 2**24
"""Elements of a mask, at most (but for that of one query); of plain products, scores."""
ROWS = 256
"""Queries of a tile, at least, where a window limits the keys."""


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> tuple[Tensor, Tensor]:
    """q [b, h, lq, d], k [b, kv, lk, d], v [b, kv, lk, e] -> out [b, h, lq, e], lse [b, h, lq]: over these keys alone, 0 and -inf
    for queries that see none of them."""
    wide = accumulates_in(q.dtype)
    out: Tensor | None = None
    for rows, keys, seen, kernel in _parts(q, k, v, sight, scale):
        here, its = kernel.forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], seen, scale)
        if rows == slice(0, q.shape[2]) and seen.mask is None:
            return here, its
        if out is None:
            out, lse = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), q.new_full(q.shape[:3], -math.inf, dtype=wide)
        blind = torch.zeros((), dtype=torch.bool, device=q.device) if seen.mask is None else ~seen.mask.any(-1)
        out[:, :, rows] = here.to(wide).masked_fill_(blind.unsqueeze(-1), 0)
        lse[:, :, rows] = its.masked_fill(blind, -math.inf)
    if out is None:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=wide)
    return out, lse


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sight: Sight, scale: float,
                    grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add to `grads`, of q, k and v, what these keys contribute. out, lse: over all keys of all blocks, lse infinite (not
    -inf) for queries that see none at all."""
    for rows, keys, seen, kernel in _parts(q, k, v, sight, scale):
        found = kernel.backward(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                                lse[:, :, rows], seen, scale)
        for into, where, mine in zip(grads, (rows, keys, keys), found, strict=True):
            into[:, :, where] += mine


def _parts(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> Iterator[tuple[slice, slice, Seen, BlockKernel]]:
    """The calls of kernels that a block takes: one; or one for every tile, of what is told as a mask, and of plain products,
    which hold all scores at once."""
    queries, keys = q.shape[2], k.shape[2]
    sight = sight.simplified(queries, keys)
    told = _told(q, k, v, sight)
    if told is not None:
        kernel = choose(q, k, v, told, scale)
        if kernel is not MATH:
            yield slice(0, queries), slice(0, keys), told, kernel
            return
    kernel = for_masks(q, v)
    most = TILE // (q.shape[0] * (q.shape[1] if kernel is MATH else 1))
    size = most // keys if sight.window is None else min(max(ROWS, sight.window), most // (2 * sight.window))
    for start in range(0, queries, max(1, size)):
        rows = slice(start, min(start + max(1, size), queries))
        reach = sight.reach(rows, keys)
        if reach.stop > reach.start:
            yield rows, reach, Seen(mask=sight.mask(rows, reach, q.device)), kernel


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


class Merged:
    """Attention to the blocks seen so far: `out` and `lse` as `attend` returns them, wide."""

    def __init__(self, q: Tensor, v: Tensor):
        b, h, length, _ = q.shape
        wide = accumulates_in(q.dtype)
        self.out = q.new_empty(b, length, h, v.shape[3], dtype=wide).transpose(1, 2)
        self.lse = q.new_empty((b, h, length), dtype=wide)
        self._begun = False

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """What queries `rows` get from keys that were not seen yet."""
        mine, before = self.out[:, :, rows], self.lse[:, :, rows]
        if not self._begun:
            self._begun = True
            if out.shape == self.out.shape:
                mine.copy_(out)
                before.copy_(lse)
                return
            self.out.zero_()
            self.lse.fill_(-math.inf)
        both = torch.logaddexp(before, lse)
        top = both.masked_fill(both == -math.inf, 0)
        mine.mul_((before - top).exp_().unsqueeze(-1))
        mine.addcmul_(out, (lse - top).exp_().unsqueeze(-1))
        before.copy_(both)
