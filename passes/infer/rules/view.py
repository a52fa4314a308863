"""Rules of operators that rearrange dims: view, transpose, expand, ..."""

from __future__ import annotations

import torch

from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Spec, unknown
from fxpar.sharding.factors import Dim, Dims, Factor, extent

aten = torch.ops.aten


def _plain(op: Op, dims: Dims) -> Spec:
    return Spec(op.operands(), [dims])


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
      aten._reshape_alias.default)  # fmt: skip
def view(op: Op) -> Spec:
    """The same factors in the same order, cut into dims differently (replicated where there is nothing to cut)."""
    (x,) = op.tensors()
    replicated: set[Factor] = set()
    out = regroup(op, op.dims(x), [int(n) for n in op.out.shape], replicated)
    return Spec(
        op.operands(),
        [out],
        replicated=replicated,
        emit=lambda local: local.call(aten.reshape.default, local.operand(0), local.shape(local.spec.outs[0])),
    )


def regroup(op: Op, dims: Dims, shape: list[int], replicated: set[Factor]) -> Dims:
    """Cut the factors of `dims`, in order, into dims of the given extents.

    Runs of dims with equal products on both sides are matched on their own, so that a cut that cannot be
    expressed (``[4, 6] -> [8, 3]``) has only its own run replicated.
    """
    if 0 in shape:
        replicated.update(f for d in dims for f in d)
        return op.factors.fresh(shape)
    out: list[Dim] = []
    i, j = 0, 0
    while i < len(dims) or j < len(shape):
        run, made = list(dims[i : i + 1]), shape[j : j + 1]
        i, j = i + 1, j + 1
        a, b = extent(f for d in run for f in d), _product(made)
        while a != b:
            if a < b:
                run.append(dims[i])
                i += 1
                a = extent(f for d in run for f in d)
            else:
                made.append(shape[j])
                j += 1
                b = _product(made)
        out.extend(_match(op, tuple(f for d in run for f in d), made, replicated))
    return tuple(out)


def _product(sizes: list[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def _match(op: Op, run: Dim, made: list[int], replicated: set[Factor]) -> list[Dim]:
    if sum(n != 1 for n in made) <= 1:
        return [run if n != 1 else () for n in made]
    fresh = op.factors.fresh(made)
    if not op.factors.align(run, tuple(f for d in fresh for f in d)):
        replicated.update(run)
        fresh = op.factors.fresh(made)
        replicated.update(f for d in fresh for f in d)
    return list(fresh)


@rule(aten.view.dtype)
def reinterpret(op: Op) -> Spec:
    (x,) = op.tensors()
    own = op.dims(x)
    if list(op.out.shape) == op.shape(x):
        return _plain(op, own)
    last = op.factors.new(int(op.out.shape[-1]))
    return Spec(op.operands(), [(*own[:-1], last)], replicated={*own[-1], *last}, contiguous=True)


@rule(aten.view_as.default, aten.reshape_as.default)
def view_as(op: Op) -> Spec:
    x = op["self"]
    replicated: set[Factor] = set()
    out = regroup(op, op.dims(x), [int(n) for n in op.out.shape], replicated)
    at = op.tensors().index(x)
    return Spec(
        [op.operands()[at]],
        [out],
        replicated=replicated,
        emit=lambda local: local.call(aten.reshape.default, local.operand(0), local.shape(local.spec.outs[0])),
    )


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = list(op.dims(x))
    a, b = (op[k] if k in op.args else op[j] for k, j in (("dim0", "axis0"), ("dim1", "axis1")))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return _plain(op, tuple(dims))


@rule(aten.numpy_T.default)
def reverse(op: Op) -> Spec:
    (x,) = op.tensors()
    return _plain(op, op.dims(x)[::-1])


@rule(aten.t.default, aten.mT.default, aten.adjoint.default)
def matrix_transpose(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = op.dims(x)
    return _plain(op, (*dims[:-2], *dims[-2:][::-1]))


@rule(aten.permute.default)
def permute(op: Op) -> Spec:
    (x,) = op.tensors()
    return _plain(op, tuple(op.dim(x, d) for d in op["dims"]))


@rule(aten.movedim, aten.moveaxis)
def movedim(op: Op) -> Spec:
    (x,) = op.tensors()
    rank = len(op.dims(x))
    source, target = ([d] if isinstance(d, int) else list(d) for d in (op["source"], op["destination"]))
    order: list[int | None] = [None] * rank
    for s, d in zip(source, target, strict=True):
        order[d % rank] = s % rank
    rest = iter(i for i in range(rank) if i not in [s % rank for s in source])
    return _plain(op, tuple(op.dim(x, next(rest) if o is None else o) for o in order))


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = list(op.dims(x))
    dims.insert(op["dim"] % (len(dims) + 1), ())
    return _plain(op, tuple(dims))


@rule(aten.squeeze)
def squeeze(op: Op) -> Spec:
    """Only dims of extent 1 go; which ones is decided by the global sizes."""
    (x,) = op.tensors()
    shape, rank = op.shape(x), len(op.dims(x))
    asked = op["dim"]
    dims = range(rank) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = [d % rank for d in dims if rank and shape[d % rank] == 1]
    out = tuple(d for i, d in enumerate(op.dims(x)) if i not in gone)
    return Spec(op.operands(), [out], emit=lambda local: local.call(aten.squeeze.dims, local.operand(0), gone))


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(op: Op) -> Spec:
    """New and stretched dims are fresh factors: any rank can make its part."""
    x = op["self"]
    own, shape = op.dims(x), [int(n) for n in op.out.shape]
    lead = len(shape) - len(own)
    if op.target is aten.expand_as.default:
        other = op.dims(op["other"])
        dims = tuple(own[i - lead] if i >= lead and own[i - lead] else other[i] for i in range(len(shape)))
    else:
        dims = tuple(
            own[i - lead] if i >= lead and (own[i - lead] or n == 1) else op.factors.new(n) for i, n in enumerate(shape)
        )
    operand = op.operands()[op.tensors().index(x)]
    return Spec(
        [operand],
        [dims],
        emit=lambda local: local.call(aten.expand.default, local.operand(0), local.shape(local.spec.outs[0])),
    )


@rule(aten.repeat.default, aten.tile.default)
def repeat(op: Op) -> Spec:
    """``repeat`` stacks copies: the output dim is (copies, dim)."""
    (x,) = op.tensors()
    own, times = op.dims(x), list(op["repeats"] if "repeats" in op.args else op["dims"])
    times = [1] * (len(own) - len(times)) + times
    lead = len(times) - len(own)
    replicated: set[Factor] = set()
    dims = []
    for i, n in enumerate(times):
        copies = op.factors.new(n)
        replicated.update(copies)
        dims.append((*copies, *(own[i - lead] if i >= lead else ())))
    return Spec(op.operands(), [tuple(dims)], replicated=replicated)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Spec:
    """Each element n times in a row: the output dim is (dim, copies)."""
    (x,) = op.tensors()
    if op["dim"] is None:
        return unknown(op)
    dims = list(op.dims(x))
    at = op["dim"] % len(dims)
    copies = op.factors.new(op["repeats"])
    dims[at] = (*dims[at], *copies)

    def emit(local):
        return local.call(aten.repeat_interleave.self_int, local.operand(0), op["repeats"], at)

    return Spec(op.operands(), [tuple(dims)], replicated=set(copies), emit=emit)


@rule(aten.diagonal.default, aten.unfold.default, aten.tril.default, aten.triu.default)
def two_dims(op: Op) -> Spec:
    """The dims these work on stay replicated; the others are untouched."""
    (x,) = op.tensors()
    own, rank = op.dims(x), len(op.dims(x))
    if op.target is aten.unfold.default:
        used = [op["dimension"] % rank]
    elif op.target is aten.diagonal.default:
        used = [op["dim1"] % rank, op["dim2"] % rank]
    else:
        used = [rank - 2, rank - 1]
    replicated = {f for i in used for f in own[i]}
    if op.target in (aten.tril.default, aten.triu.default):
        return Spec(op.operands(), [own], replicated=replicated)
    if op.target is aten.unfold.default:
        made = op.factors.fresh((op.out.shape[used[0]], op.out.shape[-1]))
        dims = (*own[: used[0]], made[0], *own[used[0] + 1 :], made[1])
    else:
        made = op.factors.fresh((op.out.shape[-1],))
        dims = (*(d for i, d in enumerate(own) if i not in used), made[0])
    return Spec(op.operands(), [dims], replicated=replicated | {f for d in made for f in d})
