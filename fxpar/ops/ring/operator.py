"""`ring_attention`: attention whose queries, keys and values are split over ranks along the sequence, as one operator.

    ring_attention(q, k, v, axes, *, causal=False, zigzag=False, window=None, scale=None,
                   q_segments=None, kv_segments=None, kv_valid=None) -> out

Takes this rank's parts: q [b, h, lq, d], k [b, kv, lk, d], v [b, kv, lk, e]; kv divides h, and k and v are never repeated.

- axes: of the mesh, over whose ranks the sequence is split. Rank r has part r of n, in order; under `zigzag` the chunks r and
  2n - 1 - r of 2n, one behind the other (without `causal` no order matters, and zigzag changes nothing).
- causal: a query sees the keys up to its own position; as many queries as keys. window: and of these the last `window`.
- scale: of the scores; None is 1 / sqrt(d).
- q_segments [b or 1, lq], kv_segments [b or 1, lk], integers, both or none: a query sees the keys of its segment (packed
  documents).
- kv_valid [b or 1, lk], booleans: keys that are not valid nobody sees (padding).

Returns this rank's part of out [b, h, lq, e], whose heads lie inside of positions in memory ([b, lq, h, e] is contiguous), in the
dtype of q; 0 for a query that sees no key. Every rank has the same shapes. Differentiable once, to q, k and v.
Raises: ValueError for operands that do not agree.

Compilers see two opaque operators, which are the same on every rank: who is neighbour to whom is read where they run.

    fxpar::ring_attention(q, k, v, q_segments?, kv_segments?, kv_valid?, group, ranks, causal, zigzag, window?, scale?)
        -> (out, lse [b, h, lq])
    fxpar::ring_attention_backward(grad, q, k, v, out, lse, q_segments?, ... as above) -> (dq, dk, dv)

Unrolled into collectives, the backward's transfers would be taken for the forward's, and every rank would keep all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.ops.ring.algorithm import Rank, backward, forward
from fxpar.ops.ring.drive import Asking, lock_step, over_group
from fxpar.ops.ring.kernels import accumulates_in
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.ring.sight import Ids
from fxpar.ops.runtime import LONE, group_of
from fxpar.sharding.mesh import Axes

T = TypeVar("T")
_NO_IDS = Ids()
_SETTINGS = ("Tensor? q_segments, Tensor? kv_segments, Tensor? kv_valid, str group, int ranks, bool causal, bool zigzag, "
             "int? window, float? scale")
_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define(f"ring_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)")
_library.define(f"ring_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS}) "
                "-> (Tensor, Tensor, Tensor)")
FORWARD = torch.ops.fxpar.ring_attention.default
BACKWARD = torch.ops.fxpar.ring_attention_backward.default


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axes: Axes, *, causal: bool = False, zigzag: bool = False,
                   window: int | None = None, scale: float | None = None, q_segments: Tensor | None = None,
                   kv_segments: Tensor | None = None, kv_valid: Tensor | None = None) -> Tensor:
    """See the module's docstring."""
    group, ranks = group_of(axes)
    out: Tensor = FORWARD(q, k, v, q_segments, kv_segments, kv_valid, group, ranks, causal, zigzag, window, scale)[0]
    return out


def axes_of(node: fx.Node) -> Axes | None:
    """The axes of a node of a program that calls `ring_attention`; None of another node."""
    if node.target is not ring_attention:
        return None
    axes: Any = node.args[3] if len(node.args) > 3 else node.kwargs["axes"]
    return axes


def rank_of(rank: int, ranks: int, q: Tensor, k: Tensor, v: Tensor, ids: Ids = _NO_IDS, causal: bool = False,
            zigzag: bool = False, window: int | None = None, scale: float | None = None) -> Rank:
    """What the algorithm is told of a rank. Raises: ValueError for operands that do not agree."""
    def refuse(why: str) -> None:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v, ids.q, ids.k, ids.valid) if t is not None)
        raise ValueError(f"ring attention of operands {shapes}: {why}")

    if not (q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0]
            and q.shape[3] == k.shape[3] and k.shape[1] and q.shape[1] % k.shape[1] == 0 and q.dtype == k.dtype == v.dtype
            and q.is_floating_point()):
        refuse("q [b, h, lq, d], k [b, kv, lk, d], v [b, kv, lk, e] are to have one dtype, and kv is to divide h")
    if (ids.q is None) != (ids.k is None):
        refuse("segments are to be given of queries and of keys")
    for name, t, length in (("q_segments", ids.q, q.shape[2]), ("kv_segments", ids.k, k.shape[2]),
                            ("kv_valid", ids.valid, k.shape[2])):
        if t is None:
            continue
        if t.dim() != 2 or t.shape[0] not in (1, q.shape[0]) or t.shape[1] != length:
            refuse(f"{name} is to be [{q.shape[0]} or 1, {length}]")
        if (t.dtype == torch.bool) != (name == "kv_valid") or t.is_floating_point():
            refuse(f"{name} is to be of {'booleans' if name == 'kv_valid' else 'integers'}")
    schedule = RingSchedule(ranks, q.shape[2], k.shape[2], causal, zigzag, window)
    return Rank(rank, schedule, q, k, v, ids, q.shape[3] ** -0.5 if scale is None else scale)


def _run(make: Callable[[Rank], Asking[T]], q: Tensor, k: Tensor, v: Tensor, q_segments: Tensor | None,
         kv_segments: Tensor | None, kv_valid: Tensor | None, group: str, ranks: int, *settings: Any) -> T:
    """What the generator that is made for this process or thread, a rank of a group, returns."""
    ids = Ids(q_segments, kv_segments, kv_valid)
    if group == LONE:
        return lock_step([make(rank_of(i, ranks, q, k, v, ids, *settings)) for i in range(ranks)])[0]
    found = compat.collective_group(group)
    if found.size() != ranks:
        raise ValueError(f"ring attention over {ranks} ranks in a group of {found.size()}")
    return over_group(make(rank_of(found.rank(), ranks, q, k, v, ids, *settings)), found)


def as_results(dtype: torch.dtype, *wide: Tensor) -> list[Tensor]:
    """Results as the operators return them: of this dtype, heads inside of positions."""
    return [_empty(x, x.shape, dtype).copy_(x) for x in wide]


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    batch, heads, length, dim = shape
    return like.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


@torch.library.impl(_library, "ring_attention", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    out, lse = _run(forward, q, k, v, *settings)
    return as_results(q.dtype, out)[0], lse


@torch.library.impl(_library, "ring_attention_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    grads = _run(lambda rank: backward(rank, grad, out, lse), q, k, v, *settings)
    return tuple(as_results(q.dtype, *grads))


@torch.library.register_fake("fxpar::ring_attention", lib=_library)
def _fake(q: Tensor, k: Tensor, v: Tensor, q_segments: Any, kv_segments: Any, kv_valid: Any, group: str, ranks: int,
          *settings: Any) -> tuple[Tensor, Tensor]:
    rank_of(0, ranks, q, k, v, Ids(q_segments, kv_segments, kv_valid), *settings)
    b, h, length, _ = q.shape
    return _empty(q, (b, h, length, v.shape[3])), q.new_empty(b, h, length, dtype=accumulates_in(q.dtype))


@torch.library.register_fake("fxpar::ring_attention_backward", lib=_library)
def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(x, x.shape) for x in (q, k, v))


def register_gradient(name: str, backward: Any, library: torch.library.Library) -> None:
    """Have the operator `name`, of q, k, v, three tensors of ids and settings, be differentiated by `backward`, which takes the
    gradient, q, k, v, both results, ids and settings. A gradient of a gradient is a NotImplementedError."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.settings = inputs[6:]

    def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, q_segments, kv_segments, kv_valid, out, lse = ctx.saved_tensors
        grads = backward(grad, q, k, v, out, lse, q_segments, kv_segments, kv_valid, *ctx.settings)
        return (*grads, *[None] * (3 + len(ctx.settings)))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        what = name.replace("_", " ")
        raise NotImplementedError(f"gradients of gradients of {what}, which PyTorch's fused kernels do not have either")

    torch.library.register_autograd(f"fxpar::{name}", differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(f"fxpar::{name}_backward", refuse, lib=library)


register_gradient("ring_attention", BACKWARD, _library)
