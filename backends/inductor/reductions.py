"""reductions: sums over leading dims are made without dims of size 1."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


def drop_kept_dims(graph: fx.Graph) -> None:
    """Have reductions over leading dims leave those out, and views put them back, in place.

    Takes: a functional graph. Afterwards: no sum, maximum or minimum over dims other than the last keeps them as size 1; who
    read one that did reads a view of the same shape. Inductor of PyTorch 2.11 may compute such a reduction together with one over
    the last dim ("mix order reduction"), and then returns a tensor without the kept dims: a norm's gradient of its weight is one,
    which leaves a graph with them where a backward is cut in halves behind it.
    """
    for node in [n for n in graph.nodes if n.target in REDUCTIONS and _keeps_leading_dims(n)]:
        with graph.inserting_before(node):
            flat = graph.call_function(node.target, (*node.args[:2], False), dict(node.kwargs))
            view = graph.call_function(aten.view.default, (flat, list(node.meta["val"].shape)))
        flat.meta = {**node.meta, "val": node.meta["val"].squeeze(_dims(node))}
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view)
        graph.erase_node(node)
    graph.lint()


def _dims(node: fx.Node) -> tuple[int, ...]:
    """The dims that are named; none are where it is over all of them (None, or an empty list)."""
    dims = node.args[1] if len(node.args) > 1 else ()
    rank = node.all_input_nodes[0].meta["val"].dim()
    return tuple(d % rank for d in dims if isinstance(d, int)) if isinstance(dims, list | tuple) else ()


def _keeps_leading_dims(node: fx.Node) -> bool:
    dims = _dims(node)
    return len(node.args) > 2 and node.args[2] is True and bool(dims) and node.meta["val"].dim() - 1 not in dims
