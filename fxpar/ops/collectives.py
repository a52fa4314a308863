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
    to_experts     S(t) -> S(e)    all-to-all of rows           all-to-all back
    =============================  ===========================  ====================

These are plain functions on local tensors, and `typed` reads a node of a program that calls one. Which ranks they speak to
is decided by the `Runtime` that is active (`use_runtime`): process groups in a real run, all ranks in one process in a
simulated one. A *place* is ``(dim, outer)``: the dim seen as ``[outer, n, inner]``, of which the middle is what ranks split; it
may be dealt (see fxpar/sharding/deal.py), as what is whole is in its natural order. What depends on more than ranks, as the
exchange of rows with their experts does (fxpar/ops/exchange.py), performs itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, fx

from fxpar.ops.runtime import Runtime, active, axis_index
from fxpar.sharding.deal import deal, undeal
from fxpar.sharding.mesh import Axes, Mesh


class PlaceInDim(NamedTuple):
    """Where ranks' parts lie in a tensor. dealt: they are dealt, not neighbouring."""

    dim: int
    outer: int = 1
    dealt: bool = False


WHERE = PlaceInDim(0)
"""The place of a collective that has none."""


P = ParamSpec("P")


def _front(x: Tensor, place: PlaceInDim, ranks: int) -> Tensor:
    """Bring what ranks exchange to the front: all ranks' parts along dim 0, one after the other, contiguous.

    A dim in one piece is only moved there, so that whoever makes the tensor can write it in that order at once; a run inside a
    dim (``outer > 1``) is ``[..., outer, ranks, inner, ...] -> [ranks * outer * inner, ...]``.
    """
    x = _dealt(x, place, ranks)
    dim, outer, _ = place
    if outer == 1:
        return x.movedim(dim, 0).contiguous()
    shape = list(x.shape)
    y = x.reshape(*shape[:dim], outer, ranks, shape[dim] // (outer * ranks), *shape[dim + 1 :])
    y = y.movedim((dim + 1, dim, dim + 2), (0, 1, 2))
    return y.reshape(shape[dim], *y.shape[3:]).contiguous()


def _back(y: Tensor, place: PlaceInDim, ranks: int) -> Tensor:
    """The inverse of `_front`, of a tensor that now has the parts of `ranks` ranks along dim 0."""
    dim, outer, _ = place
    if outer == 1:
        return _undealt(y.movedim(0, dim), place, ranks)
    inner = y.shape[0] // (ranks * outer)
    y = y.reshape(ranks, outer, inner, *y.shape[1:]).movedim((0, 1, 2), (dim + 1, dim, dim + 2))
    return _undealt(y.reshape(*y.shape[:dim], outer * ranks * inner, *y.shape[dim + 3 :]), place, ranks)


def _dealt(x: Tensor, place: PlaceInDim, ranks: int) -> Tensor:
    """What is whole, in the order in which the ranks' parts follow one another."""
    return deal(x, place.dim, place.outer, ranks) if place.dealt else x


def _undealt(x: Tensor, place: PlaceInDim, ranks: int) -> Tensor:
    """The inverse of `_dealt`."""
    return undeal(x, place.dim, place.outer, ranks) if place.dealt else x


@dataclass(frozen=True)
class Direction:
    """One direction of a collective: prepare the local tensor, communicate, arrange the result.

    Kept apart so that a simulation can prepare all ranks, exchange, and then arrange all ranks.
    before(x, place, to, ranks, index), after(y, place, to, ranks); comm names a method of `Runtime`, None for no
    communication. op: of an all-reduce that is not a sum. grows: 1 where the result is `ranks` times as large as the operand,
    -1 where it is one of so many parts of it.
    """

    before: Callable[[Tensor, PlaceInDim, PlaceInDim, int, int], Tensor]
    comm: str | None
    after: Callable[[Tensor, PlaceInDim, PlaceInDim, int], Tensor]
    op: str | None = None
    grows: int = 0

    def flipped(self) -> Direction:
        """The same with `place` and `to` exchanged."""
        return Direction(lambda x, p, t, n, i: self.before(x, t, p, n, i), self.comm, lambda y, p, t, n: self.after(y, t, p, n))


def _slice(x: Tensor, place: PlaceInDim, to: PlaceInDim, ranks: int, index: int) -> Tensor:
    dim, outer, _ = place
    shape = list(x.shape)
    x = _dealt(x, place, ranks)
    y = x.reshape(*shape[:dim], outer, ranks, shape[dim] // (outer * ranks), *shape[dim + 1 :])
    return y.select(dim + 1, index).reshape(*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :])


SAME = Direction(lambda x, *_: x.view_as(x), None, lambda y, *_: y)
SUM = Direction(lambda x, *_: x.contiguous(), "all_reduce", lambda y, *_: y)
MAX = Direction(lambda x, *_: x.contiguous(), "all_reduce", lambda y, *_: y, op="max")
MEAN = Direction(lambda x, place, to, n, _: (x / n).contiguous(), "all_reduce", lambda y, *_: y)
GATHER = Direction(lambda x, place, *_: _front(x, place, 1), "all_gather", lambda y, place, _, n: _back(y, place, n), grows=1)
SLICE = Direction(_slice, None, lambda y, *_: y, grows=-1)
SCATTER = Direction(lambda x, place, to, n, _: _front(x, place, n), "reduce_scatter", lambda y, place, *_: _back(y, place, 1),
               grows=-1)
ROWS = Direction(lambda x, *_: x, "all_to_all", lambda y, *_: y)
EXCHANGE = Direction(lambda x, place, to, n, _: _parts(x, to, n), "all_to_all", lambda y, place, to, n: _joined(y, place))


def _parts(x: Tensor, place: PlaceInDim, ranks: int) -> Tensor:
    """``[ranks, ...]``: the part of each rank, with the other dims as they were."""
    dim, outer, _ = place
    shape = list(x.shape)
    x = _dealt(x, place, ranks)
    inner = shape[dim] // (outer * ranks)
    y = x.reshape(*shape[:dim], outer, ranks, inner, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return y.reshape(ranks, *shape[:dim], outer * inner, *shape[dim + 1 :]).contiguous()


def _joined(y: Tensor, place: PlaceInDim) -> Tensor:
    """The inverse of `_parts`."""
    dim, outer, _ = place
    ranks, shape = y.shape[0], list(y.shape[1:])
    x = y.reshape(ranks, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]).movedim(0, dim + 1)
    return _undealt(x.reshape(*shape[:dim], ranks * shape[dim], *shape[dim + 1 :]), place, ranks)


CONJUGATE: dict[str, tuple[Direction, Direction | None]] = {
    "psum": (SUM, SAME),
    "pmax": (MAX, None),
    "vary": (SAME, SUM),
    "average": (SAME, MEAN),
    "all_gather": (GATHER, SLICE),
    "all_gather_varying": (GATHER, SCATTER),
    "reduce_scatter": (SCATTER, GATHER),
    "shard": (SLICE, GATHER),
    "all_to_all": (EXCHANGE, EXCHANGE.flipped()),
}
"""kind -> (forward, backward), None where no gradient flows. The table of the module's docstring, and the only place that pairs
them."""
PERFORMED_ELSEWHERE = {"to_experts": (ROWS, ROWS), "to_tokens": (ROWS, ROWS)}
"""The same of those that perform themselves."""


def _directions(kind: str) -> tuple[Direction, Direction | None]:
    return CONJUGATE[kind] if kind in CONJUGATE else PERFORMED_ELSEWHERE[kind]


def run_direction(step: Direction, run: Runtime, x: Tensor, axes: Axes, place: PlaceInDim, to: PlaceInDim) -> Tensor:
    """One direction on this rank."""
    x = step.before(x, place, to, run.size(axes), run.index(axes))
    if step.comm is not None:
        x = _communicate(getattr(run, step.comm), x, axes, *([] if step.op is None else [step.op]))
    return step.after(x, place, to, run.size(axes))


def _communicate(method: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """``method(x, *args)`` of a `Runtime`, with booleans sent as bytes.

    Inductor's lowering of a collective promotes its operands among each other: a tensor of booleans beside the size of the
    group becomes one of int64, whose bytes whoever reads the result as booleans takes for eight values each.
    """
    return method(x.to(torch.uint8), *args).to(torch.bool) if x.dtype is torch.bool else method(x, *args)


@dataclass(frozen=True)
class Collective:
    """One collective as it stands in a program: what it does in both directions, and to what.

    kind: a key of `CONJUGATE`. value: its operand; of one that `typed` reads, the node. place: where the ranks' parts lie; to:
    where else, after an exchange. dtype, reduce, unsharded, unreduced: see `all_gather`.
    """

    kind: str
    value: Any
    axes: Axes
    place: PlaceInDim = WHERE
    to: PlaceInDim = WHERE
    dtype: torch.dtype | None = None
    reduce: torch.dtype | None = None
    unsharded: Any = None
    unreduced: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", PlaceInDim(*self.place))
        object.__setattr__(self, "to", PlaceInDim(*self.to))

    @property
    def forward(self) -> Direction:
        return _directions(self.kind)[0]

    @property
    def backward(self) -> Direction | None:
        """None where no gradient flows."""
        return _directions(self.kind)[1]

    @property
    def gathers(self) -> bool:
        """Whether its result is the full tensor that ranks hold parts of."""
        return self.forward is GATHER

    @property
    def sums(self) -> bool:
        """Whether its backward adds up (or averages) cotangents over ranks."""
        return self.backward in (SUM, MEAN, SCATTER)

    @property
    def varies(self) -> bool:
        """Whether each rank may use the result, which is the same on all of them, in its own way."""
        return self.backward in (SUM, SCATTER)

    @property
    def returns_alike(self) -> bool:
        """Whether what its backward returns to a value that ranks hold alike has been communicated, or was cut from what was."""
        return self.backward is not None and self.backward is not SAME

    @property
    def differs(self) -> bool:
        """Whether ranks do more than communicate, each something else: take its own slice, forward or backward."""
        return SLICE in (self.forward, self.backward)

    @property
    def label(self) -> str:
        """What a reader calls it: what its forward communicates, or else the operator's name."""
        return self.forward.comm or self.kind

    def ranks(self, mesh: Mesh) -> int:
        """How many it speaks to."""
        return mesh.size(*self.axes)

    def operand_bytes(self, result: int, mesh: Mesh) -> int:
        """Bytes of its operand, and so of what its backward returns, from those of its result."""
        ranks = self.ranks(mesh)
        return {1: result // ranks, 0: result, -1: result * ranks}[self.forward.grows]

    def backward_bytes(self, result: int, operand: torch.dtype, mesh: Mesh) -> int:
        """Bytes that its backward leaves on a rank, from those of its result: in the dtype in which cotangents are summed.
        operand: the dtype of its operand."""
        size = self.operand_bytes(result, mesh) // (self.dtype or operand).itemsize
        return size * (self.reduce or operand).itemsize

    @property
    def target(self) -> Callable[..., Tensor]:
        """The operator."""
        return _OPERATORS[self.kind.removesuffix(VARYING)]

    @property
    def args(self) -> tuple[Any, ...]:
        """The operator's arguments, by position; None is left out at the end."""
        named = [_ARGUMENTS[name](self) for name in _names_of(self.target)]
        while named[-1] is None:
            named.pop()
        return tuple(named)


@functools.cache
def _names_of(operator: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(operator).parameters)


VARYING = "_varying"
"""How the kind of a gather ends whose result each rank uses in its own way."""

_ARGUMENTS: dict[str, Callable[[Collective], Any]] = {
    "x": lambda c: c.value, "axes": lambda c: c.axes, "dim": lambda c: c.place.dim, "outer": lambda c: c.place.outer,
    "to_dim": lambda c: c.to.dim, "to_outer": lambda c: c.to.outer, "varying": lambda c: c.kind.endswith(VARYING),
    "dealt": lambda c: c.place.dealt or None, "to_dealt": lambda c: c.to.dealt or None,
    "dtype": lambda c: c.dtype, "reduce": lambda c: c.reduce,
    "unsharded": lambda c: c.unsharded, "unreduced": lambda c: c.unreduced,
}  # fmt: skip
"""Name of an operator's argument -> what it is of a collective."""
_OPERATORS: dict[str, Callable[..., Tensor]] = {}
_DESCRIBED: dict[Any, Callable[..., Collective]] = {}
"""Operator -> the function of the same arguments that says what it does."""


def typed(node: fx.Node) -> Collective | None:
    """What a node of a program communicates; None for a node that is no collective."""
    describe = _DESCRIBED.get(node.target)
    return None if describe is None else describe(*node.args, **node.kwargs)


def described_by(operator: Callable[..., Any], description: Callable[..., Collective]) -> None:
    """Have `typed` read calls of an operator that performs itself; `description` takes its arguments."""
    _DESCRIBED[operator] = description


def make(graph: fx.Graph, collective: Collective) -> fx.Node:
    """A node that `typed` reads as this."""
    return graph.call_function(collective.target, collective.args)


def differs_along(node: fx.Node) -> Axes | None:
    """The axes along which a node of a program does something else on each rank, forward or backward, than communicate."""
    if node.target is axis_index:
        axes: Any = node.args[0]
        return axes
    made = typed(node)
    return made.axes if made is not None and made.differs else None


def _perform(step: Direction | None, made: Collective, run: Runtime, x: Tensor) -> Tensor:
    """One direction of a collective on this rank."""
    assert step is not None, f"no gradient flows through {made.kind}"
    return run_direction(step, run, x, made.axes, made.place, made.to)


class _Transposed(torch.autograd.Function):
    """The backward of a collective, of which gradients are asked for in turn: they take its forward."""

    @staticmethod
    def forward(ctx, grad: Tensor, made: Collective, run: Runtime) -> Tensor:
        ctx.made, ctx.run = made, run
        return _perform(made.backward, made, run, grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _perform(ctx.made.forward, ctx.made, ctx.run, grad), None, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, unsharded: Tensor | None, unreduced: Tensor | None, made: Collective, run: Runtime) -> Tensor:
        ctx.made, ctx.run, ctx.dtype = made, run, x.dtype
        ctx.save_for_backward(unreduced)
        if unsharded is not None:
            return unsharded.view_as(unsharded)
        return _perform(made.forward, made, run, x.to(made.dtype or x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        made, (unreduced,) = ctx.made, ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        if unreduced is not None:
            grad = grad + unreduced
        grad = grad.to(made.reduce or ctx.dtype)
        if torch.is_grad_enabled():
            grad = _Transposed.apply(grad, made, ctx.run)
        else:
            grad = _perform(made.backward, made, ctx.run, grad)
        return grad.to(ctx.dtype), None, None, None, None


def _run(made: Collective) -> Tensor:
    """Do it on this rank."""
    x, run = made.value, active()
    if made.backward is None:
        return _perform(made.forward, made, run, x.detach())
    return _Apply.apply(x, made.unsharded, made.unreduced, replace(made, value=None, unsharded=None, unreduced=None), run)


def _operator(describe: Callable[P, Collective]) -> Callable[P, Tensor]:
    """The operator that does what `describe` says of its arguments."""

    @functools.wraps(describe)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return _run(describe(*args, **kwargs))

    run.__annotations__ = {**describe.__annotations__, "return": "Tensor"}
    _OPERATORS[describe.__name__], _DESCRIBED[run] = run, describe
    return run


@_operator
def psum(x: Tensor, axes: Axes) -> Collective:
    """Partial -> replicated: the sum over the ranks of `axes`."""
    return Collective("psum", x, axes)


@_operator
def pmax(x: Tensor, axes: Axes) -> Collective:
    """The maximum over the ranks of `axes`; for values no gradient flows through."""
    return Collective("pmax", x, axes)


@_operator
def vary(x: Tensor, axes: Axes, reduce: torch.dtype | None = None, unreduced: Tensor | None = None) -> Collective:
    """Replicated -> used differently on each rank of `axes`: the value itself; its cotangents are summed (in the dtype
    `reduce`), and those `unreduced` along with them."""
    return Collective("vary", x, axes, reduce=reduce, unreduced=unreduced)


@_operator
def average(x: Tensor, axes: Axes, unreduced: Tensor | None = None) -> Collective:
    """Replicated -> used alike on all ranks of `axes`: the value itself; its cotangents (and those `unreduced`), equal but for
    rounding, become the same."""
    return Collective("average", x, axes, unreduced=unreduced)


@_operator
def all_gather(x: Tensor, axes: Axes, dim: int, outer: int = 1, varying: bool = False, dtype: torch.dtype | None = None,
               reduce: torch.dtype | None = None, unsharded: Tensor | None = None, unreduced: Tensor | None = None,
               dealt: bool | None = None) -> Collective:
    """Sharded -> replicated along `dim`; `varying`: what follows differs from rank to rank.

    dtype: of the result, and of what is communicated. reduce: in which cotangents are summed; without it, that of `x`.
    unsharded: the result, where it is there already. unreduced: cotangents of the result, in the dtype of `x`, reduced with
    those that come.
    """
    kind = f"all_gather{VARYING}" if varying else "all_gather"
    place = PlaceInDim(dim, outer, bool(dealt))
    return Collective(kind, x, axes, place, dtype=dtype, reduce=reduce, unsharded=unsharded, unreduced=unreduced)


@_operator
def reduce_scatter(x: Tensor, axes: Axes, dim: int, outer: int = 1, dealt: bool | None = None) -> Collective:
    """Partial -> sharded along `dim`."""
    return Collective("reduce_scatter", x, axes, PlaceInDim(dim, outer, bool(dealt)))


@_operator
def shard(x: Tensor, axes: Axes, dim: int, outer: int = 1, dealt: bool | None = None) -> Collective:
    """Replicated -> sharded along `dim`: this rank's slice."""
    return Collective("shard", x, axes, PlaceInDim(dim, outer, bool(dealt)))


@_operator
def all_to_all(x: Tensor, axes: Axes, dim: int, outer: int, to_dim: int, to_outer: int, dealt: bool | None = None,
               to_dealt: bool | None = None) -> Collective:
    """Sharded along one place -> sharded along another."""
    return Collective("all_to_all", x, axes, PlaceInDim(dim, outer, bool(dealt)), PlaceInDim(to_dim, to_outer, bool(to_dealt)))
