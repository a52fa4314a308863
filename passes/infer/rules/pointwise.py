"""Rules of operators that compute each element from the elements at the same place.

What PyTorch tags as pointwise needs no entry here (see `registry.spec_for`); these lack the tag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.ops.before import before
from fxpar.ops.rng import dropout_mask
from fxpar.ops.surrogate import attach, fixed
from fxpar.ops.unbiased import unbiased
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Operand, Spec, elementwise, unknown

aten = torch.ops.aten

UNTAGGED = (
    aten.to, aten._to_copy, aten.detach, aten.alias, aten.contiguous, aten.lift_fresh_copy, aten.where,
    aten.masked_fill, aten.fill, aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like, aten.__and__,
    aten.__or__, aten.__xor__, aten.rsub, aten.true_divide, aten.floor_divide, aten.not_equal, aten.hardswish,
    aten.log_sigmoid, aten.multiply, aten.divide, aten.subtract, aten.greater, aten.greater_equal, aten.less,
    aten.less_equal, aten.negative, aten.absolute, aten.fix, aten.special_expit, aten.special_erf, aten.polar,
    aten.complex, aten.ldexp, aten.conj, aten._conj, aten.imag, aten.real, aten.resolve_conj,
)  # fmt: skip


@rule(before, unbiased, *(getattr(p, o) for p in UNTAGGED for o in p.overloads() if (p, o) != (aten.where, "default")))
def pointwise(op: Op) -> Spec:
    return elementwise(op)


@rule(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
      aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
      aten.kl_div.default, aten.poisson_nll_loss.default, aten.hinge_embedding_loss.default,
      aten.margin_ranking_loss.default)  # fmt: skip
def loss(op: Op) -> Spec:
    """Without a reduction, which canonical/losses has taken out."""
    return elementwise(op) if op["reduction"] == 0 else unknown(op)


@rule(aten.type_as.default, aten.to.other)
def like(op: Op) -> Spec:
    """The second operand only says which dtype."""
    return elementwise(op, [op["self"]])


@rule(aten.isin.Tensor_Scalar, aten.bucketize.Tensor)
def first_only(op: Op) -> Spec:
    """Pointwise in the first operand; a second one (boundaries) is a table that stays replicated."""
    first, *tables = op.tensors()
    spec = elementwise(op, [first])
    for node in tables:
        spec.replicated.update(f for d in op.dims(node) for f in d)
        spec.operands.append(op.operands()[op.tensors().index(node)])
    return spec


@rule(aten.prelu.default)
def prelu(op: Op) -> Spec:
    """One slope per channel (dim 1), or one for all."""
    x, weight = op.tensors()
    spec = elementwise(op, [x])
    channel = op.dim(x, 1) if len(op.dims(x)) > 1 else ()
    if op.dims(weight)[0] and not op.factors.align(channel, op.dim(weight, 0)):
        spec.replicated.update(channel, op.dim(weight, 0))
    spec.operands.append(op.operands()[1])
    return spec


@rule(aten.glu.default)
def glu(op: Op) -> Spec:
    """The halves of one dim are multiplied: its factors are (2, rest) and the rest stays."""
    (x,) = op.tensors()
    dims, at = list(op.dims(x)), op["dim"] % len(op.dims(x))
    halves, rest = op.factors.new(2), op.factors.new(op.shape(x)[at] // 2)
    spec = Spec(op.operands(), [], replicated=set(halves))
    if not op.factors.align(dims[at], (*halves, *rest)):
        spec.replicated.update(dims[at], rest)
    dims[at] = rest
    spec.outs = [tuple(dims)]
    return spec


@rule(dropout_mask)
def counter_dropout(op: Op) -> Spec:
    """Each element's mask depends on its global index alone; the local program offsets the index."""
    x: Any = op.node.args[0]
    spec = Spec(
        [Operand(x, op.dims(x))], [tuple(d if n != 1 else () for d, n in zip(op.dims(x), op.out.shape, strict=True))]
    )
    spec.emit = _emit_dropout
    return spec


def _emit_dropout(local) -> fx.Node:
    """The same mask, told where in the global tensor the local elements lie."""
    x, seed = local.args[:2]
    return local.call(dropout_mask, x, seed, **local.kwargs, grid=local.grid(local.spec.outs[0]))


@rule(attach, fixed)
def surrogate(op: Op) -> Spec:
    """A gradient that does not follow from the value: it belongs to the same elements."""
    return elementwise(op)
