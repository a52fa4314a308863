"""Attention that ATen has no operator for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxpar.ops.rng import coordinates


@dataclass(frozen=True)
class MaskSight:
    """What an attention mask says: a query sees the keys up to its own place (causal), of these the last `window`, those of its
    own segment, and of all these those that are valid. The nodes: integers [b or 1, 1, q, 1] and [b or 1, 1, 1, k], both or none;
    booleans [b or 1, 1, 1, k]."""

    causal: bool
    window: int | None
    q_segments: fx.Node | None
    kv_segments: fx.Node | None
    valid: fx.Node | None


def takes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False) -> bool:
    """Whether `windowed_attention` is defined for operands of these shapes (it does not broadcast)."""
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[3] != k.shape[3]:
        return False
    (batch, heads, length, _), kv = q.shape, k.shape[1]
    agree = heads % kv == 0 if enable_gqa else heads == kv
    return agree and k.shape[:3] == v.shape[:3] == (batch, kv, length)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None,
                       enable_gqa: bool = False, dropout_p: float = 0.0) -> Tensor:  # fmt: skip
    """Causal attention in which query i sees the keys i - window + 1 .. i.

    Takes: q [b, h, l, d], k [b, kv, l, d], v [b, kv, l, e]; kv is h, or divides it if `enable_gqa`.
    Returns [b, h, l, e]: what `scaled_dot_product_attention` gives with that mask, in memory proportional to
    l * window at most (to l * l with dropout, of which the pass `dropout` makes `dropout_attention`). Raises ValueError for
    a window of no keys or operands of other shapes.

    The sequence is cut into blocks of `window`. No query sees further back than the block before its own, and
    in these two the mask is the same for every block; so the blocks are a batch that shares one small mask.
    The first block has none before it and is causal attention.
    """
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    if not takes(q, k, v, enable_gqa):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v of shapes {shapes}, enable_gqa={enable_gqa}: they do not agree")
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if dropout_p:
        place = torch.arange(length, device=q.device)
        seen = (place <= place[:, None]) & (place > place[:, None] - window)
        return F.scaled_dot_product_attention(q, k, v, seen, dropout_p, scale=scale, enable_gqa=enable_gqa)
    attention = functools.partial(F.scaled_dot_product_attention, scale=scale)
    q0, k0, v0 = q[:, :, :window], k[:, :, :window], v[:, :, :window]
    first = attention(q0, k0, v0, is_causal=True, enable_gqa=enable_gqa)
    if length <= window:
        return first

    def blocks(x: Tensor) -> Tensor:
        """[b, h, l, d] -> [b, blocks, h, window, d]"""
        padded = F.pad(x, (0, 0, 0, -length % window))
        return padded.unflatten(2, (-1, window)).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        """[b, kv, l, d] -> [b * (blocks - 1), kv, 2 * window, d]"""
        x = blocks(x)
        return torch.cat([x[:, :-1], x[:, 1:]], dim=3).flatten(0, 1)

    # The queries of the heads that share a key head stand one below the other: no key is repeated.
    own = blocks(q)[:, 1:].flatten(0, 1).reshape(-1, k.shape[1], groups * window, q.shape[3])
    row = torch.arange(window, device=q.device).repeat(groups)[:, None]
    column = torch.arange(2 * window, device=q.device)
    seen = (column > row) & (column <= row + window)
    rest = attention(own, with_previous(k), with_previous(v), attn_mask=seen)
    rest = rest.reshape(q.shape[0], -1, q.shape[1], window, v.shape[3]).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)


def attention_of_rows(q: Tensor, k: Tensor, v: Tensor, *, rows, window: int | None = None, scale: float | None = None,
                      enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Causal attention of some queries of a sequence to all of its keys; where there is a window, to the last of them.

    rows: where in the sequence the queries are, as runs (see `fxpar.ops.rng.coordinates`). Otherwise as
    `scaled_dot_product_attention`.
    """
    at = coordinates(rows, q.device)[:, None]
    keys = torch.arange(k.shape[-2], device=q.device)
    seen = keys <= at if window is None else (keys <= at) & (keys > at - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
