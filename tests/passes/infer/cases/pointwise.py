"""Random arguments for pointwise operators and dropout."""

from __future__ import annotations

from typing import Any

import torch

from fxpar.ops.before import before
from fxpar.ops.rng import dropout_mask
from fxpar.ops.surrogate import attach, fixed
from fxpar.ops.unbiased import unbiased
from tests.harness import Gen
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


@case(aten.to.dtype)
def cast(g: Gen):
    return g.any(*g.shape()), g.pick(torch.float64, torch.float32, torch.int64, torch.bool)


def loss(target, *rest, between_0_and_1: bool = False):
    """A loss that compares two tensors, without a reduction."""

    @case(target)
    def arguments(g: Gen):
        shape = g.shape()
        x, y = g.f(*shape), g.constant(torch.sigmoid(g.f(*shape)))
        return torch.sigmoid(x) if between_0_and_1 else x, y, *rest


for _target in (aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.soft_margin_loss, aten.kl_div):
    loss(_target.default, 0)
loss(aten.binary_cross_entropy.default, None, 0, between_0_and_1=True)
loss(aten.poisson_nll_loss.default, True, False, 1e-8, 0)
loss(aten.hinge_embedding_loss.default, 1.0, 0)


@case(aten.binary_cross_entropy_with_logits.default)
def logits_loss(g: Gen):
    shape = g.shape()
    weight = [g.constant(g.positive(*shape[-1:])) if g.maybe() else None for _ in range(2)]
    return g.f(*shape), g.constant(torch.sigmoid(g.f(*shape))), *weight, 0


@case(aten.margin_ranking_loss.default)
def ranking_loss(g: Gen):
    shape = g.shape()
    return g.f(*shape), g.f(*shape), g.constant(g.f(*shape).sign()), 0.5, 0


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


def pair(g: Gen, make):
    shape = g.shape()
    return make(*g.broadcast(shape)), make(*g.broadcast(shape))


@case(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor)
def bits(g: Gen):
    return pair(g, g.b if g.maybe() else lambda *s: g.i(16, *s))


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
    return pair(g, lambda *s: g.positive(*s))


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
    return pair(g, lambda *s: g.i(9, *s, low=1))


@case(aten.floor_divide.Scalar)
def floor_divide_scalar(g: Gen):
    return g.i(50, *g.shape()), 3


@case(aten.divide.Tensor_mode)
def divide_mode(g: Gen):
    return pair(g, lambda *s: g.i(20, *s, low=1)), {"rounding_mode": "floor"}


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


case(before)(lambda g: (g.constant(g.f(*g.shape())),))


@case(unbiased)
def variance(g: Gen):
    return g.constant(g.positive(*g.shape())), g.pick(1, 2, 8)


@case(attach)
def attached(g: Gen):
    shape = g.shape()
    return g.f(*shape), g.f(*shape)


case(fixed)(lambda g: (g.f(*g.shape()),))
