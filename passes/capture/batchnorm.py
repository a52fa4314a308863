"""batchnorm: training-mode batch norm spelled as the means it is made of.

Each mean has a rule, so the statistics are those of the *global* batch under any plan, forward and backward,
without a synchronised batch norm of our own.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxpar.ops.unbiased import unbiased
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter

aten = torch.ops.aten


def expand_batch_norm(graph: fx.Graph) -> None:
    """Rewrite, in place, every `batch_norm` that normalises by the batch.

    Takes: a graph as exported, before it is made functional.
    Afterwards: the statistics, the affine map and the updates of the running statistics (``copy_`` into the buffers,
    with the unbiased variance, as PyTorch does) are operators of their own.
    """
    for node in list(graph.nodes):
        if node.target is aten.batch_norm.default and bind(node)["training"]:
            _expand(Rewriter(graph, node), bind(node))
    graph.lint()


def _expand(r: Rewriter, a: dict) -> None:
    x = a["input"]
    shape = [int(n) for n in x.meta["val"].shape]
    dims = [d for d in range(len(shape)) if d != 1]
    wide = r.call(aten.to.dtype, x, torch.float32) if x.meta["val"].dtype in (torch.float16, torch.bfloat16) else x
    mean = r.call(aten.mean.dim, wide, dims, True)
    centred = r.call(aten.sub.Tensor, wide, mean)
    var = r.call(aten.mean.dim, r.call(aten.mul.Tensor, centred, centred), dims, True)
    out = r.call(aten.mul.Tensor, centred, r.call(aten.rsqrt.default, r.call(aten.add.Tensor, var, a["eps"])))
    column = [shape[1]] + [1] * (len(shape) - 2)
    if a["weight"] is not None:
        out = r.call(aten.mul.Tensor, out, r.call(aten.view.default, a["weight"], column))
    if a["bias"] is not None:
        out = r.call(aten.add.Tensor, out, r.call(aten.view.default, a["bias"], column))
    if out.meta["val"].dtype != x.meta["val"].dtype:
        out = r.call(aten.to.dtype, out, x.meta["val"].dtype)
    count = math.prod(shape) // shape[1]
    variance = r.call(unbiased, r.call(aten.detach.default, var), count)
    for buffer, new in ((a["running_mean"], r.call(aten.detach.default, mean)), (a["running_var"], variance)):
        if buffer is not None:
            _update(r, buffer, r.call(aten.view.default, new, [shape[1]]), a["momentum"])
    r.replace(out)


def _update(r: Rewriter, buffer: fx.Node, new: fx.Node, momentum: float) -> None:
    kept = r.call(aten.mul.Tensor, buffer, 1 - momentum)
    r.call(aten.copy_.default, buffer, r.call(aten.add.Tensor, kept, r.call(aten.mul.Tensor, new, momentum)))
