"""Rules of mixtures of experts, whose rows are in the order of their experts (see passes/canonical/experts.py).

A mixture is the dense ``t h, e h f -> e t f`` of which few pairs (e, t) are there. Sorted rows are one dim, with the factors

    experts  tokens slots  share

of which the share says how many of the pairs are there (see fxpar/sharding/factors.py). So experts are a batch of the products,
which splits without a sum, and are summed where rows go back to their tokens. Rows are in an order of their own: what `place`
decides of them, where they are sorted, holds for all that is made of them (see passes/place/experts.py).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpar.ops.experts import (
    combine,
    expert_product,
    expert_rows,
    experts_here,
    group_ends,
    of_mine,
    order_of,
    order_of_mine,
    places,
    product_of_mine,
    put_back,
    sort_experts,
    take_mine,
    take_rows,
)
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.passes.infer.rules.matmul import grouped_parts
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Spec
from fxpar.sharding.factors import Dim, extent, leaves, share_of


def parts_of(rows: Dim) -> tuple[Dim, Dim]:
    """The experts and the slots of tokens that rows stand for; of rows in another order, none and all."""
    share = share_of(rows)
    if share is None:
        return (), tuple(rows)
    experts: list[Any] = []
    rest = [f for f in leaves(rows) if f is not share]
    while extent(experts) < share.of:
        experts.append(rest.pop(0))
    return tuple(experts), tuple(rest)


@rule(order_of)
def order(op: Op) -> Spec:
    (ids,) = op.tensors()
    count: Any = op.node.args[1]
    experts = op.factors.new(count)
    spec = Spec(op.operands(), [((*experts, *op.dim(ids, 0), *op.factors.share(count)),)], by_token=True)
    spec.emit = lambda local: local.call(
        order_of_mine, local.args[0], local.offset(experts), local.extent(experts), count) \
        if local.axes(experts) else local.default()
    return spec


@rule(take_rows)
def take(op: Op) -> Spec:
    """Each row of the operand stands for as many as `times` says."""
    args: Any = op.node.args
    x, places, times = args
    rows, own = op.dim(places, 0), op.dims(x)
    spec = Spec(op.operands(), [(rows, *own[1:])])
    experts, slots = parts_of(rows)
    if not op.factors.align((*own[0], *op.factors.new(times)), slots):
        spec.replicated.update(own[0], slots)
    spec.emit = lambda local: local.call(take_mine if local.axes(experts) else take_rows, *local.args)
    return _by_token(spec, op, places)


@rule(sort_experts)
def sorted_experts(op: Op) -> Spec:
    """They are what says, where rows are exchanged, which go where."""
    ids, places = op.tensors()
    rows = op.dim(places, 0)
    spec = Spec(op.operands(), [(rows,)])
    experts, slots = parts_of(rows)
    if not op.factors.align(op.dim(ids, 0), slots):
        spec.replicated.update(op.dim(ids, 0), slots)

    def emit(local: Any) -> fx.Node:
        made: fx.Node = local.call(take_mine, *local.args, 1) if local.axes(experts) else local.default()
        share = share_of(rows)
        if share is not None:
            local.owner.reshard.sorted_by(share, made)
        return made

    spec.emit = emit
    return _by_token(spec, op, places)


@rule(put_back)
def back(op: Op) -> Spec:
    x, places = op.tensors()
    experts, slots = parts_of(op.dim(places, 0))
    spec = Spec(op.operands(), [(slots, *op.dims(x)[1:])], sums=set(experts))
    return _back(spec, op, x, places, experts)


@rule(combine)
def combined(op: Op) -> Spec:
    x, places, *scores = op.tensors()
    times: Any = op.node.args[2]
    experts, slots = parts_of(op.dim(places, 0))
    tokens, each = op.factors.new(extent(slots) // times), op.factors.new(times)
    spec = Spec(op.operands(), [(tokens, *op.dims(x)[1:])], sums={*experts, *each})
    if not op.factors.align((*tokens, *each), slots):
        spec.replicated.update(tokens, slots)
    for node in scores:
        if not op.factors.align(op.dim(node, 0), slots):
            spec.replicated.update(op.dim(node, 0), slots)
    return _back(spec, op, x, places, experts)


def _back(spec: Spec, op: Op, x: fx.Node, order: fx.Node, experts: Dim) -> Spec:
    if not op.factors.align(op.dim(x, 0), op.dim(order, 0)):
        spec.replicated.update(op.dim(x, 0), op.dim(order, 0))

    def emit(local: Any) -> fx.Node:
        rows, at, *rest = local.args
        if not local.axes(experts):
            made: fx.Node = local.default()
            return made
        made = local.call(op.target, local.call(of_mine, rows, at), local.call(places, at), *rest)
        return made

    spec.emit = emit
    return _by_token(spec, op, order)


@rule(expert_product)
def product(op: Op) -> Spec:
    """Rows and experts are its batch; the matrices' own dims are parallel."""
    x, weights, ids = op.tensors()
    rows, (groups, inner, outer) = op.dim(x, 0), op.dims(weights)
    spec = Spec(op.operands(), [(rows, outer)], sums=set(inner))
    experts = _of_experts(spec, op, ids, groups)
    for one, other in ((rows, op.dim(ids, 0)), (op.dim(x, 1), inner)):
        if not op.factors.align(one, other):
            spec.replicated.update(one, other)
    spec.replicated |= grouped_parts(op, x, weights)

    def emit(local: Any) -> fx.Node:
        rows, matrices, numbers = local.args
        count = local.extent(groups)
        ends = local.call(group_ends, _here(local, numbers, experts), count)
        all_rows = local.axes(experts) and not local.owner.reshard.exchanges(share_of(op.dim(ids, 0)))
        made: fx.Node = local.call(product_of_mine, rows, matrices, ends, local.ranks(experts)) if all_rows else \
            local.call(grouped_mm, rows, matrices, ends)
        return made

    spec.emit = emit
    return spec


@rule(expert_rows)
def table(op: Op) -> Spec:
    table, ids = op.tensors()
    groups, *rest = op.dims(table)
    spec = Spec(op.operands(), [(op.dim(ids, 0), *rest)])
    experts = _of_experts(spec, op, ids, groups)
    spec.emit = lambda local: local.call(expert_rows, local.args[0], _here(local, local.args[1], experts))
    return spec


def _of_experts(spec: Spec, op: Op, ids: fx.Node, groups: Dim) -> Dim:
    """The experts that a dim of a parameter and the rows of `ids` share; none, and all of them whole, where they share none."""
    experts, _ = parts_of(op.dim(ids, 0))
    if experts and op.factors.align(groups, experts):
        return experts
    spec.replicated.update(groups, experts)
    return ()


def _here(local: Any, ids: fx.Node, experts: Dim) -> fx.Node:
    """The numbers of experts among those that this rank has."""
    if not local.axes(experts):
        return ids
    made: fx.Node = local.call(experts_here, ids, local.offset(experts), local.extent(experts))
    return made


def _by_token(spec: Spec, op: Op, order: fx.Node) -> Spec:
    """An operator between tokens and rows in the order `order`; where it is not known what was sorted, rows stay whole."""
    spec.by_token = True
    if order.target is not order_of:
        spec.replicated.update(op.dim(order, 0))
    return spec
