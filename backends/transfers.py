"""transfers: activations exchanged by copies between GPUs, beside computation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import fx

from fxpar.ops.vocabulary import GATHER, SCATTER, bytes_of

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default)
LEAST_BYTES = 2**20
"""Of the larger side of a collective."""


def copy_activations(graph: fx.Graph, bulk: Mapping[str, str], least: int = LEAST_BYTES) -> None:
    """Have gathers and scattered sums of activations go over groups of `bulk`, in place.

    Takes: a functional graph in its final order, whose parameters and gradients are already in buckets. bulk: name of a
    group -> that which communicates over it instead. Afterwards: those of `least` bytes or more do, beside which a matrix
    product runs: one that stands between the start and the first use; or the nearest before that does not lead to it (a
    gradient of a weight), which then stands there, with what follows from it. Copies take nothing away from a product beside
    them. What is waited for at once is left to NCCL, whose one kernel the host starts sooner than several copies.
    """
    starts = [n for n in graph.nodes if n.target in (GATHER, SCATTER) and n.args[-1] in bulk and _bytes(n) >= least]
    beside = {n: _beside(n) for n in starts if n.target is GATHER or n.args[1] == "sum"}
    for start, product in beside.items():
        if product is None:
            taken = {*(n for n, p in beside.items() if p is not None), *beside.values()}
            beside[start] = product = _hide(start, taken)
        if product is not None:
            *args, group = start.args
            start.args = (*args, bulk[str(group)])
    graph.lint()


def _beside(start: fx.Node) -> fx.Node | None:
    """A product between the start of a collective and its first use."""
    node = start.next
    while node not in start.users and node.op != "output":
        if node.target in PRODUCTS:
            return node
        node = node.next
    return None


def _hide(start: fx.Node, taken: set[fx.Node | None]) -> fx.Node | None:
    """Move the nearest product before that does not lead to it, and what follows from that, behind the start. None if there is
    none, without `taken` nodes."""
    before = list(itertools.takewhile(lambda n: n is not start, start.graph.nodes))
    needed = _needed(start)
    for k in reversed(range(len(before))):
        if before[k].target in PRODUCTS and before[k] not in needed:
            moved = {before[k]: None}
            for node in before[k + 1 :]:
                if not moved.keys().isdisjoint(node.all_input_nodes):
                    moved[node] = None
            if taken.isdisjoint(moved):
                after = start
                for node in moved:
                    after.append(node)
                    after = node
                return before[k]
    return None


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
    return max(bytes_of(node), bytes_of(node.all_input_nodes[0]))
