"""Random arguments for reductions, softmax, scans and norms."""

from __future__ import annotations

import torch

from tests.harness import Gen
from tests.passes.infer.cases.pointwise import pair
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


def _plain_reduction(g: Gen, make=None):
    return ((make or g.f)(*g.shape(0, 4)),)


def _over(g: Gen, make=None, several: bool = True, none: bool = True):
    """(x, dim or dims, keepdim)"""
    x = (make or g.f)(*g.shape(1, 4))
    if not several:
        return x, g.dim(x.dim()), g.maybe()
    dims = g.dims(x.dim())
    return x, (g.pick(None, dims, dims, dims) if none else dims), g.maybe()


def _eighths(g: Gen):
    """Floats whose sums are not rounded, so that one of many that cancel is exact in whatever order."""
    return lambda *shape: (g.f(*shape) * 8).round() / 8


for target in (aten.sum.default, aten.nansum.default, aten.mean.default):
    case(target)(lambda g: _plain_reduction(g, _eighths(g)))
for target in (
    aten.max.default,
    aten.min.default,
    aten.prod.default,
    aten.std.default,
    aten.var.default,
    aten.median.default,
    aten.nanmedian.default,
    aten.count_nonzero.default,
    aten.linalg_vector_norm.default,
    aten.norm.Scalar,
):
    case(target)(_plain_reduction)
for target in (aten.any.default, aten.all.default):
    case(target)(lambda g: _plain_reduction(g, g.b))
for target in (aten.sum.dim_IntList, aten.mean.dim):
    case(target)(lambda g: _with_keepdim(g, _eighths(g)))
for target in (
    aten.var.correction,
    aten.std.correction,
    aten.std_mean.correction,
    aten.var_mean.correction,
):
    case(target)(lambda g: _with_keepdim(g))
for target in (aten.std.dim, aten.var.dim, aten.std_mean.dim, aten.var_mean.dim):
    case(target)(lambda g: (lambda x, d, k: (x, d, g.maybe(), k))(*_over(g)))
for target in (aten.std_mean.default, aten.var_mean.default):
    case(target)(lambda g: (g.f(*g.shape()), g.maybe()))
for target in (aten.amax.default, aten.amin.default, aten.logsumexp.default):
    case(target)(lambda g: _over(g, none=False))
for target in (aten.any.dims, aten.all.dims):
    case(target)(lambda g: _over(g, g.b))
for target in (aten.any.dim, aten.all.dim):
    case(target)(lambda g: _over(g, g.b, several=False))
for target in (aten.max.dim, aten.min.dim, aten.prod.dim_int, aten.median.dim, aten.nanmedian.dim):
    case(target)(lambda g: _over(g, several=False))
for target in (aten.argmax.default, aten.argmin.default):
    case(target)(lambda g: (lambda x, d, k: (x, g.pick(None, d), k))(*_over(g, several=False)))


def _with_keepdim(g: Gen, make=None):
    x, dims, keep = _over(g, make)
    return (x, dims), {"keepdim": keep}


@case(aten.min.other)
def minimum(g: Gen):
    return pair(g, g.f)


@case(aten.norm.ScalarOpt_dim)
def norm_dim(g: Gen):
    x, dims, keep = _over(g, none=False)
    return x, g.pick(1, 2, 3), dims, keep


@case(aten.norm.ScalarOpt_dim_dtype)
def norm_dim_dtype(g: Gen):
    x, dims, keep = _over(g, none=False)
    return (x, 2, dims, keep), {"dtype": torch.float64}


@case(aten.norm.ScalarOpt_dtype)
def norm_dtype(g: Gen):
    return (g.f(*g.shape()), 2), {"dtype": torch.float64}


@case(aten.mode.default)
def mode(g: Gen):
    return _over(g, lambda *s: g.i(3, *s), several=False)


@case(aten.kthvalue.default)
def kthvalue(g: Gen):
    x, d, keep = _over(g, several=False)
    return x, g.r.randint(1, x.shape[d]), d, keep


@case(aten.aminmax.default)
def aminmax(g: Gen):
    x, d, keep = _over(g, several=False)
    if "NotImplemented" in torch.aminmax(torch.ones(1, requires_grad=True)).min.grad_fn.name():  # the derivative, in torch 2.11
        g.constant(x)
    return (x,), {"dim": d, "keepdim": keep} if g.maybe() else {"keepdim": keep}


@case(aten.count_nonzero.dim_IntList)
def count_nonzero(g: Gen):
    x = g.i(2, *g.shape())
    return x, g.dims(x.dim())


for target in (aten.softmax.int, aten.log_softmax.int):
    case(target)(lambda g: _softmax(g))
for target in (aten._softmax.default, aten._log_softmax.default):
    case(target)(lambda g: (*_softmax(g)[:2], False))


def _softmax(g: Gen):
    x = g.f(*g.shape(0, 3))
    if x.dim() and g.maybe(0.2):
        x = x.masked_fill(g.b(*x.shape), float("-inf"))
        x.select(-1, 0).fill_(0.5)
        return x, -1
    dim = g.dim(max(x.dim(), 1))
    return (x, dim, torch.float64) if g.maybe(0.2) else (x, dim)


for target in (
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
):
    case(target)(lambda g: (lambda x: (x, g.dim(max(x.dim(), 1))))(g.f(*g.shape(0, 3))))
for target in (aten.sort.default, aten.argsort.default):
    case(target)(lambda g: (lambda x: (x, g.dim(x.dim()), g.maybe()))(g.f(*g.shape())))
for target in (aten.sort.stable, aten.argsort.stable):
    case(target)(
        lambda g: (lambda x: ((x,), {"stable": True, "dim": g.dim(x.dim()), "descending": g.maybe()}))(
            g.i(3, *g.shape())
        )
    )


@case(aten.topk.default)
def topk(g: Gen):
    x = g.f(*g.shape())
    dim = g.dim(x.dim())
    return x, g.r.randint(1, x.shape[dim]), dim


@case(aten.flip.default)
def flip(g: Gen):
    x = g.any(*g.shape())
    return x, g.dims(x.dim(), 0)


@case(aten.roll.default)
def roll(g: Gen):
    x = g.any(*g.shape())
    dims = g.dims(x.dim(), 0)
    return (x, [g.r.randint(-3, 3) for _ in dims], dims) if dims else (x, [g.r.randint(-3, 3)])


@case(aten.renorm.default)
def renorm(g: Gen):
    x = g.f(*g.shape(2, 4))
    return x, 2, g.dim(x.dim()), 0.5


@case(aten.diff.default)
def diff(g: Gen):
    x = g.f(*g.shape(1, 3, least=2))
    dim = g.dim(x.dim())
    more = list(x.shape)
    more[dim] = 1
    return (x, 1, dim, g.f(*more)) if g.maybe(0.3) else (x, 1, dim)


@case(aten.layer_norm.default)
def layer_norm(g: Gen):
    shape = g.shape(1, 4)
    last = shape[g.dim(len(shape)) % len(shape) :]
    x = g.f(*shape)
    affine = g.pick(0, 1, 2)
    return x, last, *[g.f(*last) for _ in range(affine)], *[None] * (2 - affine), 1e-5


@case(aten.native_layer_norm.default)
def native_layer_norm(g: Gen):
    return layer_norm(g)


@case(aten.rms_norm.default)
def rms_norm(g: Gen):
    shape = g.shape(1, 4)
    last = shape[g.dim(len(shape)) % len(shape) :]
    return (g.f(*shape), last, g.f(*last), 1e-5) if g.maybe() else (g.f(*shape), last, None, 1e-5)


@case(aten.group_norm.default)
def group_norm(g: Gen):
    groups, each = g.pick(1, 2, 3), g.pick(1, 2, 4)
    x = g.f(g.n(), groups * each, *g.shape(1, 2, least=2))
    return (x, groups, g.f(groups * each), g.f(groups * each), 1e-5) if g.maybe() else (x, groups)


@case(aten.instance_norm.default)
def instance_norm(g: Gen):
    c = g.n()
    weights = (g.f(c), g.f(c)) if g.maybe() else (None, None)
    running = (g.constant(g.f(c)), g.constant(g.positive(c))) if g.maybe(0.3) else (None, None)
    return g.f(g.n(), c, *g.shape(1, 2, least=2)), *weights, *running, running[0] is None, 0.1, 1e-5, False


@case(aten.batch_norm.default)
def batch_norm(g: Gen):
    c = g.n()
    weights = (g.f(c), g.f(c)) if g.maybe() else (None, None)
    if g.maybe(0.2):
        return g.f(g.n(2), c, *g.shape(1, 2, least=2)), *weights, None, None, True, 0.1, 1e-5, False
    return (
        g.f(g.n(), c, *g.shape(0, 2)),
        *weights,
        g.constant(g.f(c)),
        g.constant(g.positive(c)),
        False,
        0.1,
        1e-5,
        False,
    )
