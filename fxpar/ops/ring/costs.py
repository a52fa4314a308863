"""costs: what ring attention takes on one rank: floating-point operations, bytes that it sends, bytes that it works in.

From shapes alone; of a rank that has most to do, where ranks differ.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import register_flop_formula

from fxpar.ops.ring.kernels import accumulates_in
from fxpar.ops.ring.operator import BACKWARD, FORWARD
from fxpar.ops.ring.packets import PacketLayout
from fxpar.ops.ring.schedule import RingSchedule

Shape = Sequence[int]


def pairs_seen(schedule: RingSchedule) -> int:
    """The pairs of a query and a key that it sees, on the rank that has most. (What segments and padding hide counts, because it
    is computed.)"""
    if not schedule.causal:
        return schedule.queries * schedule.keys * schedule.ranks
    return max(sum(_seen(schedule.length, chunk * schedule.length, schedule.window) for chunk in schedule.chunks_of(rank))
               for rank in range(schedule.ranks))


def _seen(length: int, before: int, window: int | None) -> int:
    """Of `length` positions in a row, each of which sees itself and all `before` it, but no more than a window."""
    growing = length if window is None else min(length, max(0, window - before))
    return growing * before + growing * (growing + 1) // 2 + (length - growing) * (window or 0)


def flops(schedule: RingSchedule, q: Shape, v: Shape) -> tuple[int, int]:
    """Floating-point operations (a multiply-add counts two), forward and backward: scores and the sum of values, and in the
    backward pass the scores again and two products for each of these two."""
    scores, sums = (2 * q[0] * q[1] * pairs_seen(schedule) * width for width in (q[3], v[3]))
    return scores + sums, 3 * scores + 2 * sums


def traffic_bytes(schedule: RingSchedule, k: Shape, v: Shape, dtype: torch.dtype, ids: Sequence[tuple[Shape, torch.dtype]] = ()
                  ) -> tuple[int, int]:
    """Bytes that a rank sends, forward and backward. k, v: shapes of its parts; ids: of what travels with them (segments and
    validity of keys), with their dtypes."""
    shapes, dtypes = (tuple(k), tuple(v), *(tuple(s) for s, _ in ids)), (dtype, dtype, *(d for _, d in ids))
    keys = PacketLayout(shapes, (2, 2, *[1] * len(ids)), dtypes)
    gradients = _gradients(k, v, dtype)
    if schedule.halo:
        there = [sum(keys.bytes(p.length) for to in schedule.sent(r) for p in to) for r in range(schedule.ranks)]
        back = [sum(gradients.bytes(p.length) for p in schedule.received(r)) for r in range(schedule.ranks)]
        return max(there), max(map(operator.add, there, back))
    rounds = schedule.ranks - 1
    passed_on = rounds * keys.bytes(schedule.keys)
    return passed_on, passed_on + (schedule.ranks * gradients.bytes(schedule.keys) if rounds else 0)


def traffic_of(node: fx.Node, ranks: int, values: Mapping[fx.Node, Any]) -> tuple[int, int]:
    """`traffic_bytes` of a node of a program that calls `ring_attention`. ranks: of the ring. values: of its operands, with a
    shape and a dtype."""
    operands: Any = node.args[:3]
    given: Any = node.kwargs
    q, k, v = (values[n] for n in operands)
    ids = [(values[n].shape, values[n].dtype) for name in ("kv_segments", "kv_valid") if (n := given.get(name)) is not None]
    order = _schedule(q.shape, k.shape, ranks, bool(given.get("causal")), bool(given.get("zigzag")), given.get("window"))
    return traffic_bytes(order, k.shape, v.shape, k.dtype, ids)


def workspace_bytes(schedule: RingSchedule, q: Shape, k: Shape, v: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the operator has at once beside its operands and results, forward and backward, at most; with what
    FlashAttention has of its own, and without masks."""
    wide, heads = accumulates_in(dtype), q[1]
    of_q, of_out, of_lse, of_kv = math.prod(q), math.prod((*q[:3], v[3])), math.prod(q[:3]), math.prod(k) + math.prod(v)
    keys, gradients = PacketLayout((tuple(k), tuple(v)), (2, 2), (dtype, dtype)), _gradients(k, v, dtype)
    if schedule.halo:
        most = max(sum(p.length for p in schedule.pieces(rank)) for rank in range(schedule.ranks))
        held = 2 * keys.bytes(most)  # as it came, and put together
        sums = gradients.bytes(schedule.keys) + 3 * gradients.bytes(most)
    else:
        held = 2 * keys.bytes(schedule.keys) if schedule.ranks > 1 else 0  # at hand, and on its way
        sums = (3 if schedule.ranks > 1 else 1) * gradients.bytes(schedule.keys)
    forward = (of_out + 2 * of_lse) * wide.itemsize + of_out * dtype.itemsize
    expanded = of_kv // k[1] * heads if heads != k[1] else 0
    of_kernel = of_q * (wide.itemsize + dtype.itemsize) + (expanded + of_kv) * dtype.itemsize
    return forward + held, of_q * wide.itemsize + 2 * of_lse * wide.itemsize + held + sums + of_kernel


OPERATORS = (FORWARD, BACKWARD)


def workspace_of(node: fx.Node) -> int:
    """`workspace_bytes` of a node that calls one of `OPERATORS`, in a graph with ``meta["val"]``."""
    args: Any = node.args
    tensors: Any = args[1:4] if node.target is BACKWARD else args[:3]
    q, k, v = (n.meta["val"] for n in tensors)
    _, ranks, causal, zigzag, window, _ = args[-6:]
    found = workspace_bytes(_schedule(q.shape, k.shape, ranks, causal, zigzag, window), q.shape, k.shape, v.shape, q.dtype)
    return found[OPERATORS.index(node.target)]


def _gradients(k: Shape, v: Shape, dtype: torch.dtype) -> PacketLayout:
    wide = accumulates_in(dtype)
    return PacketLayout((tuple(k), tuple(v)), (2, 2), (wide, wide))


def _schedule(q: Shape, k: Shape, ranks: int, causal: bool, zigzag: bool, window: int | None) -> RingSchedule:
    return RingSchedule(ranks, q[2], k[2], causal, zigzag, window)


@register_flop_formula(FORWARD.overloadpacket)
def _forward(q: Shape, k: Shape, v: Shape, q_segments: Any, kv_segments: Any, kv_valid: Any, group: str, ranks: int, causal: bool,
             zigzag: bool, window: int | None, scale: float | None, *, out_shape: Any = None, **_: Any) -> int:
    return flops(_schedule(q, k, ranks, causal, zigzag, window), q, v)[0]


@register_flop_formula(BACKWARD.overloadpacket)
def _backward(grad: Shape, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, q_segments: Any, kv_segments: Any,
              kv_valid: Any, group: str, ranks: int, causal: bool, zigzag: bool, window: int | None, scale: float | None, *,
              out_shape: Any = None, **_: Any) -> int:
    return flops(_schedule(q, k, ranks, causal, zigzag, window), q, v)[1]
