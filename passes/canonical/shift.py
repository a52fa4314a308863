"""shift: losses of all tokens, where a model leaves out the last (or first) one, for which there is no label."""

from __future__ import annotations

import torch
from torch import fx

from fxpar.ops.vocabulary import RESHAPES
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter, remove_unread
from fxpar.program import Program

aten = torch.ops.aten
FLAT = (*RESHAPES, aten.flatten.using_ints)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.to.dtype)
NONE = 0


def label_all_tokens(program: Program) -> Program:
    """Rewrite, in place, ``cross_entropy(x[:, :-1].flatten(0, 1), labels)`` to one of all of `x`, whose last tokens are ignored.

    Takes: a functional program. Afterwards: a reduced cross-entropy of class numbers whose logits lack one end of a dim before
    they are flattened takes them with it, and labels that say `ignore_index` there: the same value and gradients. So the logits
    keep the length that everything before them has, and stay split along it: what is moved by one token are the labels.
    """
    for node in list(program.graph.nodes):
        if node.target is aten.cross_entropy_loss.default:
            _label_all(program, node)
    remove_unread(program.graph)
    return program


def _label_all(program: Program, node: fx.Node) -> None:
    a = bind(node)
    x, labels = a["self"], a["target"]
    cut = _cut(x)
    if cut is None or a["reduction"] == NONE or labels.meta["val"].is_floating_point():
        return
    whole, dim, start, dtypes = cut
    *lead, classes = whole.meta["val"].shape
    lead[dim] -= 1
    r = Rewriter(program.graph, node)
    pads = [0, 0] * (len(lead) - 1 - dim) + [start, 1 - start]
    labels = r.call(aten.constant_pad_nd.default, r.call(aten.reshape.default, labels, lead), pads, a["ignore_index"])
    rows = r.call(aten.reshape.default, whole, [-1, classes])
    for dtype in dtypes:
        rows = r.call(aten.to.dtype, rows, dtype)
    node.args = (rows, r.call(aten.reshape.default, labels, [-1]), *node.args[2:])


def _cut(x: fx.Node) -> tuple[fx.Node, int, int, list[torch.dtype]] | None:
    """If `x` is rows of classes, the flattened leading dims of a tensor without one end: that tensor, its dim, the number of
    elements that lack at the beginning (0 or 1, of the one that lacks), and what it is cast to, in order."""
    if x.meta["val"].dim() != 2:
        return None
    flattened = False
    dtypes: list[torch.dtype] = []
    while x.target in COPIES or (x.target in FLAT and not flattened):
        flattened = flattened or x.target in FLAT
        before: fx.Node = bind(x)["self"]
        if before.meta["val"].dtype != x.meta["val"].dtype:
            dtypes.insert(0, x.meta["val"].dtype)
        x = before
    if not flattened or x.target is not aten.slice.Tensor:
        return None
    a = bind(x)
    whole: fx.Node = a["self"]
    shape, dim = whole.meta["val"].shape, a["dim"] % whole.meta["val"].dim()
    if a["step"] != 1 or dim == len(shape) - 1 or x.meta["val"].shape[dim] != shape[dim] - 1:
        return None
    return whole, dim, int((a["start"] or 0) == 1), dtypes
