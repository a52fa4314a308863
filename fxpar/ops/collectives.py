"""The typed collectives that the partitioner inserts: each a forward and the backward that is its conjugate.

Along a mesh axis a value is sharded (S), replicated (R), or partial (P, a pending sum); its cotangent is sharded
where it is sharded, and replicated where it is replicated or partial. ``vary`` is JAX's ``pvary``: from here on a
replicated value is used differently on every rank, so its cotangents have to be summed.

    =============================  ===========================  ====================
    collective                     forward                      backward
    =============================  ===========================  ====================
    psum           P -> R          all-reduce                   identity
    vary           R -> used in S  identity                     all-reduce
    average        R -> used in R  identity                     all-reduce, mean
    all_gather     S -> R          all-gather                   take my slice
      varying      S -> used in S  all-gather                   reduce-scatter
    reduce_scatter P -> S          reduce-scatter               all-gather
    shard          R -> S          take my slice                all-gather
    all_to_all     S(a) -> S(b)    all-to-all                   all-to-all back
    =============================  ===========================  ====================

These are plain functions on local tensors. Which ranks they speak to is decided by the `Runtime` that is active
(`use_runtime`): process groups in a real run, all ranks in one process in a simulated one. A *place* is
``(dim, outer)``: the dim seen as ``[outer, n, inner]``, of which the middle is what ranks split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxpar.mesh import Axes

Place = tuple[int, int]


class Runtime(Protocol):
    """What the collectives need from whoever runs them; all tensors are this rank's."""

    def size(self, axes: Axes) -> int: ...
    def index(self, axes: Axes) -> int: ...
    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor: ...
    def all_gather(self, x: Tensor, axes: Axes) -> Tensor: ...
    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor: ...
    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor: ...


_active: ContextVar[Runtime] = ContextVar("fxpar_runtime")


@contextlib.contextmanager
def use_runtime(runtime: Runtime) -> Iterator[None]:
    """The collectives called (or traced) inside speak to the ranks of `runtime`."""
    token = _active.set(runtime)
    try:
        yield
    finally:
        _active.reset(token)


def _front(x: Tensor, place: Place, ranks: int) -> Tensor:
    """Bring what ranks exchange to the front: all ranks' parts along dim 0, one after the other, contiguous.

    A whole dim is only moved there, so that whoever makes the tensor can write it in that order at once; a run inside a
    dim (``outer > 1``) is ``[..., outer, ranks, inner, ...] -> [ranks * outer * inner, ...]``.
    """
    dim, outer = place
    if outer == 1:
        return x.movedim(dim, 0).contiguous()
    shape = list(x.shape)
    y = x.reshape(*shape[:dim], outer, ranks, shape[dim] // (outer * ranks), *shape[dim + 1 :])
    y = y.movedim((dim + 1, dim, dim + 2), (0, 1, 2))
    return y.reshape(shape[dim], *y.shape[3:]).contiguous()


def _back(y: Tensor, place: Place, ranks: int) -> Tensor:
    """The inverse of `_front`, of a tensor that now has the parts of `ranks` ranks along dim 0."""
    dim, outer = place
    if outer == 1:
        return y.movedim(0, dim)
    inner = y.shape[0] // (ranks * outer)
    y = y.reshape(ranks, outer, inner, *y.shape[1:]).movedim((0, 1, 2), (dim + 1, dim, dim + 2))
    return y.reshape(*y.shape[:dim], outer * ranks * inner, *y.shape[dim + 3 :])


@dataclass(frozen=True)
class Step:
    """One direction of a collective: prepare the local tensor, communicate, arrange the result.

    Kept apart so that a simulation can prepare all ranks, exchange, and then arrange all ranks.
    before(x, place, to, ranks, index), after(y, place, to, ranks); comm names a method of `Runtime`, None for no
    communication.
    """

    before: Callable[[Tensor, Place, Place, int, int], Tensor]
    comm: str | None
    after: Callable[[Tensor, Place, Place, int], Tensor]

    def flipped(self) -> Step:
        """The same with `place` and `to` exchanged."""
        return Step(lambda x, p, t, n, i: self.before(x, t, p, n, i), self.comm, lambda y, p, t, n: self.after(y, t, p, n))


def _slice(x: Tensor, place: Place, to: Place, ranks: int, index: int) -> Tensor:
    dim, outer = place
    shape = list(x.shape)
    y = x.reshape(*shape[:dim], outer, ranks, shape[dim] // (outer * ranks), *shape[dim + 1 :])
    return y.select(dim + 1, index).reshape(*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :])


SAME = Step(lambda x, *_: x.view_as(x), None, lambda y, *_: y)
SUM = Step(lambda x, *_: x.contiguous(), "all_reduce", lambda y, *_: y)
MEAN = Step(lambda x, place, to, n, _: (x / n).contiguous(), "all_reduce", lambda y, *_: y)
GATHER = Step(lambda x, place, *_: _front(x, place, 1), "all_gather", lambda y, place, _, n: _back(y, place, n))
SLICE = Step(_slice, None, lambda y, *_: y)
SCATTER = Step(lambda x, place, to, n, _: _front(x, place, n), "reduce_scatter", lambda y, place, *_: _back(y, place, 1))
EXCHANGE = Step(lambda x, place, to, n, _: _parts(x, to, n), "all_to_all", lambda y, place, to, n: _joined(y, place))


def _parts(x: Tensor, place: Place, ranks: int) -> Tensor:
    """``[ranks, ...]``: the part of each rank, with the other dims as they were."""
    dim, outer = place
    shape = list(x.shape)
    inner = shape[dim] // (outer * ranks)
    y = x.reshape(*shape[:dim], outer, ranks, inner, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return y.reshape(ranks, *shape[:dim], outer * inner, *shape[dim + 1 :]).contiguous()


def _joined(y: Tensor, place: Place) -> Tensor:
    """The inverse of `_parts`."""
    dim, outer = place
    ranks, shape = y.shape[0], list(y.shape[1:])
    x = y.reshape(ranks, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]).movedim(0, dim + 1)
    return x.reshape(*shape[:dim], ranks * shape[dim], *shape[dim + 1 :])


CONJUGATE = {
    "psum": (SUM, SAME),
    "vary": (SAME, SUM),
    "average": (SAME, MEAN),
    "all_gather": (GATHER, SLICE),
    "all_gather_varying": (GATHER, SCATTER),
    "reduce_scatter": (SCATTER, GATHER),
    "shard": (SLICE, GATHER),
    "all_to_all": (EXCHANGE, EXCHANGE.flipped()),
}
"""name -> (forward, backward). The table of the module's docstring, and the only place that pairs them."""


def differs_along(node: fx.Node) -> Axes | None:
    """The axes along which a node of a program does something else on each rank, forward or backward, than communicate."""
    args: Any = node.args
    if node.target is axis_index:
        return args[0]
    kind = getattr(node.target, "__name__", "") if node.target in COLLECTIVES else ""
    if kind == "all_gather" and args[4:5] and args[4]:
        kind = "all_gather_varying"
    return args[1] if SLICE in CONJUGATE.get(kind, ()) else None


def run_step(step: Step, run: Runtime, x: Tensor, axes: Axes, place: Place, to: Place) -> Tensor:
    """One direction on this rank."""
    x = step.before(x, place, to, run.size(axes), run.index(axes))
    if step.comm is not None:
        x = _communicate(getattr(run, step.comm), x, axes)
    return step.after(x, place, to, run.size(axes))


def _communicate(method: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """``method(x, *args)`` of a `Runtime`, with booleans sent as bytes.

    Inductor's lowering of a collective promotes its operands among each other: a tensor of booleans beside the size of the
    group becomes one of int64, whose bytes whoever reads the result as booleans takes for eight values each.
    """
    return method(x.to(torch.uint8), *args).to(torch.bool) if x.dtype is torch.bool else method(x, *args)


@dataclass(frozen=True)
class Typed:
    """One collective as it stands in a program: what it does in both directions.

    dtype: what the forward communicates and returns, else that of the operand. reduce: what the backward communicates, else
    that of the operand, too; it always returns the operand's.
    """

    kind: str
    axes: Axes
    place: Place = (0, 1)
    to: Place = (0, 1)
    dtype: torch.dtype | None = None
    reduce: torch.dtype | None = None


class _Transposed(torch.autograd.Function):
    """The backward of a collective, of which gradients are asked for in turn: they take its forward."""

    @staticmethod
    def forward(ctx, grad: Tensor, typed: Typed, run: Runtime) -> Tensor:
        ctx.typed, ctx.run = typed, run
        return run_step(CONJUGATE[typed.kind][1], run, grad, typed.axes, typed.place, typed.to)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        typed = ctx.typed
        return run_step(CONJUGATE[typed.kind][0], ctx.run, grad, typed.axes, typed.place, typed.to), None, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor | None, carried: Tensor | None, typed: Typed, run: Runtime) -> Tensor:
        ctx.typed, ctx.run, ctx.dtype = typed, run, x.dtype
        ctx.save_for_backward(carried)
        if kept is not None:
            return kept.view_as(kept)
        return run_step(CONJUGATE[typed.kind][0], run, x.to(typed.dtype or x.dtype), typed.axes, typed.place, typed.to)

    @staticmethod
    def backward(ctx, grad: Tensor):
        typed, (carried,) = ctx.typed, ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        if carried is not None:
            grad = grad + carried
        grad = grad.to(typed.reduce or ctx.dtype)
        if torch.is_grad_enabled():
            grad = _Transposed.apply(grad, typed, ctx.run)
        else:
            grad = run_step(CONJUGATE[typed.kind][1], ctx.run, grad, typed.axes, typed.place, typed.to)
        return grad.to(ctx.dtype), None, None, None, None


def _apply(x: Tensor, typed: Typed, kept: Tensor | None = None, carried: Tensor | None = None) -> Tensor:
    return _Apply.apply(x, kept, carried, typed, _active.get())


def psum(x: Tensor, axes: Axes) -> Tensor:
    """Partial -> replicated: the sum over the ranks of `axes`."""
    return _apply(x, Typed("psum", axes))


def pmax(x: Tensor, axes: Axes) -> Tensor:
    """The maximum over the ranks of `axes`; for values no gradient flows through."""
    return _communicate(_active.get().all_reduce, x.detach().contiguous(), axes, "max")


def vary(x: Tensor, axes: Axes, reduce: torch.dtype | None = None, carried: Tensor | None = None) -> Tensor:
    """Replicated -> used differently on each rank of `axes`: the value itself; its cotangents are summed (in the dtype
    `reduce`), and those `carried` along with them."""
    return _apply(x, Typed("vary", axes, reduce=reduce), carried=carried)


def average(x: Tensor, axes: Axes, carried: Tensor | None = None) -> Tensor:
    """Replicated -> used alike on all ranks of `axes`: the value itself; its cotangents (and those `carried`), equal but for
    rounding, become the same."""
    return _apply(x, Typed("average", axes), carried=carried)


def all_gather(x: Tensor, axes: Axes, dim: int, outer: int = 1, varying: bool = False, dtype: torch.dtype | None = None,
               reduce: torch.dtype | None = None, kept: Tensor | None = None, carried: Tensor | None = None) -> Tensor:
    """Sharded -> replicated along `dim`; `varying`: what follows differs from rank to rank.

    dtype: of the result, and of what is communicated. reduce: in which cotangents are summed; without it, that of `x`.
    kept: the result, where it is there already. carried: cotangents of the result, in the dtype of `x`, that are reduced with
    those that come.
    """
    kind = "all_gather_varying" if varying else "all_gather"
    return _apply(x, Typed(kind, axes, (dim, outer), dtype=dtype, reduce=reduce), kept, carried)


def reduce_scatter(x: Tensor, axes: Axes, dim: int, outer: int = 1) -> Tensor:
    """Partial -> sharded along `dim`."""
    return _apply(x, Typed("reduce_scatter", axes, (dim, outer)))


def shard(x: Tensor, axes: Axes, dim: int, outer: int = 1) -> Tensor:
    """Replicated -> sharded along `dim`: this rank's slice."""
    return _apply(x, Typed("shard", axes, (dim, outer)))


def all_to_all(x: Tensor, axes: Axes, dim: int, outer: int, to_dim: int, to_outer: int) -> Tensor:
    """Sharded along one place -> sharded along another."""
    return _apply(x, Typed("all_to_all", axes, (dim, outer), (to_dim, to_outer)))


def axis_index(axes: Axes) -> int:
    """This rank's index along `axes`."""
    return _active.get().index(axes)


COLLECTIVES = (psum, pmax, vary, average, all_gather, reduce_scatter, shard, all_to_all)
