"""Rules of reductions, and of operators that need a dimension in full (softmax, norms, sorts, scans)."""

from __future__ import annotations

import torch

from fxpar.ops.logsumexp import known_logsumexp
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Spec, untouched
from fxpar.sharding.factors import leaves
from fxpar.sharding.facts import local_value

aten = torch.ops.aten


def _reduced(op: Op) -> tuple[list[int], bool]:
    """The reduced dims of the first operand (all of them where none are given), and keepdim."""
    rank = len(op.dims(op.tensors()[0]))
    dim = op["dim"]
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % rank for d in dims] if rank else [], bool(op["keepdim"])


def _reduction(op: Op) -> Spec:
    (x,) = op.tensors()
    dims, keep = _reduced(op)
    own = op.dims(x)
    out = tuple(() if i in dims else d for i, d in enumerate(own) if keep or i not in dims)
    return Spec(op.operands(), [out for _ in op.outs()])


@rule(aten.sum, aten.nansum)
def total(op: Op) -> Spec:
    spec = _reduction(op)
    (x,) = op.tensors()
    spec.sums = {f for i in _reduced(op)[0] for f in op.dim(x, i)}
    return spec


@rule(aten.mean)
def mean(op: Op) -> Spec:
    spec = total(op)
    spec.emit = _emit_mean
    return spec


def _emit_mean(local):
    """The mean of equal parts is the sum of their means over their number."""
    value, parts = local.default(), local.ranks(local.spec.sums)
    return value if parts == 1 else local.call(aten.div.Tensor, value, parts)


@rule(aten.amax, aten.max.default, aten.max.dim)
def maximum(op: Op) -> Spec:
    """A pending maximum, where no gradient flows and no index is asked for; else the dim stays replicated."""
    spec = _reduction(op)
    (x,) = op.tensors()
    reduced = {f for i in _reduced(op)[0] for f in op.dim(x, i)}
    if op.needs_grad() or len(op.outs()) > 1:
        spec.replicated = reduced
    else:
        spec.maxes = reduced
    return spec


@rule(aten.amin, aten.min.default, aten.min.dim, aten.any, aten.all, aten.prod, aten.argmax, aten.argmin, aten.std,
      aten.var, aten.std_mean, aten.var_mean, aten.linalg_vector_norm, aten.norm, aten.median, aten.nanmedian,
      aten.mode, aten.aminmax, aten.count_nonzero, aten.kthvalue)  # fmt: skip
def replicated_reduction(op: Op) -> Spec:
    spec = _reduction(op)
    (x,) = op.tensors()
    spec.replicated = {f for i in _reduced(op)[0] for f in op.dim(x, i)}
    return spec


@rule(aten.logsumexp)
def logsumexp(op: Op) -> Spec:
    """Split, it is the logsumexp of every rank's own."""
    spec = _reduction(op)
    dims, _ = _reduced(op)
    if len(dims) == 1:
        spec.emit, spec.inner = _emit_logsumexp, set(op.dim(op.tensors()[0], dims[0]))
    else:
        spec.replicated = {f for i in dims for f in op.dim(op.tensors()[0], i)}
    return spec


def _emit_logsumexp(local):
    op = local.op
    (node,) = op.tensors()
    dim = _reduced(op)[0][0] - len(op.dims(node))
    axes = local.axes(op.dim(node, dim))
    if not axes:
        return local.default()
    x = _at_least_float32(local, local.args[0])
    part = local.call(aten.logsumexp.default, local.call(aten.detach.default, x), [dim])
    part = local.call(aten.unsqueeze.default, part, dim)
    top = local.reduce(part, axes, "max")
    top = local.call(aten.where.ScalarOther, local.call(aten.isfinite.default, top), top, 0)
    total = local.reduce(local.call(aten.exp.default, local.call(aten.sub.Tensor, part, top)), axes, "sum")
    out = local.call(aten.add.Tensor, local.call(aten.log.default, total), top)
    out = local.call(known_logsumexp, x, out) if op.needs_grad() else out
    out = out if op.out.dtype.itemsize >= 4 else local.call(aten.to.dtype, out, op.out.dtype)
    return out if op["keepdim"] else local.call(aten.squeeze.dim, out, dim)


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def softmax(op: Op) -> Spec:
    (x,) = op.tensors()
    return Spec(op.operands(), [op.dims(x)], emit=_emit_softmax)


def _emit_softmax(local):
    op = local.op
    (node,) = op.tensors()
    dim = op["dim"] % max(len(op.dims(node)), 1)
    axes = local.axes(op.dim(node, dim)) if op.dims(node) else ()
    if not axes:
        return local.default()
    x, log = local.args[0], "log" in str(op.target)
    dtype = op.out.dtype
    if (local_value(x).dtype or dtype) is not dtype:
        x = local.call(aten.to.dtype, x, dtype)
    x = _at_least_float32(local, x)
    top = local.reduce(local.call(aten.amax.default, local.call(aten.detach.default, x), [dim], True), axes, "max")
    shifted = local.call(aten.sub.Tensor, x, local.vary(top, axes))
    exps = local.call(aten.exp.default, shifted)
    total = local.reduce(local.call(aten.sum.dim_IntList, exps, [dim], True), axes, "sum")
    if log:
        out = local.call(aten.sub.Tensor, shifted, local.vary(local.call(aten.log.default, total), axes))
    else:
        out = local.call(aten.div.Tensor, exps, local.vary(total, axes))
    return out if dtype.itemsize >= 4 else local.call(aten.to.dtype, out, dtype)


def _at_least_float32(local, x):
    """A 16-bit operand in float32: what kernels for it do inside of one rank, sums over ranks need, too."""
    dtype = local_value(x).dtype or local.op.out.dtype
    return local.call(aten.to.dtype, x, torch.float32) if dtype.itemsize < 4 else x


@rule(aten.cumsum, aten.cumprod, aten.sort, aten.argsort, aten.topk, aten.logcumsumexp, aten.cummax, aten.cummin,
      aten.flip, aten.roll)  # fmt: skip
def along(op: Op) -> Spec:
    """Works along some dims, which stay replicated. A place in a sorted dim is not one of the dim that was sorted."""
    x = op.tensors()[0]
    rank = len(op.dims(x))
    dim = op["dim"] if "dim" in op.args else op["dims"]
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = [d % rank for d in dims] if rank else []
    spec = untouched(op, x, dims)
    if getattr(op.target, "overloadpacket", None) in (aten.sort, aten.argsort, aten.topk):
        made = {d: op.factors.new(int(op.outs()[0].shape[d])) for d in dims}
        spec.outs = [tuple(made.get(j, d) for j, d in enumerate(out)) for out in spec.outs]
        spec.replicated.update(f for d in made.values() for f in d)
    return spec


@rule(aten.renorm.default)
def renorm(op: Op) -> Spec:
    """Each slice along `dim` is scaled by its own norm, over all other dims."""
    (x,) = op.tensors()
    rank = len(op.dims(x))
    return untouched(op, x, [i for i in range(rank) if i != op["dim"] % rank])


@rule(aten.histc.default)
def histogram(op: Op) -> Spec:
    """Split, each rank counts what it has; but where no bounds are given they are those of all of the operand."""
    (x,) = op.tensors()
    made = op.factors.fresh(op.out.shape)
    everything, bins = {f for d in op.dims(x) for f in d}, {f for d in made for f in d}
    if op["min"] == op["max"]:
        return Spec(op.operands(), [made], replicated=everything | bins)
    return Spec(op.operands(), [made], sums=everything, replicated=bins)


@rule(aten.diff.default)
def diff(op: Op) -> Spec:
    (x, *more) = op.tensors()
    at = op["dim"] % len(op.dims(x))
    dims = list(op.dims(x))
    replicated = {f for node in op.tensors() for f in op.dim(node, at)}
    for node in more:
        for i, d in enumerate(op.dims(node)):
            if i != at and not op.factors.align(dims[i], d):
                replicated.update(d, dims[i])
    dims[at] = op.factors.new(int(op.out.shape[at]))
    return Spec(op.operands(), [tuple(dims)], replicated=replicated | set(dims[at]))


@rule(aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default)
def layer_norm(op: Op) -> Spec:
    """Normalises over the last dims, which stay replicated; weights lie along them."""
    x = op["input"]
    own = op.dims(x)
    last = len(op["normalized_shape"])
    replicated = {f for d in own[len(own) - last :] for f in d}
    for node in op.tensors():
        if node is not x:
            for d, n in zip(own[len(own) - last :], op.dims(node), strict=True):
                op.factors.align(d, n)
            replicated.update(f for d in op.dims(node) for f in d)
    reduced = (*own[: len(own) - last], *([()] * last))
    outs = [reduced if i else own for i in range(len(op.outs()))]
    return Spec(op.operands(), outs, replicated=replicated)


@rule(aten.group_norm.default, aten.instance_norm.default)
def group_norm(op: Op) -> Spec:
    """The batch is parallel; channels and space stay replicated."""
    x = op["input"]
    own = op.dims(x)
    replicated = {f for d in own[1:] for f in d}
    for node in op.tensors():
        if node is not x:
            op.factors.align(own[1], op.dim(node, 0))
            replicated.update(op.dim(node, 0))
    return Spec(op.operands(), [own], replicated=replicated)


@rule(aten.batch_norm.default)
def batch_norm_eval(op: Op) -> Spec:
    """With running statistics it is an affine map per channel (in training it was written out: see batchnorm)."""
    x = op["input"]
    spec = Spec(op.operands(), [op.dims(x)])
    if op["training"]:
        spec.replicated = {f for i, d in enumerate(op.dims(x)) if i != 1 for f in d}
    for node in op.tensors():
        if node is not x and not op.factors.align(op.dim(x, 1), op.dim(node, 0)):
            spec.replicated.update(leaves(op.dim(x, 1)), op.dim(node, 0))
    return spec
