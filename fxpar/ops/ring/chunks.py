"""`attention_of_chunks`: attention of some chunks of a sequence's queries to all of its keys, which are there.

    attention_of_chunks(q, k, v, starts, *, causal=False, window=None, scale=None,
                        q_segments=None, kv_segments=None, kv_valid=None) -> out

As `ring_attention` with one rank (operator.py), but that q has len(starts) chunks of equal length, one behind the other, of
which each begins where `starts` says in the sequence that k and v have whole. What a chunk does not see is not computed, and no
mask is larger than a tile (blocks.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from fxpar.ops.ring import costs
from fxpar.ops.ring.blocks import Merged, attend, attend_backward
from fxpar.ops.ring.kernels import accumulates_in
from fxpar.ops.ring.operator import as_results, register_gradient
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.ring.sight import Ids, Sight

_SETTINGS = ("Tensor? q_segments, Tensor? kv_segments, Tensor? kv_valid, int[] starts, bool causal, int? window, float? scale")
_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define(f"attention_of_chunks(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)")
_library.define(f"attention_of_chunks_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS}) "
                "-> (Tensor, Tensor, Tensor)")
FORWARD = torch.ops.fxpar.attention_of_chunks.default
BACKWARD = torch.ops.fxpar.attention_of_chunks_backward.default


def attention_of_chunks(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], *, causal: bool = False,
                        window: int | None = None, scale: float | None = None, q_segments: Tensor | None = None,
                        kv_segments: Tensor | None = None, kv_valid: Tensor | None = None) -> Tensor:
    """See the module's docstring."""
    out: Tensor = FORWARD(q, k, v, q_segments, kv_segments, kv_valid, list(starts), causal, window, scale)[0]
    return out


def _parts(q: Tensor, k: Tensor, ids: Ids, starts: Sequence[int], causal: bool, window: int | None
           ) -> Iterator[tuple[slice, slice, Sight]]:
    """Of each chunk its queries, the keys that it may see, and what it sees of them."""
    length = q.shape[2] // len(starts)
    for i, start in enumerate(starts):
        rows = slice(i * length, (i + 1) * length)
        keys, shift = slice(0, k.shape[2]), None
        if causal:
            keys = slice(max(0, start - window + 1) if window else 0, min(start + length, k.shape[2]))
            shift = start - keys.start
        yield rows, keys, Sight(shift, window, ids.of(rows, keys))


@torch.library.impl(_library, "attention_of_chunks", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, q_segments: Any, kv_segments: Any, kv_valid: Any, starts: list[int], causal: bool,
             window: int | None, scale: float | None) -> tuple[Tensor, Tensor]:
    merged = Merged(q, v)
    for rows, keys, sight in _parts(q, k, Ids(q_segments, kv_segments, kv_valid), starts, causal, window):
        merged.add(rows, *attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], sight, _scale(q, scale)))
    return as_results(q.dtype, merged.out)[0], merged.lse


@torch.library.impl(_library, "attention_of_chunks_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_segments: Any, kv_segments: Any,
              kv_valid: Any, starts: list[int], causal: bool, window: int | None, scale: float | None) -> tuple[Tensor, ...]:
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulates_in(x.dtype)) for x in (q, k, v))
    for rows, keys, sight in _parts(q, k, Ids(q_segments, kv_segments, kv_valid), starts, causal, window):
        attend_backward(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows], sight,
                        _scale(q, scale), (dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]))
    return tuple(as_results(q.dtype, dq, dk, dv))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


@torch.library.register_fake("fxpar::attention_of_chunks", lib=_library)
def _fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    b, h, length, _ = q.shape
    return _like(q, v.shape[3]), q.new_empty(b, h, length, dtype=accumulates_in(q.dtype))


@torch.library.register_fake("fxpar::attention_of_chunks_backward", lib=_library)
def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return tuple(_like(x, x.shape[3]) for x in (q, k, v))


def _like(x: Tensor, width: int) -> Tensor:
    b, h, length, _ = x.shape
    return x.new_empty(b, length, h, width).transpose(1, 2)


register_gradient("attention_of_chunks", BACKWARD, _library)


def flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], causal: bool, window: int | None) -> tuple[int, int]:
    """Forward and backward, as `costs.flops` counts them: of a rank that has as much to do as any other."""
    pairs = q[2] * (min(window, k[2]) if window else k[2]) // (2 if causal and not window else 1)
    scores, sums = (2 * q[0] * q[1] * pairs * width for width in (q[3], v[3]))
    return scores + sums, 3 * scores + 2 * sums


OPERATORS = (FORWARD, BACKWARD)


def workspace_bytes(q: Sequence[int], k: Sequence[int], v: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """As `costs.workspace_bytes`: what one rank takes to which nothing travels."""
    return costs.workspace_bytes(RingSchedule(1, q[2], k[2]), q, k, v, dtype)


def workspace_of(node: fx.Node) -> int:
    """The same of a node that calls one of `OPERATORS`, in a graph with ``meta["val"]``."""
    args: Any = node.args
    q, k, v = (n.meta["val"] for n in (args[1:4] if node.target is BACKWARD else args[:3]))
    return workspace_bytes(q.shape, k.shape, v.shape, q.dtype)[OPERATORS.index(node.target)]


@register_flop_formula(FORWARD.overloadpacket)
def _flops(q: Any, k: Any, v: Any, q_segments: Any, kv_segments: Any, kv_valid: Any, starts: Any, causal: bool,
           window: int | None, scale: Any, *, out_shape: Any = None, **_: Any) -> int:
    return flops(q, k, v, causal, window)[0]


@register_flop_formula(BACKWARD.overloadpacket)
def _flops_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, q_segments: Any, kv_segments: Any, kv_valid: Any,
                    starts: Any, causal: bool, window: int | None, scale: Any, *, out_shape: Any = None, **_: Any) -> int:
    return flops(q, k, v, causal, window)[1]
