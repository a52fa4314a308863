"""transfers: activations exchanged by copies between GPUs, beside computation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GATHER, SCATTER, WAIT = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default, c10d.wait_tensor.default
PRODUCTS = (aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default)
LEAST_BYTES = 2**20
"""Of the larger side of a collective; NCCL starts a smaller one sooner."""


def copy_activations(graph: fx.Graph, bulk: Mapping[str, str], least: int = LEAST_BYTES) -> None:
    """Have gathers and scattered sums of activations go over groups of `bulk`, in place.

    Takes: a functional graph in its final order, whose parameters and gradients are already in buckets. bulk: name of a
    group -> that which communicates over it instead. Afterwards: those of `least` bytes or more do, and if no matrix product
    stands between the start of one and its first use, though the nearest before does not lead to it (a gradient of a
    weight), then that stands there, with what follows from it: copies take nothing away from a product beside them.
    """
    starts = [n for n in graph.nodes if n.target in (GATHER, SCATTER) and n.args[-1] in bulk and _bytes(n) >= least]
    for start in starts:
        *args, group = start.args
        if start.target is GATHER or args[1] == "sum":
            start.args = (*args, bulk[str(group)])
            _hide(graph, start)
    graph.lint()


def _hide(graph: fx.Graph, start: fx.Node) -> None:
    nodes = list(graph.nodes)
    at = nodes.index(start)
    until = min(nodes.index(user) for user in start.users)
    if any(n.target in PRODUCTS for n in nodes[at:until]):
        return
    before = nodes[:at]
    needed = _needed(start)
    for k in range(len(before) - 1, -1, -1):
        if before[k].target in PRODUCTS and before[k] not in needed:
            moved = {before[k]}
            for node in before[k + 1 :]:
                if not moved.isdisjoint(node.all_input_nodes):
                    moved.add(node)
            after = start
            for node in (n for n in before[k:] if n in moved):
                after.append(node)
                after = node
            return


def _needed(node: fx.Node) -> set[fx.Node]:
    """What a node is made from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack += new
    return found


def _bytes(node: fx.Node) -> int:
    sides = [node.meta["val"], node.all_input_nodes[0].meta["val"]]
    return max(value.numel() * value.element_size() for value in sides)
