"""The operators and properties of values that several passes and backends speak of."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxpar.ops.attention import windowed_attention
from fxpar.ops.dropout_attention import attend, attend_backward, dropout_attention
from fxpar.ops.parts import NEXT_PART
from fxpar.ops.random import drawn
from fxpar.ops.rng import dropout_mask

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

SDPA = aten.scaled_dot_product_attention.default
ATTENTION = (SDPA, windowed_attention, dropout_attention)
"""Attention in a program; in what Inductor compiles it is a kernel, of which `is_attention_kernel` knows the name."""
DRAWN = (dropout_mask, dropout_attention, drawn)
"""What draws from the counter-based generators: its ``grid`` says where the local elements lie."""
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
"""The same elements in the same order, in another shape."""
GATHER, SCATTER = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default
ALL_REDUCE, WAIT = c10d.all_reduce.default, c10d.wait_tensor.default
"""What the typed collectives are in what Inductor compiles: each is started, and waited for."""
WAITS = (WAIT, NEXT_PART)
"""What waits for a collective, or for a part of its result, and returns its operand."""


def is_view(node: fx.Node) -> bool:
    """Whether the operator says of itself that its result is its operand's memory."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def is_attention_kernel(name: str) -> bool:
    """Whether operators of this name (without overload) are kernels of attention, forward or backward."""
    return name.startswith("_scaled_dot_product") or name in [op.overloadpacket.__name__ for op in (attend, attend_backward)]


ROWS = 4096
"""What a size counts for that is known only when a graph runs: what PyTorch's partitioner takes it for, too."""


def bytes_of(node: fx.Node) -> int:
    """The size of the tensor that a node holds."""
    return tensor_bytes(node.meta["val"])


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Its size, or an estimate of it where that depends on values."""
    return math.prod(n if isinstance(n, int) else ROWS for n in tensor.shape) * tensor.dtype.itemsize
