"""cost: floating-point operations of one operator as one rank runs it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.infer.rules.spec import Spec
from fxpar.sharding.factors import Factor, leaves
from fxpar.sharding.layout import Layout, local_shape
from fxpar.sharding.mesh import Mesh

LOOKUPS = (torch.ops.aten.embedding.default,)
GROUPED = (torch.ops.aten._grouped_mm.default, grouped_mm)


def forward_flops(node: fx.Node, spec: Spec, at: Layout, mesh: Mesh) -> int:
    """Multiply-adds count two. A contraction is the product of all the extents it ranges over; attention is two products
    over the pairs of positions it looks at (half of them if causal); each row of a grouped product meets one group's matrix;
    everything else counts nothing."""
    if node.target in ATTENTION:
        return _attention(node, spec, at, mesh)
    if not spec.sums or len(spec.operands) < 2 or node.target in LOOKUPS:
        return 0
    operands = spec.operands[:1] if node.target in GROUPED else spec.operands
    seen: set[Factor] = {f for o in operands if not o.deferred for d in o.dims for f in leaves(d)}
    seen |= {f for d in spec.outs[0] for f in leaves(d)}
    return 2 * math.prod(f.size // mesh.size(*(a for a, g in at.items() if g is f)) for f in seen)


def _attention(node: fx.Node, spec: Spec, at: Layout, mesh: Mesh) -> int:
    q, k, v = (local_shape(o.dims, at, mesh) for o in spec.operands[:3])
    pairs = q[-2] * k[-2]
    window: Any = node.kwargs.get("window")
    if window is not None:
        pairs = q[-2] * min(window, k[-2])
    elif (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        pairs //= 2
    return 2 * math.prod(q[:-2]) * pairs * (q[-1] + v[-1])
