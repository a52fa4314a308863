"""The operators and properties of values that several passes and backends speak of."""

from __future__ import annotations

import torch
from torch import fx

from fxpar.ops.attention import windowed_attention
from fxpar.ops.random import drawn
from fxpar.ops.rng import dropout_mask

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

SDPA = aten.scaled_dot_product_attention.default
ATTENTION = (SDPA, windowed_attention)
"""Attention in a program; in what Inductor compiles it is a kernel whose name begins with `ATTENTION_KERNEL`."""
ATTENTION_KERNEL = "_scaled_dot_product"
DRAWN = (dropout_mask, drawn)
"""What takes its random numbers from a counter: by its `grid` it knows which elements of the global tensor it makes."""
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
"""The same elements in the same order, in another shape."""
GATHER, SCATTER = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default
ALL_REDUCE, WAIT = c10d.all_reduce.default, c10d.wait_tensor.default
"""What the typed collectives are in what Inductor compiles: each is started, and waited for."""


def is_view(node: fx.Node) -> bool:
    """Whether the operator says of itself that its result is its operand's memory."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def bytes_of(node: fx.Node) -> int:
    """The size of the tensor that a node holds."""
    return node.meta["val"].nbytes
