"""`dropout_attention`: attention whose weights drop out by the counter-based generator, in memory that grows with the length.

To compilers it is an opaque operator with an opaque backward. On GPUs both are kernels that never write scores, weights or
dropout masks to memory (`fxpar.ops.kernels.flash`); elsewhere they are written out. Both draw the same mask, that of
`fxpar.ops.rng.dropout_mask` for weights [b, h, q, k], from an element's global index.

Programs have the operator unless `use_kernels` says otherwise.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fxpar.ops.kernels import has_triton
from fxpar.ops.rng import Grid, global_index, kept, seed_of_site
from fxpar.sharding.deal import dealt_from

WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
"""Elements of a head that the kernels take, of every dtype that they compute in."""

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_OPTIONS = "float p, int site, float scale, bool is_causal, int window, int first_row, int rows, bool wide"
_library.define(f"attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor seed, Tensor heads, {_OPTIONS})"
                " -> (Tensor, Tensor, Tensor)")  # fmt: skip
_library.define("attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor seed, Tensor heads, Tensor out, "
                f"Tensor top, Tensor rest, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")  # fmt: skip
attend = torch.ops.fxpar.attend.default
"""q [b, h, q, d], k [b, kv, k, d], v [b, kv, k, e], kv a divisor of h -> (out [b, h, q, e], top [b, h, q], rest [b, h, q]).

mask: None, or [b, h, q, k] (it may be expanded): boolean, True where a key is seen, or added to the scores; it has no gradient.
seed: int64 scalar. heads: int64 [b, h], each head's global index among the heads of all rows of the batch. p, site: as of
`dropout_mask`; p < 1. window: with `is_causal`, how many keys a query sees at most, 0: all. first_row, rows: which query is the
first here, and how many there are globally. wide: whether a global index may need more than 32 bits.

top is each query's largest score, top + rest the logarithm of its sum over exp(score), both in fp32 (fp64 of fp64); no gradient
flows through them. Apart they keep their digits where a mask adds the lowest number to all scores. A query that sees no key has
0 for its result, and gets no gradient."""
attend_backward = torch.ops.fxpar.attend_backward.default
"""(the gradient of out, the operands and results of `attend`, its options) -> the gradients of q, k and v."""


def dropout_attention(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, *, p: float, site: int | Tensor,
                      attn_mask: Tensor | None = None, is_causal: bool = False, window: int | None = None,
                      scale: float | None = None, enable_gqa: bool = False, grid: Grid | None = None) -> Tensor:  # fmt: skip
    """``dropout(softmax(scale * q k^T + mask), p) v``, with the mask that `dropout_mask` draws for those weights.

    Takes: q [b, h, q, d], k [b, kv, k, d], v [b, kv, k, e]; kv is h, or divides it if `enable_gqa`. attn_mask: as
    `scaled_dot_product_attention` takes it, without a gradient. window: causal attention to so many keys at most. grid: where the
    elements of [b, h, q] lie in the global tensor, as of `dropout_mask` (default: they are the full tensor); of what a dim of
    queries was made from, the first alone may be split. Keys are not split. Returns [b, h, q, e].

    Queries that are dealt (see fxpar/sharding/deal.py) are chunks, each of which is a call of the operator.
    """
    if isinstance(site, Tensor):
        seed, site = seed_of_site(seed, site), 0
    (b, h, length, d), columns = q.shape, k.shape[2]
    places: Grid = tuple(grid)[:3] if grid else tuple(((int(n), 0, int(n)),) for n in (b, h, length))
    heads = global_index((b, h), places[:2], q.device).expand(b, h).contiguous()
    rows, total = (math.prod(full for runs in dims for _, _, full, *_ in runs) for dims in (places[2:], places))
    scale = scale if scale is not None else 1 / math.sqrt(d)
    mask = None if attn_mask is None else attn_mask.expand(b, h, length, columns)
    chunks = _chunks(places[2])
    lengths = [n for _, n in chunks]
    masks = [None] * len(chunks) if mask is None else mask.split(lengths, 2)
    outs = [attend(part, k, v, its_mask, seed, heads, p, site, scale, is_causal or window is not None, window or 0, first, rows,
                   total * columns > 2**32)[0]
            for part, its_mask, (first, _) in zip(q.split(lengths, 2), masks, chunks, strict=True)]  # fmt: skip
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool, p: float) -> str:
    """Why `dropout_attention` cannot compute this (a mask that has no gradient assumed); empty if it can."""
    same = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]
    if not same or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        return f"operands of shapes {shapes} are not [b, h, q, d], [b, h, k, d], [b, h, k, e]"
    if q.shape[1] != k.shape[1] and not (enable_gqa and q.shape[1] % k.shape[1] == 0):
        return f"{q.shape[1]} heads of queries do not share {k.shape[1]} of keys"
    if not all(x.dtype == q.dtype and x.is_floating_point() for x in (k, v)):
        return "queries, keys and values are not of one dtype"
    if max(q.shape[3], v.shape[3]) > (widest := WIDEST.get(q.dtype, 256)):
        return f"heads of {max(q.shape[3], v.shape[3])} elements are wider than {widest}"
    weights = (*q.shape[:3], k.shape[2])
    if mask is not None and torch.broadcast_shapes(mask.shape, weights) != weights:
        return f"a mask of shape {tuple(mask.shape)} does not broadcast to {tuple(weights)}"
    return "all weights drop out" if p >= 1 else ""


def _chunks(runs: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """(the first, how many) of local elements that follow one another globally: all of them, or each chunk of what is dealt."""
    if not runs:
        return [(0, 1)]
    (local, offset, full, *ranks), *behind = runs
    assert all(run[0] == run[2] for run in behind), "local queries do not follow one another"
    each = math.prod(run[2] for run in behind)
    length = full // (2 * ranks[0]) if ranks else full
    found, at = [], offset
    while at < offset + local:
        end = min((at // length + 1) * length, offset + local)
        first = dealt_from(at, full, ranks[0]) if ranks else at
        found.append((first * each, (end - at) * each))
        at = end
    return found


# ---- whether programs have the operator ----

_used = True


def use_kernels(on: bool = True) -> None:
    """Say of all models that this process captures from now on whether their attention with dropout becomes `dropout_attention`.

    On by default. Off, it is written out in the graph, as products around a softmax of all scores, and a sliding window stays a
    mask. Masks are the same, so a seed gives the same numbers, but for rounding. To be called on all ranks alike, before
    `parallelize`, `inspect` or `simulate`; what was captured before stays as it is.
    """
    global _used
    _used = on


def uses_kernels() -> bool:
    """What `use_kernels` said last."""
    return _used


# ---- written out ----


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool, window: int,
             first_row: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scores, their softmax): [b, h, q, k]."""
    scores = torch.matmul(q * scale, _repeated(k, q).mT)
    if is_causal:
        row = torch.arange(q.shape[2], device=q.device)[:, None] + first_row
        column = torch.arange(k.shape[2], device=q.device)
        seen = (column <= row) & (row - column < window) if window else column <= row
        scores = torch.where(seen, scores, -math.inf)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -math.inf
    return scores, torch.where(blind, 0.0, torch.softmax(scores, -1))


def _keep(scores: Tensor, seed: Tensor, heads: Tensor, p: float, site: int, first_row: int, rows: int) -> Tensor:
    """Which weights are kept."""
    length, columns = scores.shape[2:]
    row = heads[:, :, None] * rows + first_row + torch.arange(length, device=heads.device)
    return kept(row[..., None] * columns + torch.arange(columns, device=heads.device), seed, p=p, site=site)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Heads of keys or values, one for each of the queries'."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _shared(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` from that of its repeated heads."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _as_attention(x: Tensor, width: int) -> Tensor:
    """An empty [b, h, l, width] that lies in memory as [b, l, h, width]: so do what attention takes and what takes its result."""
    b, h, length, _ = x.shape
    return x.new_empty(b, length, h, width).transpose(1, 2)


@torch.library.impl(_library, "attend", "CompositeExplicitAutograd")
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, heads: Tensor, p: float, site: int, scale: float,
            is_causal: bool, window: int, first_row: int, rows: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, top, rest = _fake(q, k, v)
    if has_kernel(q):
        flash = _flash()
        call = flash.Call(q, k, v, mask, seed, heads, p, site, scale, is_causal, window, first_row, rows, wide)
        flash.forward(call, out, top, rest)
        return out, top, rest
    scores, weights = _weights(q, k, mask, scale, is_causal, window, first_row)
    keep = _keep(scores, seed, heads, p, site, first_row, rows)
    out.copy_(torch.matmul(torch.where(keep, weights * (1 / (1 - p)), 0.0), _repeated(v, q)))
    top.copy_(scores.amax(-1))
    rest.copy_((scores.to(rest.dtype) - top.clamp(min=torch.finfo(top.dtype).min)[..., None]).exp().sum(-1).log())
    return out, top, rest.nan_to_num_(neginf=0.0)


@torch.library.impl(_library, "attend_backward", "CompositeExplicitAutograd")
def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, heads: Tensor, out: Tensor,
                     top: Tensor, rest: Tensor, p: float, site: int, scale: float, is_causal: bool, window: int, first_row: int,
                     rows: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of_q, of_k, of_v = (_as_attention(x, x.shape[3]) for x in (q, k, v))
    if has_kernel(q):
        flash = _flash()
        call = flash.Call(q, k, v, mask, seed, heads, p, site, scale, is_causal, window, first_row, rows, wide)
        flash.backward(call, grad, out, top, rest, of_q, of_k, of_v)
        return of_q, of_k, of_v
    scores, weights = _weights(q, k, mask, scale, is_causal, window, first_row)
    keep = _keep(scores, seed, heads, p, site, first_row, rows)
    widen = 1 / (1 - p)
    of_v.copy_(_shared(torch.matmul(torch.where(keep, weights * widen, 0.0).mT, grad), v))
    of_weights = torch.where(keep, torch.matmul(grad, _repeated(v, q).mT), 0.0) * widen
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    of_q.copy_(torch.matmul(of_scores, _repeated(k, q)) * scale)
    of_k.copy_(_shared(torch.matmul(of_scores.mT, q * scale), k))
    return of_q, of_k, of_v


# ---- on GPUs ----


def has_kernel(q: Tensor) -> bool:
    """Whether attention with such queries runs as the kernels (of what `refusal` lets pass)."""
    if q.device.type != "cuda" or q.dtype not in WIDEST:
        return False
    return _has_triton_or_warns()


@functools.cache
def _has_triton_or_warns() -> bool:
    if not has_triton():
        warnings.warn("Triton is not installed: attention with dropout writes out its scores, which takes memory and time that "
                      "grow with the square of the length (way out: pip install triton)", stacklevel=2)
    return has_triton()


def _flash() -> Any:
    """The kernels, imported where they run."""
    from fxpar.ops.kernels import flash

    return flash


# ---- for compilers ----


@torch.library.register_fake("fxpar::attend", lib=_library)
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _as_attention(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.register_fake("fxpar::attend_backward", lib=_library)
def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (_as_attention(x, x.shape[3]) for x in (q, k, v))
    return of_q, of_k, of_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, mask, seed, heads, out, top, rest = ctx.saved_tensors
    grads = attend_backward(grad, q, k, v, mask, seed, heads, out, top, rest, *ctx.options)
    return *grads, *[None] * (3 + len(ctx.options))


torch.library.register_autograd("fxpar::attend", _backward, setup_context=_save, lib=_library)
