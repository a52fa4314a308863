"""Rules of operators that make tensors: every rank can make its part, or the full tensor."""

from __future__ import annotations

import torch
from torch import fx

from fxpar.ops.random import drawn
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Spec

aten = torch.ops.aten


@rule(aten.arange, aten.linspace, aten.eye, aten.scalar_tensor.default, aten.tril_indices.default,
      aten.triu_indices.default, aten.logspace, aten.hann_window)  # fmt: skip
def made_replicated(op: Op) -> Spec:
    """Made in full on every rank and sliced where a part is needed (small, and never communicated)."""
    dims = op.factors.fresh(op.out.shape)
    return Spec(op.operands(), [dims], replicated={f for d in dims for f in d})


@rule(aten.full, aten.zeros, aten.ones, aten.empty, aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty,
      aten.empty_permuted, aten.empty_strided, aten.new_empty_strided)  # fmt: skip
def constant(op: Op) -> Spec:
    """The same value everywhere, so any part can be made in place."""
    dims = op.factors.fresh(op.out.shape)
    if op.target in (aten.empty_permuted.default, aten.empty_strided.default, aten.new_empty_strided.default):
        return Spec([], [dims], replicated={f for d in dims for f in d})
    return Spec([], [dims], sizes={"size": dims})


@rule(drawn)
def random(op: Op) -> Spec:
    """Each element depends on its global index alone; the local program offsets the index."""
    return Spec([], [op.factors.fresh(op.out.shape)], emit=_emit_drawn)


def _emit_drawn(local) -> fx.Node:
    """The same numbers, told where in the global tensor the local elements lie."""
    (dims,) = local.spec.outs
    return local.call(drawn, local.shape(dims), local.args[1], **local.kwargs, grid=local.grid(dims))
