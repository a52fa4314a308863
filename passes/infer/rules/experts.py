"""Rules of mixtures of experts, whose rows are in the order of their experts (see passes/canonical/experts.py).

Such rows have the factors of the rows that were sorted, ``tokens k``, and are in an order of their own: a rank that has some of
the batch's rows sorts those alone. That makes a part of the result only if no operator between the sort and its inverse has other
rows. So of them the batch alone may be split, and it is at all of these operators or at none (`Spec.order`).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpar.ops.experts import expert_product, group_ends, order_of, put_back, take_rows
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.passes.infer.rules.matmul import grouped_parts
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Spec, einsum
from fxpar.sharding.factors import leaves
from fxpar.sharding.facts import global_value


@rule(order_of)
def order(op: Op) -> Spec:
    (ids,) = op.tensors()
    return Spec(op.operands(), [op.dims(ids)], order=op.node)


@rule(take_rows)
def take(op: Op) -> Spec:
    """Each row of the operand stands for as many as `times` says."""
    args: Any = op.node.args
    x, places, times = args
    rows, own = op.dim(places, 0), op.dims(x)
    spec = Spec(op.operands(), [(rows, *own[1:])])
    if not op.factors.align((*own[0], *op.factors.new(times)), rows):
        spec.replicated.update(own[0], rows)
    return _ordered(spec, op, places)


@rule(put_back)
def back(op: Op) -> Spec:
    x, places = op.tensors()
    spec = Spec(op.operands(), [(op.dim(places, 0), *op.dims(x)[1:])])
    if not op.factors.align(op.dim(x, 0), op.dim(places, 0)):
        spec.replicated.update(op.dim(x, 0), op.dim(places, 0))
    return _ordered(spec, op, places)


@rule(expert_product)
def product(op: Op) -> Spec:
    """Experts stay whole; the matrices' own dims are parallel."""
    x, weights, experts, places = op.tensors()
    spec = einsum(op, "t k, e! k n, t, t -> t n", [x, weights, experts, places])
    spec.sums = set(op.dim(x, 1))
    spec.replicated |= grouped_parts(op, x, weights)
    spec.emit = _emit_product
    return _ordered(spec, op, places)


def _emit_product(local):
    x, weights, experts, _ = local.args
    count = int(local.op.shape(local.op.tensors()[1])[0])
    return local.call(grouped_mm, x, weights, local.call(group_ends, experts, count))


def _ordered(spec: Spec, op: Op, places: fx.Node) -> Spec:
    """An operator on rows in the order `places`. What it cannot split of them is whole at every operator on such rows; so are
    all, where it is not known what they were sorted by."""
    rows = op.dim(places, 0)
    if places.target is not order_of:
        spec.replicated.update(rows)
        return spec
    spec.order = places
    if {f for s in spec.replicated for f in s.leaves()} & set(leaves(rows)):
        sort = global_value(places).spec
        assert sort is not None
        sort.replicated.update(rows)
    return spec
