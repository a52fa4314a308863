"""fp32_products: gradients that are summed in float32 are computed in it."""

from __future__ import annotations

import torch
from torch import fx

from fxpar.backends.inductor.buckets import REDUCTIONS, leaves_graph
from fxpar.backends.inductor.casts import CAST, origin

aten = torch.ops.aten
NARROW = (torch.bfloat16, torch.float16)


def accumulate_in_fp32(graph: fx.Graph, as_on_gpu: bool = False) -> None:
    """Have matrix products write the dtype in which their result is summed over ranks, in place.

    Takes: a functional graph. Afterwards: where a reduction whose result only leaves the graph takes a product of
    bfloat16 or float16 matrices on a GPU that was cast to float32 and has no other use, the product is written in float32: it
    is accumulated in that in any case, and neither rounded nor read and written once more. as_on_gpu: whatever the device.
    """
    for reduction in [n for n in graph.nodes if n.target in REDUCTIONS and leaves_graph(n)]:
        value = origin(reduction.all_input_nodes[0])
        if _is_cast_product(value, as_on_gpu):
            product = value.all_input_nodes[0]
            with graph.inserting_before(product):
                wide = graph.call_function(aten.mm.dtype, (*product.args, torch.float32))
            wide.meta = {**product.meta, "val": value.meta["val"]}
            value.replace_all_uses_with(wide)
            graph.erase_node(value)
            graph.erase_node(product)
    graph.lint()


def _is_cast_product(node: fx.Node, as_on_gpu: bool) -> bool:
    if node.target is not CAST or node.args[1] is not torch.float32 or len(node.users) > 1:
        return False
    product = node.all_input_nodes[0]
    narrow = product.meta["val"]
    there = as_on_gpu or narrow.device.type == "cuda"
    return there and product.target is aten.mm.default and len(product.users) == 1 and narrow.dtype in NARROW
