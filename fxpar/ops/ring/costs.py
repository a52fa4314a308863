"""costs: what ring attention takes on one rank: floating-point operations, bytes that it sends, bytes that it works in.

From shapes alone; of a rank that has most to do, where ranks differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import register_flop_formula

from fxpar.ops.ring.kernels import accumulates_in
from fxpar.ops.ring.operator import BACKWARD, FORWARD
from fxpar.ops.ring.packets import Layout
from fxpar.ops.ring.schedule import Schedule

Shape = Sequence[int]


def pairs_seen(schedule: Schedule) -> int:
    """The pairs of a query and a key that a rank computes a score of. (Half of a block under the diagonal counts; what segments
    and padding hide counts, because it is computed.)"""
    if schedule.window is not None:
        chunk = max(schedule.held(schedule.ranks - 1))
        return schedule.chunks * _seen(schedule.length, min(schedule.window - 1, chunk * schedule.length), schedule.window)
    if not schedule.causal:
        return schedule.queries * schedule.keys * schedule.ranks
    chunks = schedule.held(schedule.ranks - 1)
    return sum(_seen(schedule.length, c * schedule.length, None) for c in chunks)


def _seen(length: int, before: int, window: int | None) -> int:
    """Keys that `length` queries see, of as many of their own and `before` before them."""
    own = length * (length + 1) // 2
    if window is None:
        return length * before + own
    return sum(min(before + i + 1, window) for i in range(min(length, window))) + max(0, length - window) * window


def flops(schedule: Schedule, q: Shape, v: Shape) -> tuple[int, int]:
    """Floating-point operations (a multiply-add counts two), forward and backward: scores and the sum of values, and in the
    backward pass the scores again and two products for each of these two."""
    scores, sums = (2 * q[0] * q[1] * pairs_seen(schedule) * width for width in (q[3], v[3]))
    return scores + sums, 3 * scores + 2 * sums


def traffic_bytes(schedule: Schedule, k: Shape, v: Shape, dtype: torch.dtype, ids: Sequence[tuple[Shape, torch.dtype]] = ()
                  ) -> tuple[int, int]:
    """Bytes that a rank sends, forward and backward. k, v: shapes of its parts; ids: of what travels with them (segments and
    validity of keys), with their dtypes."""
    shapes, dtypes = (tuple(k), tuple(v), *(tuple(s) for s, _ in ids)), (dtype, dtype, *(d for _, d in ids))
    keys = Layout(shapes, (2, 2, *[1] * len(ids)), dtypes)
    gradients = _gradients(k, v, dtype)
    if schedule.halo:
        there, back = (max(sum(layout.bytes(p.length) for p in side) for side in sides) for layout, sides in (
            (keys, [[p for to in schedule.sent(r) for p in to] for r in range(schedule.ranks)]),
            (gradients, [schedule.received(r) for r in range(schedule.ranks)])))
        return there, there + back
    rounds = schedule.ranks - 1
    there = rounds * keys.bytes(schedule.keys)
    return there, there + (schedule.ranks * gradients.bytes(schedule.keys) if rounds else 0)


def workspace_bytes(schedule: Schedule, q: Shape, k: Shape, v: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the operator has at once beside its operands and results, forward and backward, at most, but for what a kernel
    has of its own and masks."""
    wide = accumulates_in(dtype)
    out = (*q[:3], v[3])
    rows = math.prod(q[:3]) * wide.itemsize
    if schedule.halo:
        held = sum(p.length for p in schedule.pieces(schedule.ranks // 2))
        block = Layout((tuple(k), tuple(v)), (2, 2), (dtype, dtype)).bytes(held) * 2  # as it came, and put together
        sums = _gradients(k, v, dtype)
        travelling = sums.bytes(schedule.keys) + 3 * sums.bytes(held)
    else:
        blocks = 0 if schedule.ranks == 1 else 2  # at hand, and on its way
        block = blocks * Layout((tuple(k), tuple(v)), (2, 2), (dtype, dtype)).bytes(schedule.keys)
        travelling = (1 + blocks) * _gradients(k, v, dtype).bytes(schedule.keys)
    of_kernel = math.prod(out) * dtype.itemsize
    forward = math.prod(out) * wide.itemsize + rows + block + of_kernel + rows
    grads = math.prod(q) * (wide.itemsize + dtype.itemsize) + sum(math.prod(x) for x in (k, v)) * dtype.itemsize
    return forward, grads + rows + block + travelling


def workspace_of(node: fx.Node) -> int:
    """The same, of a node that calls one of the two operators."""
    args: Any = node.args
    backward = node.target is BACKWARD
    q, k, v = (n.meta["val"] for n in (args[1:4] if backward else args[:3]))
    ranks, causal, zigzag, window = args[-5:-1]
    schedule = Schedule(ranks, q.shape[2], k.shape[2], causal, zigzag, window)
    return workspace_bytes(schedule, q.shape, k.shape, v.shape, q.dtype)[backward]


def _gradients(k: Shape, v: Shape, dtype: torch.dtype) -> Layout:
    wide = accumulates_in(dtype)
    return Layout((tuple(k), tuple(v)), (2, 2), (wide, wide))


def _schedule(q: Shape, k: Shape, ranks: int, causal: bool, zigzag: bool, window: int | None) -> Schedule:
    return Schedule(ranks, q[2], k[2], causal, zigzag, window)


@register_flop_formula(FORWARD.overloadpacket)
def _forward(q: Shape, k: Shape, v: Shape, q_segments: Any, kv_segments: Any, kv_valid: Any, group: str, ranks: int, causal: bool,
             zigzag: bool, window: int | None, scale: float | None, *, out_shape: Any = None, **_: Any) -> int:
    return flops(_schedule(q, k, ranks, causal, zigzag, window), q, v)[0]


@register_flop_formula(BACKWARD.overloadpacket)
def _backward(grad: Shape, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, q_segments: Any, kv_segments: Any,
              kv_valid: Any, group: str, ranks: int, causal: bool, zigzag: bool, window: int | None, scale: float | None, *,
              out_shape: Any = None, **_: Any) -> int:
    return flops(_schedule(q, k, ranks, causal, zigzag, window), q, v)[1]
