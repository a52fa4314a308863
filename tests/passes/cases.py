"""Random arguments for every operator that has a rule: `CASES[operator](gen)` gives ``(args, kwargs)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxpar.ops.attention import windowed_attention
from fxpar.ops.pick import pick
from fxpar.ops.rng import dropout_mask
from tests.harness import Gen

aten = torch.ops.aten
Call = tuple[tuple, dict[str, Any]]
CASES: dict[Any, Callable[[Gen], Call]] = {}
UNDEFINED: set[Any] = {
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
}
"""Operators whose elements are undefined."""


def case(*targets: Any, **fixed: Any):
    """Register a generator of arguments; it returns the positional ones, or (those, keyword ones)."""

    def register(function):
        def make(gen: Gen) -> Call:
            made = function(gen, **fixed)
            return made if len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict) else (made, {})

        for target in targets:
            assert target not in CASES, target
            CASES[target] = make
        return function

    return register


# ---- products, lookups, attention ----


@case(aten.linear.default)
def linear(g: Gen):
    lead, i, o = g.shape(0, 3), g.n(), g.n()
    x = g.f(*lead, i)
    w = x if len(lead) == 1 and g.maybe(0.1) else g.f(o, i)
    return (x, w, g.f(w.shape[0])) if g.maybe() else (x, w)


@case(aten.addmm.default)
def addmm(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    bias = g.f(*g.pick([n], [m, n], [1, n], [m, 1], [1], []))
    scales = {} if g.maybe() else {"beta": g.pick(0.5, 2, 0), "alpha": g.pick(0.25, 3)}
    return (bias, g.f(m, k), g.f(k, n)), scales


@case(aten.baddbmm.default)
def baddbmm(g: Gen):
    b, m, k, n = g.n(), g.n(), g.n(), g.n()
    bias = g.f(*g.broadcast([b, m, n]))
    return (bias, g.f(b, m, k), g.f(b, k, n)), {} if g.maybe() else {"beta": 0.5, "alpha": 3}


@case(aten.mm.default)
def mm(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    if g.maybe(0.1):
        square = g.f(m, m)
        return square, square
    return g.f(m, k), g.f(k, n)


@case(aten.bmm.default)
def bmm(g: Gen):
    b, m, k, n = g.n(), g.n(), g.n(), g.n()
    return g.f(b, m, k), g.f(b, k, n)


@case(aten.mv.default)
def mv(g: Gen):
    m, k = g.n(), g.n()
    return g.f(m, k), g.f(k)


@case(aten.dot.default, aten.vdot.default)
def dot(g: Gen):
    n = g.n()
    x = g.f(n)
    return x, x if g.maybe(0.2) else g.f(n)


@case(aten.outer.default, aten.ger.default)
def outer(g: Gen):
    x = g.f(g.n())
    return x, x if g.maybe(0.2) else g.f(g.n())


@case(aten.matmul.default)
def matmul(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    lead = g.shape(0, 2)
    left = [k] if g.maybe(0.2) else [*g.broadcast(lead), m, k]
    right = [k] if g.maybe(0.2) else [*g.broadcast(lead), k, n]
    return g.f(*left), g.f(*right)


@case(aten.einsum.default)
def einsum(g: Gen):
    equation = g.pick(
        "bhqd,bhkd->bhqk",
        "ij,jk->ik",
        "bij,bjk->bik",
        "i,j->ij",
        "ij->ji",
        "ijk->j",
        "ij,ij->i",
        "bid,bjd,d->bij",
        "...ij,jk->...ik",
        "ii->i",
        "ab,bc",
        "iJ,Jk->ik",
        "ij,jk -> ik",
        "ab->",
        "i,i->",
    )
    sizes: dict[str, int] = {}
    tensors = []
    for term in equation.replace(" ", "").partition("->")[0].split(","):
        lead = [2, 3] if "..." in term else []
        letters = term.replace("...", "")
        dims = [sizes.setdefault(c, g.pick(1, 2, 3, 4, 6)) for c in letters]
        if len(set(letters)) == len(letters) and g.maybe(0.15):
            dims = [1 if g.maybe(0.3) else n for n in dims]
        tensors.append(g.f(*lead, *dims))
    return (equation, tensors), {}


@case(aten.embedding.default)
def embedding(g: Gen):
    rows, width = g.n(2), g.n()
    ids = g.i(rows, *g.shape(0, 3))
    if g.maybe(0.3):
        return g.f(rows, width), ids
    if g.maybe(0.2):
        return g.f(rows, width), ids, -1, True  # a gradient that depends on how often an id occurs
    return g.f(rows, width), ids, g.i(rows).item()


@case(pick)
def pick_one(g: Gen):
    lead, classes = g.shape(0, 2), g.n(2)
    index = g.i(classes, *lead)
    return g.f(*lead, classes), torch.where(g.b(*lead), index, -100) if g.maybe(0.3) else index


@case(aten.scaled_dot_product_attention.default)
def attention(g: Gen):
    b, j, d, e = g.pick(1, 2, 4), g.pick(1, 2, 4), g.pick(2, 4), g.pick(2, 4, 6)
    group = g.pick(1, 1, 2, 3)
    h, length = j * group, g.pick(1, 2, 4, 6)
    keys = length if g.maybe() else g.pick(2, 3, 4)
    rank = g.pick(4, 4, 4, 3, 5) if group == 1 else 4
    lead = {3: [h], 4: [b, h], 5: [2, b, h]}[rank]
    kv = {3: [h], 4: [b, j], 5: [2, b, h]}[rank]
    q, k, v = g.f(*lead, length, d), g.f(*kv, keys, d), g.f(*kv, keys, e)
    if group == 1 and e == d and g.maybe(0.1):
        v = k
    kwargs: dict[str, Any] = {"enable_gqa": True} if group > 1 else {}
    if g.maybe(0.3):
        kwargs["scale"] = 0.3
    how = g.pick("none", "causal", "bool", "float", "float")
    if how == "causal":
        return (q, k, v), {"is_causal": True, **kwargs}
    if how == "none":
        return (q, k, v), kwargs
    shape = g.broadcast([*lead, length, keys]) if g.maybe() else [length, keys]
    shape = shape if len(shape) >= 2 else [length, keys]
    mask = g.f(*shape)
    if how == "bool":
        mask = mask > -1
        mask[..., 0] = True
    return (q, k, v, mask), kwargs


@case(windowed_attention)
def windowed(g: Gen):
    b, j, group, length, d, e = (
        g.pick(1, 2, 4),
        g.pick(1, 2, 4),
        g.pick(1, 1, 2, 3),
        g.pick(2, 4, 6),
        4,
        g.pick(2, 4),
    )
    kwargs = {"window": g.pick(1, 2, 3), **({"enable_gqa": True} if group > 1 else {})}
    return (g.f(b, j * group, length, d), g.f(b, j, length, d), g.f(b, j, length, e)), kwargs


# ---- pointwise ----


@case(aten.to.dtype)
def cast(g: Gen):
    return g.any(*g.shape()), g.pick(torch.float64, torch.float32, torch.int64, torch.bool)


@case(aten._to_copy.default)
def to_copy(g: Gen):
    return (g.any(*g.shape()),), {"dtype": torch.float64}


@case(aten.to.device)
def to_device(g: Gen):
    return g.any(*g.shape()), torch.device("cpu"), torch.float64


@case(aten.to.dtype_layout)
def to_layout(g: Gen):
    return (g.any(*g.shape()),), {"dtype": torch.float64, "layout": torch.strided}


@case(aten.to.other, aten.type_as.default)
def to_other(g: Gen):
    return g.any(*g.shape()), g.any(*g.shape())


@case(
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.empty_like.default,
)
def moved(g: Gen):
    return (g.any(*g.shape()),)


@case(aten.full_like.default)
def full_like(g: Gen):
    return g.any(*g.shape()), 3


@case(aten.where.self)
def where(g: Gen):
    shape = g.shape()
    return g.b(*g.broadcast(shape)), g.f(*g.broadcast(shape)), g.f(*g.broadcast(shape))


@case(aten.where.ScalarOther)
def where_scalar_other(g: Gen):
    shape = g.shape()
    return g.b(*g.broadcast(shape)), g.f(*shape), 0.5


@case(aten.where.ScalarSelf)
def where_scalar_self(g: Gen):
    shape = g.shape()
    return g.b(*g.broadcast(shape)), 0.5, g.f(*shape)


case(aten.where.Scalar)(lambda g: (g.b(*g.shape()), 0.5, 2.0))


@case(aten.masked_fill.Scalar)
def masked_fill(g: Gen):
    shape = g.shape()
    return g.f(*g.broadcast(shape)), g.b(*g.broadcast(shape)), -1.5


case(aten.fill.Scalar)(lambda g: (g.f(*g.shape()), 0.5))
case(aten.fill.Tensor)(lambda g: (g.f(*g.shape()), g.f()))
case(aten.histc.default)(lambda g: (g.constant(g.f(*g.shape())), g.pick(2, 4), -1, 1))


@case(aten.masked_fill.Tensor)
def masked_fill_tensor(g: Gen):
    shape = g.shape()
    return g.f(*shape), g.b(*g.broadcast(shape)), g.f()


def _pair(g: Gen, make):
    shape = g.shape()
    return make(*g.broadcast(shape)), make(*g.broadcast(shape))


@case(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor)
def bits(g: Gen):
    return _pair(g, g.b if g.maybe() else lambda *s: g.i(16, *s))


@case(aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar)
def bits_scalar(g: Gen):
    return g.i(16, *g.shape()), 5


@case(
    aten.rsub.Tensor,
    aten.true_divide.Tensor,
    aten.not_equal.Tensor,
    aten.multiply.Tensor,
    aten.divide.Tensor,
    aten.subtract.Tensor,
    aten.greater.Tensor,
    aten.greater_equal.Tensor,
    aten.less.Tensor,
    aten.less_equal.Tensor,
    aten.polar.default,
    aten.complex.default,
)
def arithmetic(g: Gen):
    return _pair(g, lambda *s: g.positive(*s))


@case(
    aten.rsub.Scalar,
    aten.true_divide.Scalar,
    aten.not_equal.Scalar,
    aten.multiply.Scalar,
    aten.divide.Scalar,
    aten.subtract.Scalar,
    aten.greater.Scalar,
    aten.greater_equal.Scalar,
    aten.less.Scalar,
    aten.less_equal.Scalar,
)
def arithmetic_scalar(g: Gen):
    return g.f(*g.shape()), 2


@case(aten.floor_divide.default, aten.ldexp.Tensor)
def integers(g: Gen):
    return _pair(g, lambda *s: g.i(9, *s, low=1))


@case(aten.floor_divide.Scalar)
def floor_divide_scalar(g: Gen):
    return g.i(50, *g.shape()), 3


@case(aten.divide.Tensor_mode)
def divide_mode(g: Gen):
    return _pair(g, lambda *s: g.i(20, *s, low=1)), {"rounding_mode": "floor"}


@case(aten.divide.Scalar_mode)
def divide_scalar_mode(g: Gen):
    return (g.i(20, *g.shape()), 3), {"rounding_mode": "trunc"}


@case(
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.negative.default,
    aten.absolute.default,
    aten.fix.default,
    aten.special_expit.default,
    aten.special_erf.default,
)
def unary(g: Gen):
    return (g.f(*g.shape()),)


@case(aten.imag.default, aten.real.default, aten.conj.default, aten._conj.default, aten.resolve_conj.default)
def of_complex(g: Gen):
    shape = g.shape()
    return (torch.complex(g.f(*shape), g.f(*shape)),)


@case(aten.isin.Tensor_Scalar)
def isin(g: Gen):
    return g.i(5, *g.shape()), 3


@case(aten.bucketize.Tensor)
def bucketize(g: Gen):
    return g.f(*g.shape()), g.f(g.n()).sort().values


@case(aten.prelu.default)
def prelu(g: Gen):
    shape = g.shape()
    channels = shape[1] if len(shape) > 1 else 1
    return g.f(*shape), g.f(g.pick(channels, 1))


@case(aten.glu.default)
def glu(g: Gen):
    shape = g.shape()
    at = g.dim(len(shape))
    shape[at] = 2 * g.pick(1, 2, 3, 4)
    return g.f(*shape), at


@case(dropout_mask)
def dropout(g: Gen):
    shape = g.shape()
    kwargs: dict[str, Any] = {"p": 0.4, "site": g.r.randint(0, 5)}
    if len(shape) > 2 and g.maybe(0.4):
        kwargs["shape"] = [*shape[:2], *[1] * (len(shape) - 2)]
    return (g.f(*shape), torch.tensor(g.r.randint(0, 2**40))), kwargs


# ---- reductions ----


def _plain_reduction(g: Gen, make=None):
    return ((make or g.f)(*g.shape(0, 4)),)


def _over(g: Gen, make=None, several: bool = True, none: bool = True):
    """(x, dim or dims, keepdim)"""
    x = (make or g.f)(*g.shape(1, 4))
    if not several:
        return x, g.dim(x.dim()), g.maybe()
    dims = g.dims(x.dim())
    return x, (g.pick(None, dims, dims, dims) if none else dims), g.maybe()


for target in (
    aten.sum.default,
    aten.nansum.default,
    aten.mean.default,
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
for target in (
    aten.sum.dim_IntList,
    aten.mean.dim,
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


def _with_keepdim(g: Gen):
    x, dims, keep = _over(g)
    return (x, dims), {"keepdim": keep}


@case(aten.min.other)
def minimum(g: Gen):
    return _pair(g, g.f)


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


# ---- norms ----


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


# ---- views ----


@case(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(g: Gen):
    x = g.any(*g.shape(0, 4))
    return x, _reshaped(g, x.numel())


def _reshaped(g: Gen, n: int) -> list[int]:
    out = []
    for _ in range(g.r.randint(0, 3)):
        factor = g.r.choice([k for k in (1, 2, 3, 4, 6, 8, 12) if n % k == 0])
        out.append(factor)
        n //= factor
    out.append(n)
    g.r.shuffle(out)
    if g.maybe(0.2):
        out[g.r.randrange(len(out))] = -1
    return out


@case(aten._reshape_alias.default)
def reshape_alias(g: Gen):
    x = g.any(*g.shape())
    return x, [x.numel()], [1]


@case(aten.view_as.default, aten.reshape_as.default)
def view_as(g: Gen):
    x = g.any(*g.shape())
    shape = [n if n != -1 else 0 for n in _reshaped(g, x.numel())]
    if 0 in shape:
        shape[shape.index(0)] = x.numel() // torch.Size([n for n in shape if n]).numel()
    return x, g.f(*shape)


@case(aten.flatten.using_ints)
def flatten(g: Gen):
    x = g.any(*g.shape(0, 4))
    rank = max(x.dim(), 1)
    a, b = sorted((g.r.randrange(rank), g.r.randrange(rank)))
    return x, a, b - rank if g.maybe() else b


@case(aten.unflatten.int)
def unflatten(g: Gen):
    shape = g.shape(1, 3)
    at = g.dim(len(shape))
    sizes = g.pick([2, 2], [2, 3], [1, 4], [2, 2, 2])
    shape[at] = torch.Size(sizes).numel()
    return g.any(*shape), at, [-1, *sizes[1:]] if g.maybe(0.3) else sizes


@case(aten.view.dtype)
def view_dtype(g: Gen):
    shape = g.shape()
    if g.maybe():
        return g.i(100, *shape), torch.float64
    return g.i(100, *shape[:-1], 4), torch.int32


@case(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim()), g.dim(x.dim())


@case(aten.t.default)
def t(g: Gen):
    return (g.any(*g.shape(0, 2)),)


@case(aten.numpy_T.default)
def numpy_t(g: Gen):
    return (g.any(*g.shape(1, 4)),)


@case(aten.mT.default, aten.adjoint.default)
def mt(g: Gen):
    return (g.any(*g.shape(2, 4)),)


@case(aten.permute.default)
def permute(g: Gen):
    x = g.any(*g.shape())
    order = list(range(x.dim()))
    g.r.shuffle(order)
    return x, [d - x.dim() if g.maybe() else d for d in order]


@case(aten.movedim.int, aten.moveaxis.int)
def movedim(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim()), g.dim(x.dim())


@case(aten.movedim.intlist, aten.moveaxis.intlist)
def movedims(g: Gen):
    x = g.any(*g.shape(2, 4))
    source, target = g.dims(x.dim()), g.r.sample(range(x.dim()), x.dim())
    return x, source, target[: len(source)]


@case(aten.unsqueeze.default)
def unsqueeze(g: Gen):
    x = g.any(*g.shape(0, 3))
    return x, g.dim(x.dim() + 1)


@case(aten.squeeze.default)
def squeeze(g: Gen):
    return (g.any(*[1 if g.maybe() else n for n in g.shape(0, 4)]),)


@case(aten.squeeze.dim)
def squeeze_dim(g: Gen):
    x = g.any(*[1 if g.maybe() else n for n in g.shape(1, 4)])
    return x, g.dim(x.dim())


@case(aten.squeeze.dims)
def squeeze_dims(g: Gen):
    x = g.any(*[1 if g.maybe() else n for n in g.shape(1, 4)])
    return x, g.dims(x.dim())


@case(aten.expand.default, aten.broadcast_to.default)
def expand(g: Gen):
    shape = g.shape(1, 4)
    own = g.broadcast(shape)
    return g.any(*own), [
        -1 if i >= len(shape) - len(own) and g.maybe(0.2) and own[i - len(shape)] == n else n
        for i, n in enumerate(shape)
    ]


@case(aten.expand_as.default)
def expand_as(g: Gen):
    shape = g.shape(1, 4)
    return g.any(*g.broadcast(shape)), g.f(*shape)


@case(aten.repeat.default, aten.tile.default)
def repeat(g: Gen):
    x = g.any(*g.shape(1, 3))
    return x, [g.pick(1, 2, 3) for _ in range(x.dim() + g.pick(0, 0, 1))]


@case(aten.repeat_interleave.self_int)
def repeat_interleave(g: Gen):
    x = g.any(*g.shape(1, 3))
    return x, g.pick(1, 2, 3), g.pick(None, g.dim(x.dim()), g.dim(x.dim()))


@case(aten.diagonal.default)
def diagonal(g: Gen):
    x = g.any(*g.shape(2, 4, least=2))
    a, b = g.r.sample(range(x.dim()), 2)
    return x, g.pick(0, 0, 1, -1), a - x.dim() if g.maybe() else a, b


@case(aten.unfold.default)
def unfold(g: Gen):
    x = g.any(*g.shape(1, 3))
    dim = g.dim(x.dim())
    return x, dim, g.r.randint(1, x.shape[dim]), g.pick(1, 2)


@case(aten.tril.default, aten.triu.default)
def triangle(g: Gen):
    return g.f(*g.shape(2, 4)), g.pick(0, 1, -1)


# ---- slices, splits, indexing ----


@case(aten.slice.Tensor)
def slice_(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    n = x.shape[dim]
    parts = g.r.choice([k for k in (1, 2, 3, 4) if n % k == 0])
    at, each = g.r.randrange(parts), n // parts
    if g.maybe(0.6):
        return (
            x,
            dim,
            at * each - (n if g.maybe() and at else 0),
            (at + 1) * each if at + 1 < parts else 2**63 - 1,
        )
    start = g.r.randint(-n - 1, n - 1)
    return x, dim, g.pick(start, None), g.pick(None, g.r.randint(-n, n + 2)), g.pick(1, 1, 2)


@case(aten.narrow.default)
def narrow(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    start = g.r.randrange(x.shape[dim])
    return x, dim, start, g.r.randint(1, x.shape[dim] - start)


@case(aten.select.int)
def select(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    return x, dim, g.r.randint(-x.shape[dim], x.shape[dim] - 1)


@case(aten.split.Tensor, aten.unsafe_split.Tensor)
def split(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    return x, g.r.randint(1, x.shape[dim]), dim


@case(aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections)
def chunk(g: Gen):
    x = g.any(*g.shape())
    return x, g.pick(1, 2, 3, 4), g.dim(x.dim())


@case(aten.split_with_sizes.default, aten.split.sizes, aten.split.default)
def split_with_sizes(g: Gen):
    shape = g.shape()
    dim = g.dim(len(shape))
    sizes = [g.pick(2, 4)] * g.pick(1, 2, 3) if g.maybe() else [g.pick(1, 2, 4) for _ in range(g.pick(2, 3))]
    shape[dim] = sum(sizes)
    return g.any(*shape), sizes, dim


@case(aten.unbind.int)
def unbind(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim())


@case(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(g: Gen):
    shape = g.shape()
    dim = g.dim(len(shape))
    equal, parts = g.maybe(), []
    for _ in range(g.pick(1, 2, 3)):
        if not equal:
            shape = [*shape]
            shape[dim] = g.pick(1, 2, 4, 0) if g.maybe(0.9) else 0
        parts.append(g.f(*shape))
    if g.maybe(0.2):
        parts.append(parts[0])
    if g.maybe(0.1):
        parts.append(g.f(0))
    return parts, dim


@case(aten.stack.default)
def stack(g: Gen):
    shape = g.shape(0, 3)
    parts = [g.f(*shape) for _ in range(g.pick(1, 2, 3))]
    return [*parts, parts[0]] if g.maybe(0.2) else parts, g.dim(len(shape) + 1)


@case(aten.pad.default)
def pad(g: Gen):
    x = g.f(*g.shape(3, 4, least=2))
    if g.maybe():
        return x, [g.pick(0, 1) for _ in range(2 * (x.dim() - 2))], g.pick("reflect", "replicate", "circular")
    return x, [g.pick(0, 0, 1, 2, -1) for _ in range(2 * g.r.randint(1, 3))], "constant", 0.5


@case(aten.constant_pad_nd.default)
def constant_pad(g: Gen):
    x = g.any(*g.shape(1, 4, least=2))
    return x, [g.pick(0, 0, 1, -1) for _ in range(2 * g.r.randint(1, x.dim()))], 1


@case(aten.reflection_pad1d.default, aten.replication_pad1d.default)
def pad1d(g: Gen):
    return g.f(*g.shape(2, 3, least=2)), [g.pick(0, 1), g.pick(0, 1)]


@case(aten.reflection_pad2d.default, aten.replication_pad2d.default)
def pad2d(g: Gen):
    return g.f(*g.shape(3, 4, least=2)), [g.pick(0, 1) for _ in range(4)]


@case(aten.index_select.default)
def index_select(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    index = g.i(x.shape[dim]) if g.maybe(0.1) else g.i(x.shape[dim], g.n())
    return x, dim, index


@case(aten.gather.default)
def gather(g: Gen):
    shape = g.shape(0, 3)
    dim = g.dim(max(len(shape), 1))
    return g.f(*shape), dim, g.i(shape[dim] if shape else 1, *_inside(g, shape, dim))


def _inside(g: Gen, shape: list[int], dim: int, free: bool = True) -> list[int]:
    """The shape of an index into a tensor of that shape: along `dim` any, elsewhere at most as large."""
    index = [n if g.maybe(0.8) else g.r.randint(1, n) for n in shape]
    if shape:
        index[dim] = g.n() if free else g.r.randint(1, shape[dim])
    return index


@case(aten.take_along_dim.default)
def take_along_dim(g: Gen):
    shape = g.shape(1, 3)
    dim = g.dim(len(shape))
    x = [n if i == dim % len(shape) or g.maybe(0.8) else 1 for i, n in enumerate(shape)]
    index = [g.n() if i == dim % len(shape) else n if g.maybe(0.8) else 1 for i, n in enumerate(shape)]
    if g.maybe(0.2):
        return g.f(*x), g.i(torch.Size(x).numel(), g.n())
    return g.f(*x), g.i(shape[dim], *index), dim


def _scattered(g: Gen):
    shape = g.shape(0, 3)
    dim = g.dim(max(len(shape), 1))
    inside = _inside(g, shape, dim, free=False)
    return g.f(*shape), dim, _unique(g, shape, inside, dim), g.f(*inside)


def _unique(g: Gen, shape: list[int], inside: list[int], dim: int) -> torch.Tensor:
    """Indices along `dim` that are all different, so that a scatter does not depend on its order."""
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    full = torch.argsort(torch.rand(shape, generator=g.torch), dim=dim)
    return full[tuple(slice(0, n) for n in inside)].contiguous()


case(aten.scatter.src, aten.scatter_add.default)(lambda g: _larger_source(g) if g.maybe(0.3) else _scattered(g))
case(aten.scatter.value)(lambda g: (*_scattered(g)[:3], 0.5))
case(aten.scatter.reduce)(lambda g: ((*_larger_source(g),), {"reduce": "add"}))
case(aten.scatter.value_reduce)(lambda g: ((*_larger_source(g)[:3], 3), {"reduce": "multiply"}))


def _larger_source(g: Gen):
    """Integers, as no gradient is defined here."""
    x, dim, index, _ = _scattered(g)
    return g.i(9, *x.shape), dim, index, g.i(9, *[n if g.maybe(0.8) else n + 2 for n in index.shape])


@case(aten.scatter_reduce.two)
def scatter_reduce(g: Gen):
    shape = g.shape(1, 3)
    dim = g.dim(len(shape))
    inside = _inside(g, shape, dim, free=False)
    index = g.i(shape[dim], *inside)
    return (g.f(*shape), dim, index, g.f(*inside), g.pick("sum", "mean", "amax")), {"include_self": g.maybe()}


def _rows(g: Gen):
    x = g.f(*g.shape(1, 3))
    dim = g.dim(x.dim())
    count = g.r.randint(1, x.shape[dim])
    return x, dim, torch.randperm(x.shape[dim], generator=g.torch)[:count], count


@case(aten.index_add.default, aten.index_copy.default)
def index_add(g: Gen):
    x, dim, index, count = _rows(g)
    shape = list(x.shape)
    shape[dim] = count
    return x, dim, index, g.f(*shape)


case(aten.index_fill.int_Scalar)(lambda g: (*_rows(g)[:3], 0.5))
case(aten.index_fill.int_Tensor)(lambda g: (*_rows(g)[:3], g.f()))


@case(aten.index_put.default, aten._index_put_impl.default)
def index_put(g: Gen):
    x = g.f(*g.shape(1, 3))
    if g.maybe(0.3):
        return (x, [g.b(*x.shape)], g.f()), {}
    k = g.r.randrange(x.dim())
    index = torch.randperm(x.shape[k], generator=g.torch)[: g.r.randint(1, x.shape[k])]
    values = list(x.shape)
    values[k] = len(index)
    return x, [*[None] * k, index], g.f(*g.broadcast(values)), g.maybe()


@case(aten.slice_scatter.default)
def slice_scatter(g: Gen):
    x = g.f(*g.shape())
    dim = g.dim(x.dim())
    start = g.r.randrange(x.shape[dim])
    end = g.r.randint(start + 1, x.shape[dim])
    source = list(x.shape)
    source[dim] = end - start
    return x, g.f(*source), dim, start, end


@case(aten.select_scatter.default)
def select_scatter(g: Gen):
    x = g.f(*g.shape())
    dim = g.dim(x.dim())
    source = list(x.shape)
    del source[dim]
    return x, g.f(*source), dim, g.r.randrange(x.shape[dim])


@case(aten.masked_scatter.default)
def masked_scatter(g: Gen):
    shape = g.shape()
    x = g.f(*shape)
    return x, g.b(*g.broadcast(shape)), g.f(x.numel())


@case(aten.index.Tensor)
def index_or_mask(g: Gen):
    x = g.f(*g.shape(1, 4))
    return (x, [g.b(*x.shape)]) if g.maybe(0.1) else index(g)


@case(aten._unsafe_index.Tensor)
def index(g: Gen):
    x = g.f(*g.shape(1, 4))
    together = g.shape(0, 2)
    used = sorted(g.r.sample(range(x.dim()), g.r.randint(1, x.dim())))
    indices: list[Any] = [None] * (used[-1] + 1)
    for k in used:
        indices[k] = g.i(x.shape[k], *g.broadcast(together), low=-x.shape[k])
    return x, indices


@case(aten.one_hot.default)
def one_hot(g: Gen):
    return g.i(4, *g.shape()), g.pick(4, 6, -1)


# ---- operators that make tensors ----

CASES |= {
    aten.arange.default: lambda g: ((g.n(),), {}),
    aten.arange.start: lambda g: ((2, 2 + g.n()), {}),
    aten.arange.start_step: lambda g: ((1, 1 + 2 * g.n(), 2), {}),
    aten.linspace.default: lambda g: ((0, 1, g.n()), {}),
    aten.linspace.Tensor_Tensor: lambda g: ((g.constant(g.f()), g.constant(g.f()), g.n()), {}),
    aten.linspace.Tensor_Scalar: lambda g: ((g.constant(g.f()), 2, g.n()), {}),
    aten.linspace.Scalar_Tensor: lambda g: ((2, g.constant(g.f()), g.n()), {}),
    aten.logspace.default: lambda g: ((0, 1, g.n()), {}),
    aten.logspace.Tensor_Tensor: lambda g: ((g.constant(g.f()), g.constant(g.f()), g.n()), {}),
    aten.logspace.Tensor_Scalar: lambda g: ((g.constant(g.f()), 2, g.n()), {}),
    aten.logspace.Scalar_Tensor: lambda g: ((2, g.constant(g.f()), g.n()), {}),
    aten.eye.default: lambda g: ((g.n(),), {}),
    aten.eye.m: lambda g: ((g.n(), g.n()), {}),
    aten.scalar_tensor.default: lambda g: ((3,), {}),
    aten.tril_indices.default: lambda g: ((g.n(), g.n()), {}),
    aten.triu_indices.default: lambda g: ((g.n(), g.n()), {}),
    aten.hann_window.default: lambda g: ((g.n(),), {}),
    aten.hann_window.periodic: lambda g: ((g.n(), False), {}),
    aten.full.default: lambda g: ((g.shape(0, 3), 2.5), {}),
    aten.zeros.default: lambda g: ((g.shape(0, 3),), {}),
    aten.ones.default: lambda g: ((g.shape(0, 3),), {"dtype": torch.int64}),
    aten.empty.memory_format: lambda g: ((g.shape(0, 3),), {}),
    aten.new_full.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3), 2), {}),
    aten.new_zeros.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {}),
    aten.new_ones.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {"dtype": torch.int64}),
    aten.new_empty.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {}),
    aten.empty_permuted.default: lambda g: (([g.n(), g.n()], [1, 0]), {}),
    aten.empty_strided.default: lambda g: (([4, 6], [1, 4]), {}),
    aten.new_empty_strided.default: lambda g: ((g.f(*g.shape()), [4, 6], [1, 4]), {}),
}


# ---- convolution, pooling, resampling ----


def _convolution(g: Gen, spatial: int, transposed: bool = False):
    groups = g.pick(1, 1, 2, 3, 4)
    into, out = g.pick(1, 2, 4), g.pick(1, 2, 3, 4)
    lead = [g.pick(1, 2, 4)] if g.maybe(0.85) else []
    space = [g.pick(4, 5, 6) for _ in range(spatial)]
    kernel = [g.pick(1, 2, 3) for _ in range(spatial)]
    x = g.f(*lead, groups * into, *space)
    weight = g.f(groups * into, out, *kernel) if transposed else g.f(groups * out, into, *kernel)
    return x, weight, g.f(groups * out) if g.maybe() else None, groups


for spatial, target in ((1, aten.conv1d.default), (2, aten.conv2d.default), (3, aten.conv3d.default)):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [g.pick(1, 2)] * n, [g.pick(0, 1)] * n, [1] * n, groups))(
            *_convolution(g, n)
        )
    )
for spatial, target in ((1, aten.conv1d.padding), (2, aten.conv2d.padding), (3, aten.conv3d.padding)):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [1] * n, g.pick("same", "valid"), [1] * n, groups))(
            *_convolution(g, n)
        )
    )
for spatial, target in (
    (1, aten.conv_transpose1d.default),
    (2, aten.conv_transpose2d.input),
    (3, aten.conv_transpose3d.input),
):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [g.pick(1, 2)] * n, [0] * n, [0] * n, groups, [1] * n))(
            *_convolution(g, n, True)
        )
    )


@case(aten.convolution.default)
def convolution(g: Gen):
    n, transposed = g.pick(1, 2), g.maybe(0.3)
    x, w, b, groups = _convolution(g, n, transposed)
    if x.dim() == n + 1:
        x = x.unsqueeze(0).contiguous()
    return x, w, b, [1] * n, [0] * n, [1] * n, transposed, [0] * n, groups


def _space(g: Gen, spatial: int, batched: bool = False):
    lead = g.shape(2, 2) if batched or g.maybe(0.7) else g.shape(1, 1)
    return g.f(*lead, *[g.pick(4, 6) for _ in range(spatial)])


for spatial, names in {
    1: ("max_pool1d", "avg_pool1d", "max_pool1d_with_indices"),
    2: ("max_pool2d", "avg_pool2d", "max_pool2d_with_indices"),
    3: ("max_pool3d", "avg_pool3d", "max_pool3d_with_indices"),
}.items():
    for name in names:
        case(getattr(aten, name).default, n=spatial)(
            lambda g, n: (_space(g, n), [g.pick(1, 2, 3)] * n, [g.pick(1, 2)] * n)
        )
for spatial, names in {
    1: ("adaptive_avg_pool1d",),
    2: ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    3: ("adaptive_avg_pool3d", "_adaptive_avg_pool3d"),
}.items():
    for name in names:
        case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n), [g.pick(1, 2, 3)] * n))
case(aten.adaptive_max_pool1d.default)(lambda g: (_space(g, 1), [g.pick(1, 2, 3)]))

for name, spatial in {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
}.items():
    case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n, True), [g.pick(3, 8)] * n))
    case(getattr(aten, name).vec, n=spatial)(lambda g, n: (_space(g, n, True), None, [2.0] * n))
for name, spatial in {
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "upsample_linear1d": 1,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
}.items():
    case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n, True), [g.pick(3, 8)] * n, g.maybe()))
    case(getattr(aten, name).vec, n=spatial)(lambda g, n: (_space(g, n, True), None, g.maybe(), [2.0] * n))

case(aten.pixel_shuffle.default)(lambda g: (g.f(*g.shape(0, 2), 4 * g.pick(1, 2), g.n(), g.pick(1, 2)), 2))
case(aten.pixel_unshuffle.default)(lambda g: (g.f(*g.shape(0, 2), g.n(), 4, 2 * g.pick(1, 2)), 2))
case(aten.channel_shuffle.default)(lambda g: (g.f(g.n(), 2 * g.pick(1, 2, 3), *g.shape(1, 2)), 2))


# ---- recurrence, groups ----


def _recurrent(g: Gen, gates: int, states: int):
    into, hidden, layers, first = g.pick(2, 3), g.pick(2, 4), g.pick(1, 2), g.maybe()
    both, bias = g.maybe(), g.maybe()
    batch, length, ways = g.pick(1, 2, 4, 6), g.pick(1, 3), 2 if both else 1
    x = g.f(*((batch, length) if first else (length, batch)), into)
    weights = []
    for layer in range(layers):
        for _ in range(ways):
            weights += [
                g.f(gates * hidden, into if layer == 0 else ways * hidden),
                g.f(gates * hidden, hidden),
            ]
            weights += [g.f(gates * hidden), g.f(gates * hidden)] if bias else []
    start = [g.f(layers * ways, batch, hidden) for _ in range(states)]
    return x, start if states == 2 else start[0], weights, bias, layers, 0.0, True, both, first


@case(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def grouped_product(g: Gen):
    groups, rows = g.pick(2, 3, 4), g.pick(4, 6, 8)
    ends = sorted(g.r.randint(0, rows) for _ in range(groups - 1))
    offsets = torch.tensor([*ends, rows], dtype=torch.int32)
    single = torch.float32
    return g.f(rows, 32, dtype=single), g.f(groups, 32, g.pick(32, 64), dtype=single), offsets


case(aten.lstm.input)(lambda g: _recurrent(g, 4, 2))
case(aten.gru.input)(lambda g: _recurrent(g, 3, 1))
case(aten.rnn_tanh.input, aten.rnn_relu.input)(lambda g: _recurrent(g, 1, 1))
