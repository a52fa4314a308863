"""reductions: how Inductor lays out what it sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def mend_reductions() -> None:
    """Have Inductor lay out the operands of `all_reduce_coalesced`, in place or not, as the graph has them, and densely.

    Inductor reduces in place, and lays out what it reduces as it likes: transposed, or as a part of a wider product. What waits
    for it wants the graph's strides, so it is copied once more: before the wait, while it is being summed (torch 2.11 to 2.15).
    """
    from torch._inductor import ir
    from torch._inductor.lowering import clone, lowerings
    from torch._inductor.virtualized import V

    c10d = torch.ops._c10d_functional
    in_place = lowerings[c10d.all_reduce_coalesced_.default]

    def dense(x: Any, strides: Sequence[int]) -> Any:
        order = ir.get_stride_order(strides)
        return ir.ExternKernel.require_exact_strides(x, ir.FlexibleLayout.stride_ordered(x.get_size(), order))

    def reduce_(inputs: list[Any], *args: Any) -> Any:
        nodes: Any = V.graph.current_node.args[0]
        return in_place([dense(x, node.meta["val"].stride()) for x, node in zip(inputs, nodes, strict=True)], *args)

    lowerings[c10d.all_reduce_coalesced.default] = lambda inputs, *args: reduce_([clone(x) for x in inputs], *args)
    lowerings[c10d.all_reduce_coalesced_.default] = reduce_
