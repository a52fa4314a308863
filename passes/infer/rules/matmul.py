"""Rules of matrix products, lookups and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.errors import UnsupportedOperator
from fxpar.ops.attention import windowed_attention
from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.pick import pick
from fxpar.ops.vocabulary import ATTENTION
from fxpar.ops.within import within
from fxpar.passes.infer.rules.registry import notation, rule
from fxpar.passes.infer.rules.spec import Op, Operand, Spec, einsum, unknown
from fxpar.program import user_line
from fxpar.sharding.factors import Dim, Factor, extent
from fxpar.sharding.facts import local_value

aten = torch.ops.aten

notation("m k, k n -> m n", aten.mm.default)
notation("b m k, b k n -> b m n", aten.bmm.default)
notation("m k, k -> m", aten.mv.default)
notation("k, k -> ", aten.dot.default, aten.vdot.default)
notation("m, n -> m n", aten.outer.default, aten.ger.default)


@rule(aten.linear.default)
def linear(op: Op) -> Spec:
    spec = einsum(op, "... i, o i, +o -> ... o")
    spec.emit = _emit_linear
    return spec


def _emit_linear(local):
    """The rows of a product may come in any order: where they were gathered, or will be scattered, along a dim that is
    not the first, they come in that dim's order, so that neither needs a copy."""
    at = local.exchanged_dim()
    if not at or at >= len(local.spec.outs[0]) - 1:
        return local.default()
    first = local.call(aten.movedim.int, local.args[0], at, 0)
    return local.call(aten.movedim.int, local.call(aten.linear.default, first, *local.args[1:]), 0, at)


@rule(aten.addmm.default)
def addmm(op: Op) -> Spec:
    bias, x, w = op["self"], op["mat1"], op["mat2"]
    added = _last("m n", len(op.dims(bias)))
    return _product_and_bias(op, einsum(op, f"m k, k n, {added} -> m n", [x, w, bias]), aten.mm.default)


@rule(aten.baddbmm.default)
def baddbmm(op: Op) -> Spec:
    nodes = [op["batch1"], op["batch2"], op["self"]]
    added = _last("b m n", len(op.dims(op["self"])))
    return _product_and_bias(op, einsum(op, f"b m k, b k n, {added} -> b m n", nodes), aten.bmm.default)


def _last(letters: str, rank: int) -> str:
    """The notation of a bias of `rank` dims that broadcasts to `letters`."""
    return "+" + " ".join(letters.split()[len(letters.split()) - rank :])


def _product_and_bias(op: Op, spec: Spec, product: Any) -> Spec:
    """The product alone where the bias has to wait for a pending sum (with factors, the sum is not split)."""
    if op["alpha"] != 1 or op["beta"] != 1:
        spec.replicated |= spec.sums
    spec.emit = lambda local: local.call(product, *local.args[1:3]) if local.skip_deferred else local.default()
    return spec


@rule(aten.matmul.default)
def matmul(op: Op) -> Spec:
    a, b = op["self"], op["other"]
    left = "k" if len(op.dims(a)) == 1 else "... m k"
    right = "k" if len(op.dims(b)) == 1 else "... k n"
    lead = "... " if left != "k" or right != "k" else ""
    result = lead + " ".join(c for c, t in (("m", left), ("n", right)) if t != "k")
    return einsum(op, f"{left}, {right} -> {result}", [a, b])


@rule(aten.einsum.default)
def einsum_op(op: Op) -> Spec:
    equation, nodes = op["equation"].replace(" ", ""), op["tensors"]
    left, _, right = equation.partition("->")
    if not right or "..." in equation or any(len(set(t)) != len(t) for t in left.split(",")):
        return unknown(op)
    spaced = ", ".join(" ".join(t) for t in left.split(","))
    return einsum(op, f"{spaced} -> {' '.join(right)}", nodes)


@rule(aten._grouped_mm.default, grouped_mm)
def grouped_product(op: Op) -> Spec:
    """Rows of `x` in groups, one matrix for each: rows and groups stay replicated, the matrices' own dims are parallel, in pieces
    of 16 bytes (also where it is computed in two bytes an element): the kernels take no others."""
    x, weights, *rest = op.tensors()
    if len(op.dims(x)) != 2 or len(op.dims(weights)) != 3:
        return unknown(op)
    spec = einsum(op, "t! k, e! k n -> t n", [x, weights])
    spec.sums -= set(op.dim(weights, 0))
    spec.operands += [Operand(n, op.dims(n)) for n in rest]
    spec.replicated |= {f for n in rest for d in op.dims(n) for f in d}
    spec.replicated |= grouped_parts(op, x, weights)
    if op.target is not grouped_mm:
        spec.emit = _emit_grouped
    return spec


def grouped_parts(op: Op, x: fx.Node, weights: fx.Node) -> set[Factor]:
    """What must stay whole for the parts of a grouped product's rows to be multiples of 16 bytes."""
    return _inner(op, op.dim(x, 1), 8) | _inner(op, op.dim(weights, 2), 8)


def _inner(op: Op, dim: Dim, size: int) -> set[Factor]:
    """The factors that have to stay replicated for a part of `dim` to be a multiple of `size`."""
    inner = op.factors.new(size)
    outer = op.factors.new(max(extent(dim) // size, 1))
    if extent(dim) % size or not op.factors.align(dim, (*outer, *inner)):
        return set(dim)
    return set(inner)


def _emit_grouped(local):
    """The kernels want rows of 16 bytes: what a gather left transposed is copied, and so is such a cotangent."""
    x, weights, *rest = (
        local.call(aten.contiguous.default, a) if isinstance(a, fx.Node) and local_value(a).resharded else a
        for a in local.args
    )
    made = local.call(local.op.target, x, weights, *rest, **local.kwargs)
    flat = local.call(aten.reshape.default, made, [-1])  # its backward makes the cotangent contiguous
    return local.call(aten.reshape.default, flat, local.shape(local.spec.outs[0]))


RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@rule(*RECURRENT)
def recurrent(op: Op) -> Spec:
    """Only the batch is parallel: each step needs all of the one before it."""
    if op["dropout"] and op["train"] and op["num_layers"] > 1:
        raise UnsupportedOperator(
            str(op.target),
            where=user_line(op.node),
            way_out=(
                "the dropout between its layers would depend on the plan: use one-layer modules with torch.nn.Dropout "
                "between them"
            ),
        )
    x, states = op["input"], op["hx"]
    states = [states] if isinstance(states, fx.Node) else list(states)
    at = 0 if op["batch_first"] else 1
    batch, rest = op.dim(x, at), [d for i, d in enumerate(op.dims(x)) if i != at]
    spec = Spec(op.operands(), [], replicated={f for d in rest for f in d})
    for node in op.tensors():
        dims = list(op.dims(node))
        if node in states:
            if dims[1] and not op.factors.align(batch, dims[1]):
                spec.replicated.update(batch, dims[1])
            dims[1] = ()
        if node is not x:
            spec.replicated.update(f for d in dims for f in d)
    for i, value in enumerate(op.outs()):
        made = list(op.factors.fresh(value.shape))
        made[at if i == 0 else 1] = ()
        spec.replicated.update(f for d in made for f in d)
        made[at if i == 0 else 1] = batch
        spec.outs.append(tuple(made))
    return spec


@rule(aten.embedding.default)
def embedding(op: Op) -> Spec:
    """A table lookup; split over its rows each rank looks up what it has, and the sum is pending.

    Whether there are such rows is checked in every layout: compilers count negative ones from the end.
    """
    table, ids = op["weight"], op["indices"]
    spec = einsum(op, "v d, ... -> ... d", [table, ids])
    spec.emit, spec.leading = _emit_embedding, [op.dim(table, 0)]
    if op["scale_grad_by_freq"]:  # the gradient depends on how often an id occurs in all of the batch
        spec.replicated |= {f for d in (op.dim(table, 0), *op.dims(ids)) for f in d}
    return spec


def _emit_embedding(local):
    weight, ids, *rest = local.args
    ids = local.call(within, ids, extent(local.spec.operands[0].dims[0]))
    offset = local.offset(local.spec.operands[0].dims[0])
    if offset is None:
        return local.call(aten.embedding.default, weight, ids, *rest, **local.kwargs)
    rows = local.extent(local.spec.operands[0].dims[0])
    at = local.call(aten.sub.Tensor, ids, offset)
    mine = local.call(aten.logical_and.default, local.call(aten.ge.Scalar, at, 0), local.call(aten.lt.Scalar, at, rows))
    safe = local.call(aten.where.ScalarOther, mine, at, 0)
    padding = rest[0] if rest else -1
    if padding >= 0:
        missing = local.call(aten.eq.Scalar, ids, padding)
        mine_grad = local.call(aten.logical_not.default, missing)
        found = local.call(aten.embedding.default, weight, safe)
        keep = local.call(aten.unsqueeze.default, local.call(aten.logical_and.default, mine, mine_grad), -1)
        plain = local.call(aten.detach.default, found)
        frozen = local.call(aten.where.self, keep, found, plain)
        return local.call(aten.where.ScalarOther, local.call(aten.unsqueeze.default, mine, -1), frozen, 0.0)
    found = local.call(aten.embedding.default, weight, safe)
    return local.call(aten.where.ScalarOther, local.call(aten.unsqueeze.default, mine, -1), found, 0.0)


@rule(pick)
def pick_one(op: Op) -> Spec:
    """``x[..., index]``: split over the last dim each rank picks what it has, and the sum is pending."""
    x, index = op.tensors()
    spec = einsum(op, "... v, ... -> ...", [x, index])
    spec.emit, spec.leading = _emit_pick, [op.dims(x)[-1]]
    return spec


def _emit_pick(local):
    x, index = local.args
    index = local.call(within, index, extent(local.spec.operands[0].dims[-1]))
    offset = local.offset(local.spec.operands[0].dims[-1])
    return local.call(pick, x, index if offset is None else local.call(aten.sub.Tensor, index, offset))


@rule(*ATTENTION)
def attention(op: Op) -> Spec:
    """Batch and heads are parallel; so is the query length where no implicit (causal) mask ties it to the keys."""
    args: Any = op.node.args
    q, k, v = args[:3]
    mask = op["attn_mask"] if op.target is not windowed_attention else None
    tied = op.target is windowed_attention or bool(op["is_causal"] or op["window"])
    grouped = bool(op["enable_gqa"]) and op.shape(q)[-3] != op.shape(k)[-3]
    if len(op.dims(q)) != 4 or len(op.dims(k)) != 4 or len(op.dims(v)) != 4:
        return _attention_any_rank(op, q, k, v, mask)
    length = "q!" if tied else "q"
    if not grouped:
        spec = einsum(op, f"b h {length} d!, b h k! d!, b h k! e -> b h q e", [q, k, v])
    else:
        spec = einsum(op, f"b h {length} d!, b j k! d!, b j k! e -> b h q e", [q, k, v])
        spec.sums.clear()
        spec.maxes.clear()
        _group_heads(op, spec, q, k)
    spec.sums.clear()
    if isinstance(mask, fx.Node):
        _mask_operand(op, spec, mask)
    if op.target is dropout_attention:
        spec.leading, spec.emit = [spec.outs[0][2]], _emit_dropout
    return spec


def _emit_dropout(local) -> fx.Node:
    """The same weights drop out, wherever in the global tensor the local ones lie."""
    return local.call(dropout_attention, *local.args, **local.kwargs, grid=local.grid(local.spec.outs[0][:3]))


def _group_heads(op: Op, spec: Spec, q: fx.Node, k: fx.Node) -> None:
    """Query heads are (key/value heads, group): the major part is the key/value heads themselves."""
    heads, kv = op.dim(q, 1), op.dim(k, 1)
    group = op.factors.new(extent(heads) // max(extent(kv), 1))
    if not op.factors.align(heads, (*kv, *group)):
        spec.replicated.update(heads, kv)


def _mask_operand(op: Op, spec: Spec, mask: fx.Node) -> None:
    """An explicit mask broadcasts to [..., q, k]."""
    dims, keys, rows = op.dims(mask), spec.operands[1].dims[-2], spec.outs[0][:-1]
    for have, want in zip(reversed(dims), (keys, *reversed(rows)), strict=False):
        if have and not op.factors.align(want, have):
            spec.replicated.update(have, want)
    spec.operands.append(Operand(mask, dims))


def _attention_any_rank(op: Op, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> Spec:
    spec = einsum(op, "... q! d!, ... k! d!, ... k! e -> ... q e", [q, k, v])
    spec.sums.clear()
    if isinstance(mask, fx.Node):
        _mask_operand(op, spec, mask)
    return spec
