"""flash: attention with counter-based dropout in tiles, so that scores and dropout masks are never in memory.

The mask of an element follows from its global index alone (`fxpar.ops.rng`, whose integers these kernels reproduce), so the
backward pass draws it again. Three kernels: the output, by rows; the queries' gradient, by rows; the gradients of keys and
values, by columns. Each adds up in one order, so results are the same in every run. `fxpar.ops.dropout_attention` says what
the arguments are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))
COUNTERS = ["site", "first_row"]
"""Numbers that differ from call to call: no kernel is compiled for a value of theirs."""
NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2
"""The KIND of the model's mask."""
ROOMY = 160 * 1024
"""Bytes of shared memory that a program may take on GPUs of data centers; on others about 100 KiB."""


# ---- what the kernels share ----


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _counters(SEED, site):
    """What `dropout_mask` adds to the index, and to its first mixing."""
    seed = tl.load(SEED)
    first = (seed * 0x9E3779B1 + site.to(tl.int64) * 0x632BE5AB).to(tl.uint32)
    return first, ((seed >> 32) + site).to(tl.uint32)


@triton.jit
def _kept(row, column, first, second, THRESHOLD: tl.constexpr, WIDE: tl.constexpr):
    """Which elements are kept. row: the global index of each row's first element; WIDE: whether some are beyond 32 bits."""
    if WIDE:
        index = row + column
        h = _mix(index.to(tl.uint32) ^ first)
        h = _mix(h + (index >> 32).to(tl.uint32) * 0x9E3779B1 + second)
    else:
        h = _mix((row.to(tl.uint32) + column.to(tl.uint32)) ^ first)
        h = _mix(h + second)
    return h >= THRESHOLD


@triton.jit
def _masked(s, MASK, i, j, n_q, n_k, first_row, mask_q, mask_k, KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            EDGE: tl.constexpr):  # fmt: skip
    """Scores with the model's mask; EDGE: some of these columns may lie beyond the last, or be hidden by the causal mask."""
    if KIND != 0:
        pointers = MASK + i.to(tl.int64) * mask_q + j.to(tl.int64) * mask_k
        if KIND == 1:
            s = tl.where(tl.load(pointers, mask=(i < n_q) & (j < n_k), other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(pointers, mask=(i < n_q) & (j < n_k), other=0.0).to(tl.float32)
    if EDGE:
        seen = j < n_k
        if CAUSAL:
            seen = seen & (j <= i + first_row)
        if WINDOW > 0:
            seen = seen & (i + first_row - j < WINDOW)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _power(s, KIND: tl.constexpr):
    """exp(s), of scores as they are kept: in powers of two, but with a mask that is added, in those of e."""
    if KIND == 2:
        s = s * LOG2_E
    return tl.exp2(s)


@triton.jit
def _columns_of(block, n_k, first_row, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(first column, first that is at an edge, last) that a block of rows looks at: multiples of BN, but for the last."""
    low = 0
    high = n_k
    inner = n_k // BN * BN
    if CAUSAL:
        high = tl.minimum(n_k, first_row + (block + 1) * BM)
        inner = tl.minimum(inner, (first_row + block * BM + 1) // BN * BN)
    if WINDOW > 0:
        low = tl.maximum(0, first_row + block * BM - WINDOW + 1) // BN * BN
        inner = low
    return low, inner, high


@triton.jit
def _rows(POINTER, at, n, stride, d, width: tl.constexpr, stride_d):
    """Rows of a matrix; zero beyond the last, and beyond the last column."""
    return tl.load(POINTER + at[:, None].to(tl.int64) * stride + d[None, :] * stride_d,
                   mask=(at[:, None] < n) & (d[None, :] < width), other=0.0)  # fmt: skip


# ---- forward ----


@triton.jit
def _forward_blocks(acc, top, total, q, K, V, MASK, i, row, low, high, n_q, n_k, first_row, scale, first, second, k_n, k_d, v_n,
                    v_d, mask_q, mask_k, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                    KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, WIDE: tl.constexpr,
                    PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    for start in range(low, high, BN):
        j = start + tl.arange(0, BN)
        k = _rows(K, j, n_k, k_n, d, D, k_d)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = _masked(s, MASK, i[:, None], j[None, :], n_q, n_k, first_row, mask_q, mask_k, KIND, CAUSAL, WINDOW, EDGE)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = _power(s - base[:, None], KIND)
        shrink = _power(top - base, KIND)
        total = total * shrink + tl.sum(p, 1)
        p = tl.where(_kept(row[:, None], j[None, :], first, second, THRESHOLD, WIDE), p, 0.0)
        v = _rows(V, j, n_k, v_n, e, E, v_d)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=COUNTERS)
def _forward(Q, K, V, MASK, SEED, HEADS, OUT, TOP, REST,
             q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_m, o_d, mask_b, mask_h, mask_q, mask_k,
             heads, groups, n_q, n_k, rows, site, first_row, scale, widen,
             D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
             KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, WIDE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(n_q, BM)
    block = tl.program_id(0) % blocks
    both = (tl.program_id(0) // blocks).to(tl.int64)
    b = both // heads
    h = both % heads
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    first, second = _counters(SEED, site)
    row = (tl.load(HEADS + both) * rows + first_row + i) * n_k
    K += b * k_b + h // groups * k_h
    V += b * v_b + h // groups * v_h
    if KIND != 0:
        MASK += b * mask_b + h * mask_h
    if KIND != 2:
        scale *= LOG2_E
    q = _rows(Q + b * q_b + h * q_h, i, n_q, q_m, d, D, q_d)
    acc = tl.zeros([BM, BE], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    low, inner, high = _columns_of(block, n_k, first_row, BM, BN, CAUSAL, WINDOW)
    acc, top, total = _forward_blocks(
        acc, top, total, q, K, V, MASK, i, row, low, inner, n_q, n_k, first_row, scale, first, second, k_n, k_d, v_n, v_d, mask_q,
        mask_k, D, E, BN, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE, PRECISION, False)
    acc, top, total = _forward_blocks(
        acc, top, total, q, K, V, MASK, i, row, inner, high, n_q, n_k, first_row, scale, first, second, k_n, k_d, v_n, v_d,
        mask_q, mask_k, D, E, BN, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE, PRECISION, True)
    some = tl.where(total > 0, total, 1.0)
    out = acc * (widen / some)[:, None]
    if KIND != 2:
        top = top * LN_2
    tl.store(TOP + both * n_q + i, top, mask=i < n_q)
    tl.store(REST + both * n_q + i, tl.log(some), mask=i < n_q)
    tl.store(OUT + b * o_b + h * o_h + i[:, None].to(tl.int64) * o_m + e[None, :] * o_d, out.to(OUT.dtype.element_ty),
             mask=(i[:, None] < n_q) & (e[None, :] < E))  # fmt: skip


# ---- backward ----


@triton.jit
def _probabilities(s, top, rest, KIND: tl.constexpr):
    """From scores and what the forward pass kept of their rows; 0 in a row that sees nothing."""
    if KIND != 2:
        top = top * LOG2_E
        return tl.exp2(s - tl.where(top == float("-inf"), 0.0, top) - rest * LOG2_E)
    return tl.exp2((s - tl.where(top == float("-inf"), 0.0, top) - rest) * LOG2_E)


@triton.jit
def _query_blocks(acc, q, grad, delta, top, rest, K, V, MASK, i, row, low, high, n_q, n_k, first_row, scale, widen, first, second,
                  k_n, k_d, v_n, v_d, mask_q, mask_k, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                  BE: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr,
                  WIDE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    for start in range(low, high, BN):
        j = start + tl.arange(0, BN)
        k = _rows(K, j, n_k, k_n, d, D, k_d)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = _masked(s, MASK, i[:, None], j[None, :], n_q, n_k, first_row, mask_q, mask_k, KIND, CAUSAL, WINDOW, EDGE)
        p = _probabilities(s, top[:, None], rest[:, None], KIND)
        v = _rows(V, j, n_k, v_n, e, E, v_d)
        of_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION) * widen
        of_p = tl.where(_kept(row[:, None], j[None, :], first, second, THRESHOLD, WIDE), of_p, 0.0)
        of_s = p * (of_p - delta[:, None])
        acc += tl.dot(of_s.to(k.dtype), k, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=COUNTERS)
def _queries(Q, K, V, MASK, SEED, HEADS, OUT, TOP, REST, GRAD, DELTA, OF_Q,
             q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_m, o_d, g_b, g_h, g_m, g_d,
             dq_b, dq_h, dq_m, dq_d, mask_b, mask_h, mask_q, mask_k,
             heads, groups, n_q, n_k, rows, site, first_row, scale, widen,
             D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
             KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, WIDE: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """The queries' gradient; and, for the kernel of keys and values, what each row's probabilities give its softmax: DELTA."""
    blocks = tl.cdiv(n_q, BM)
    block = tl.program_id(0) % blocks
    both = (tl.program_id(0) // blocks).to(tl.int64)
    b = both // heads
    h = both % heads
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    first, second = _counters(SEED, site)
    row = (tl.load(HEADS + both) * rows + first_row + i) * n_k
    K += b * k_b + h // groups * k_h
    V += b * v_b + h // groups * v_h
    unit = scale
    if KIND != 0:
        MASK += b * mask_b + h * mask_h
    if KIND != 2:
        unit = scale * LOG2_E
    q = _rows(Q + b * q_b + h * q_h, i, n_q, q_m, d, D, q_d)
    grad = _rows(GRAD + b * g_b + h * g_h, i, n_q, g_m, e, E, g_d)
    out = _rows(OUT + b * o_b + h * o_h, i, n_q, o_m, e, E, o_d)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + both * n_q + i, delta, mask=i < n_q)
    top = tl.load(TOP + both * n_q + i, mask=i < n_q, other=float("inf"))
    rest = tl.load(REST + both * n_q + i, mask=i < n_q, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    low, inner, high = _columns_of(block, n_k, first_row, BM, BN, CAUSAL, WINDOW)
    acc = _query_blocks(acc, q, grad, delta, top, rest, K, V, MASK, i, row, low, inner, n_q, n_k, first_row, unit, widen, first,
                        second, k_n, k_d, v_n, v_d, mask_q, mask_k, D, E, BN, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE,
                        PRECISION, False)
    acc = _query_blocks(acc, q, grad, delta, top, rest, K, V, MASK, i, row, inner, high, n_q, n_k, first_row, unit, widen, first,
                        second, k_n, k_d, v_n, v_d, mask_q, mask_k, D, E, BN, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE,
                        PRECISION, True)
    tl.store(OF_Q + b * dq_b + h * dq_h + i[:, None].to(tl.int64) * dq_m + d[None, :] * dq_d,
             (acc * scale).to(OF_Q.dtype.element_ty), mask=(i[:, None] < n_q) & (d[None, :] < D))  # fmt: skip


@triton.jit
def _key_blocks(of_k, of_v, k, v, Q, GRAD, TOP, REST, DELTA, MASK, j, base, low, high, n_q, n_k, first_row, scale, widen, first,
                second, q_m, q_d, g_m, g_d, mask_q, mask_k, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
                BE: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr,
                WIDE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Scores are transposed here: a row of the tile is a key."""
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    for start in range(low, high, BM):
        i = start + tl.arange(0, BM)
        q = _rows(Q, i, n_q, q_m, d, D, q_d)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        s = _masked(s, MASK, i[None, :], j[:, None], n_q, n_k, first_row, mask_q, mask_k, KIND, CAUSAL, WINDOW, EDGE)
        top = tl.load(TOP + i, mask=i < n_q, other=float("inf"))
        rest = tl.load(REST + i, mask=i < n_q, other=0.0)
        p = _probabilities(s, top[None, :], rest[None, :], KIND)
        row = base + i.to(tl.int64) * n_k
        kept = _kept(row[None, :], j[:, None], first, second, THRESHOLD, WIDE)
        grad = _rows(GRAD, i, n_q, g_m, e, E, g_d)
        of_v += tl.dot(tl.where(kept, p * widen, 0.0).to(grad.dtype), grad, input_precision=PRECISION)
        of_p = tl.where(kept, tl.dot(v, tl.trans(grad), input_precision=PRECISION) * widen, 0.0)
        of_s = p * (of_p - tl.load(DELTA + i, mask=i < n_q, other=0.0)[None, :])
        of_k += tl.dot(of_s.to(q.dtype), q, input_precision=PRECISION)
    return of_k, of_v


@triton.jit(do_not_specialize=COUNTERS)
def _keys(Q, K, V, MASK, SEED, HEADS, TOP, REST, GRAD, DELTA, OF_K, OF_V,
          q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, g_b, g_h, g_m, g_d,
          dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d, mask_b, mask_h, mask_q, mask_k,
          heads, groups, n_q, n_k, rows, site, first_row, scale, widen,
          D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
          KIND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, WIDE: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """The gradients of keys and values, over all heads of queries that share them."""
    blocks = tl.cdiv(n_k, BN)
    block = tl.program_id(0) % blocks
    both = (tl.program_id(0) // blocks).to(tl.int64)
    kv = heads // groups
    b = both // kv
    shared = both % kv
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    first, second = _counters(SEED, site)
    unit = scale
    if KIND != 2:
        unit = scale * LOG2_E
    k = _rows(K + b * k_b + shared * k_h, j, n_k, k_n, d, D, k_d)
    v = _rows(V + b * v_b + shared * v_h, j, n_k, v_n, e, E, v_d)
    of_k = tl.zeros([BN, BD], tl.float32)
    of_v = tl.zeros([BN, BE], tl.float32)
    low = 0
    high = n_q
    inner = 0
    if (block + 1) * BN > n_k:
        inner = n_q
    if CAUSAL:
        low = tl.minimum(n_q, tl.maximum(0, block * BN - first_row)) // BM * BM
        whole = tl.maximum(0, (block + 1) * BN - 1 - first_row + BM - 1) // BM * BM
        inner = tl.maximum(low, tl.minimum(n_q, tl.maximum(inner, whole)))
    if WINDOW > 0:
        high = tl.maximum(low, tl.minimum(n_q, (block + 1) * BN - 1 + WINDOW - first_row))
        inner = high
    for group in range(groups):
        h = shared * groups + group
        at = b * heads + h
        base = (tl.load(HEADS + at) * rows + first_row) * n_k
        own = MASK
        if KIND != 0:
            own = MASK + b * mask_b + h * mask_h
        of_k, of_v = _key_blocks(
            of_k, of_v, k, v, Q + b * q_b + h * q_h, GRAD + b * g_b + h * g_h, TOP + at * n_q, REST + at * n_q, DELTA + at * n_q,
            own, j, base, low, inner, n_q, n_k, first_row, unit, widen, first, second, q_m, q_d, g_m, g_d, mask_q, mask_k, D, E,
            BM, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE, PRECISION, True)
        of_k, of_v = _key_blocks(
            of_k, of_v, k, v, Q + b * q_b + h * q_h, GRAD + b * g_b + h * g_h, TOP + at * n_q, REST + at * n_q, DELTA + at * n_q,
            own, j, base, inner, high, n_q, n_k, first_row, unit, widen, first, second, q_m, q_d, g_m, g_d, mask_q, mask_k, D, E,
            BM, BD, BE, KIND, CAUSAL, WINDOW, THRESHOLD, WIDE, PRECISION, False)
    tl.store(OF_K + b * dk_b + shared * dk_h + j[:, None].to(tl.int64) * dk_n + d[None, :] * dk_d,
             (of_k * scale).to(OF_K.dtype.element_ty), mask=(j[:, None] < n_k) & (d[None, :] < D))  # fmt: skip
    tl.store(OF_V + b * dv_b + shared * dv_h + j[:, None].to(tl.int64) * dv_n + e[None, :] * dv_d, of_v.to(OF_V.dtype.element_ty),
             mask=(j[:, None] < n_k) & (e[None, :] < E))  # fmt: skip


# ---- how they are launched ----


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of a tile of scores, and how many warps and stages a program takes."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles_for(kernel: str, width: int, dtype: torch.dtype, shared: int = ROOMY) -> Tiles:
    """The tiles of "forward", "queries" or "keys", for heads of `width` (a power of two), where a program may take so many bytes
    of shared memory."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 1) if width <= 64 and kernel != "keys" else Tiles(32, 32, 4, 1)
    if width > 64 and shared < ROOMY:
        return Tiles(64, 32, 4, 1) if width <= 128 else Tiles(16, 32, 4, 1)
    if kernel == "forward":
        return Tiles(128, 64, 8, 3) if width <= 128 else Tiles(64, 32, 8, 2)
    if width <= 64:
        return Tiles(64, 64, 4, 3)
    return Tiles(64, 64, 8, 2) if width <= 128 else Tiles(32, 32, 4, 1)


@functools.cache
def _shared_memory(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


@dataclass(frozen=True)
class Call:
    """What is the same for all three kernels. mask: None, boolean or added to the scores, [b, h, q, k] (dims of step 0 are not
    read). heads: int64 [b, h], contiguous. rows, first_row: how many queries there are globally, and which is the first.
    wide: whether a global index may need more than 32 bits."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: Tensor
    heads: Tensor
    p: float
    site: int
    scale: float
    is_causal: bool
    window: int
    first_row: int
    rows: int
    wide: bool

    def options(self, kernel: str, tiles: Tiles | None) -> dict[str, Any]:
        d, e = self.q.shape[3], self.v.shape[3]
        width, value_width = (max(16, triton.next_power_of_2(n)) for n in (d, e))
        room = _shared_memory(self.q.device.index) if self.q.is_cuda else ROOMY
        t = tiles or tiles_for(kernel, max(width, value_width), self.q.dtype, room)
        kind = NO_MASK if self.mask is None else BOOL_MASK if self.mask.dtype == torch.bool else FLOAT_MASK
        return dict(
            heads=self.q.shape[1], groups=self.q.shape[1] // self.k.shape[1], n_q=self.q.shape[2], n_k=self.k.shape[2],
            rows=self.rows, site=self.site, first_row=self.first_row, scale=self.scale, widen=1 / (1 - self.p), D=d, E=e,
            BM=t.rows, BN=t.columns, BD=width, BE=value_width, KIND=kind, CAUSAL=self.is_causal, WINDOW=self.window,
            THRESHOLD=int(self.p * 2**32), WIDE=self.wide, PRECISION="tf32x3" if self.q.dtype == torch.float32 else "tf32",
            num_warps=t.warps, num_stages=t.stages)  # fmt: skip

    def operands(self) -> tuple[Tensor, ...]:
        """As the kernels take them."""
        mask = self.q if self.mask is None else self.mask
        return self.q, self.k, self.v, mask.view(torch.uint8) if mask.dtype == torch.bool else mask, self.seed, self.heads

    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


def forward(call: Call, out: Tensor, top: Tensor, rest: Tensor, tiles: Tiles | None = None) -> None:
    """Write [b, h, q, e] to `out`; to `top` and `rest` [b, h, q], fp32, each row's largest score and the logarithm of its sum
    over exp(score - largest)."""
    b, h, length, _ = call.q.shape
    options = call.options("forward", tiles)
    _forward[(triton.cdiv(length, options["BM"]) * b * h,)](
        *call.operands(), out, top, rest, *call.q.stride(), *call.k.stride(), *call.v.stride(), *out.stride(),
        *call.mask_strides(), **options)


def backward(call: Call, grad: Tensor, out: Tensor, top: Tensor, rest: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor,
             tiles: tuple[Tiles | None, Tiles | None] = (None, None)) -> None:
    """Write the gradients of `call`'s operands, from that of `out` and what `forward` wrote."""
    delta = torch.empty_like(top)
    backward_of_queries(call, grad, out, top, rest, delta, of_q, tiles[0])
    backward_of_keys(call, grad, top, rest, delta, of_k, of_v, tiles[1])


def backward_of_queries(call: Call, grad: Tensor, out: Tensor, top: Tensor, rest: Tensor, delta: Tensor, of_q: Tensor,
                        tiles: Tiles | None = None) -> None:
    """Write `of_q`, and to `delta` [b, h, q] each row's sum of ``grad * out``."""
    b, h, length, _ = call.q.shape
    q, k, v, mask, seed, heads = call.operands()
    options = call.options("queries", tiles)
    strides = [s for t in (q, k, v, out, grad, of_q) for s in t.stride()]
    _queries[(triton.cdiv(length, options["BM"]) * b * h,)](
        q, k, v, mask, seed, heads, out, top, rest, grad, delta, of_q, *strides, *call.mask_strides(), **options)


def backward_of_keys(call: Call, grad: Tensor, top: Tensor, rest: Tensor, delta: Tensor, of_k: Tensor, of_v: Tensor,
                     tiles: Tiles | None = None) -> None:
    """Write `of_k` and `of_v`."""
    q, k, v, mask, seed, heads = call.operands()
    options = call.options("keys", tiles)
    strides = [s for t in (q, k, v, grad, of_k, of_v) for s in t.stride()]
    _keys[(triton.cdiv(k.shape[2], options["BN"]) * k.shape[0] * k.shape[1],)](
        q, k, v, mask, seed, heads, top, rest, grad, delta, of_k, of_v, *strides, *call.mask_strides(), **options)
