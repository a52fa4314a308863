"""tables: what every block reads and nothing is learned from (rotary tables, masks) is computed once.

Inductor writes a value that is cheap to compute into each kernel that reads it. For a table that means its sines and cosines
once more for every head of every layer, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxpar.program import block_path
from fxpar.sharding.facts import local_value


def _materialize(x: Tensor) -> Tensor:
    return x.clone()


_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("materialize(Tensor x) -> Tensor")
_library.impl("materialize", _materialize, "CompositeExplicitAutograd")
torch.library.register_fake("fxpar::materialize", _materialize, lib=_library)
MATERIALIZE = torch.ops.fxpar.materialize.default
"""Its operand, in memory of its own: no compiler looks into it."""


def is_table(node: fx.Node) -> bool:
    """Whether a node of a partitioned program is a floating-point value outside of all blocks that several of them read, and
    through which no gradient flows."""
    if node.op != "call_function" or local_value(node).needs_grad or local_value(node).sharding is None or block_path(node):
        return False
    return local_value(node).dtype.is_floating_point and len({block_path(u) for u in node.users} - {""}) > 1
