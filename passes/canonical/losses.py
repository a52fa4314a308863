"""losses: cross-entropy and its relatives, spelled so that classes and tokens can be split.

A cross-entropy is ``logsumexp(x) - x[label]`` per row, then a mean over the rows that count: each of these
operators has a rule, so a vocabulary-parallel loss and a global token mean need nothing of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from fxpar.ops.pick import pick
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter, remove_unread
from fxpar.program import Program

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def expand_losses(program: Program) -> Program:
    """Rewrite, in place, every loss operator with a reduction built in.

    Afterwards: no cross_entropy_loss, nll_loss or reducing elementwise loss remains; what replaces them has the same
    value and gradients up to rounding, including ``ignore_index``, class weights, label smoothing and
    class probabilities as targets. Of 16-bit logits they are computed in float32 and rounded at the end, as PyTorch's own
    kernels do it: the number of labels is no number of 16 bits.
    """
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        build = BUILDERS.get(node.target)
        if build is not None:
            build(Rewriter(program.graph, node), node)
        elif node.target in ELEMENTWISE and bind(node)["reduction"] != NONE:
            _elementwise(Rewriter(program.graph, node), node)
    remove_unread(program.graph)
    return program


def _classes_last(r: Rewriter, x: fx.Node) -> fx.Node:
    """[n, c, ...] -> [n, ..., c], in float32 at least."""
    if x.meta["val"].is_floating_point() and x.meta["val"].dtype.itemsize < 4:
        x = r.call(aten.to.dtype, x, torch.float32)
    rank = x.meta["val"].dim()
    return r.call(aten.permute.default, x, [0, *range(2, rank), 1]) if rank > 2 else x


def _cross_entropy(r: Rewriter, node: fx.Node) -> None:
    a = bind(node)
    x, target = a["self"], a["target"]
    if target.meta["val"].is_floating_point():
        _soft_cross_entropy(r, a)
        return
    x = _classes_last(r, x)
    lse = r.call(aten.logsumexp.default, x, [-1])
    valid, safe = _valid(r, target, a["ignore_index"])
    loss = r.call(aten.sub.Tensor, lse, r.call(pick, x, safe))
    weights = _row_weights(r, a["weight"], safe)
    loss = loss if weights is None else r.call(aten.mul.Tensor, loss, weights)
    smoothing = a["label_smoothing"]
    if smoothing:
        classes = x.meta["val"].shape[-1]
        even = _even(r, x, lse, a["weight"], classes)
        loss = r.call(
            aten.add.Tensor,
            r.call(aten.mul.Tensor, loss, 1 - smoothing),
            r.call(aten.mul.Tensor, even, smoothing / classes),
        )
    _reduce_rows(r, loss, valid, weights, a["reduction"])


def _even(r: Rewriter, x: fx.Node, lse: fx.Node, weight: fx.Node | None, classes: int) -> fx.Node:
    """The sum over classes of ``-log p`` (weighted)."""
    if weight is None:
        return r.call(aten.sub.Tensor, r.call(aten.mul.Tensor, lse, classes), r.call(aten.sum.dim_IntList, x, [-1]))
    rows = r.call(aten.mul.Tensor, lse, r.call(aten.sum.default, weight))
    return r.call(aten.sub.Tensor, rows, r.call(aten.sum.dim_IntList, r.call(aten.mul.Tensor, x, weight), [-1]))


def _soft_cross_entropy(r: Rewriter, a: dict) -> None:
    x, target = _classes_last(r, a["self"]), _classes_last(r, a["target"])
    smoothing, weight = a["label_smoothing"], a["weight"]
    if smoothing:
        target = r.call(
            aten.add.Tensor, r.call(aten.mul.Tensor, target, 1 - smoothing), smoothing / x.meta["val"].shape[-1]
        )
    if weight is not None:
        target = r.call(aten.mul.Tensor, target, weight)
    lse = r.call(aten.logsumexp.default, x, [-1])
    share = r.call(aten.mul.Tensor, lse, r.call(aten.sum.dim_IntList, target, [-1]))
    loss = r.call(aten.sub.Tensor, share, r.call(aten.sum.dim_IntList, r.call(aten.mul.Tensor, target, x), [-1]))
    if a["reduction"] == NONE:
        _replace(r, loss)
        return
    total = r.call(aten.sum.default, loss)
    rows = loss.meta["val"].numel()
    _replace(r, total if a["reduction"] == SUM else r.call(aten.div.Tensor, total, rows))


def _nll(r: Rewriter, node: fx.Node) -> None:
    a = bind(node)
    x = _classes_last(r, a["self"])
    valid, safe = _valid(r, a["target"], a["ignore_index"])
    loss = r.call(aten.neg.default, r.call(pick, x, safe))
    weights = _row_weights(r, a["weight"], safe)
    loss = loss if weights is None else r.call(aten.mul.Tensor, loss, weights)
    _reduce_rows(r, loss, valid, weights, a["reduction"])


def _nll_forward(r: Rewriter, node: fx.Node) -> None:
    """`nll_loss_forward` returns (loss, total weight); only the first is ever read."""
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            r = Rewriter(r.graph, user)
            user.args = node.args
            user.kwargs = node.kwargs
            user.target = aten.nll_loss.default
            _nll(r, user)


def _valid(r: Rewriter, target: fx.Node, ignore: int) -> tuple[fx.Node, fx.Node]:
    """(which rows count, the target with the others' class replaced by 0)."""
    valid = r.call(aten.ne.Scalar, target, ignore)
    return valid, r.call(aten.where.ScalarOther, valid, target, 0)


def _replace(r: Rewriter, value: fx.Node) -> None:
    """`value`, in the dtype of what it replaces."""
    dtype = r.node.meta["val"].dtype
    r.replace(value if value.meta["val"].dtype is dtype else r.call(aten.to.dtype, value, dtype))


def _row_weights(r: Rewriter, weight: fx.Node | None, safe: fx.Node) -> fx.Node | None:
    if weight is None:
        return None
    table = r.call(aten.unsqueeze.default, weight, 1)
    return r.call(aten.squeeze.dim, r.call(aten.embedding.default, table, safe), -1)


def _reduce_rows(r: Rewriter, loss: fx.Node, valid: fx.Node, weights: fx.Node | None, reduction: int) -> None:
    loss = r.call(aten.where.ScalarOther, valid, loss, 0.0)
    if reduction == NONE:
        _replace(r, loss)
        return
    total = r.call(aten.sum.default, loss)
    if reduction == MEAN:
        if weights is None:
            counted = r.call(aten.to.dtype, valid, loss.meta["val"].dtype)
        else:
            counted = r.call(aten.where.ScalarOther, valid, weights, 0.0)
        total = r.call(aten.div.Tensor, total, r.call(aten.sum.default, counted))
    _replace(r, total)


def _elementwise(r: Rewriter, node: fx.Node) -> None:
    """``loss(..., reduction=mean)`` -> mean(loss(..., reduction=none))."""
    a = bind(node)
    reduction = a["reduction"]
    a["reduction"] = NONE
    schema = node.target._schema.arguments
    each = r.call(
        node.target,
        *(a[s.name] for s in schema if not s.kwarg_only),
        **{s.name: a[s.name] for s in schema if s.kwarg_only},
    )
    r.replace(r.call(aten.mean.default if reduction == MEAN else aten.sum.default, each))


BUILDERS: dict[object, Callable[[Rewriter, fx.Node], None]] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss.default: _nll,
    aten.nll_loss2d.default: _nll,
    aten.nll_loss_nd.default: _nll,
    aten.nll_loss_forward.default: _nll_forward,
}
ELEMENTWISE = (aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
               aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
               aten.soft_margin_loss.default, aten.kl_div.default, aten.poisson_nll_loss.default,
               aten.hinge_embedding_loss.default, aten.margin_ranking_loss.default)  # fmt: skip
