"""transfers: the operators of a graph that bring parameters in and take gradients out, which stand between those that compute.

A block in the middle of a model has the gathers of a later block begin, and gradients of an earlier one be waited for. The
blocks at both ends do not, and compute the same nevertheless.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxpar import compat
from fxpar.backends.remat import PRODUCTS
from fxpar.ops.vocabulary import WAITS, is_attention_kernel

GATHERED, REDUCED, TAKEN_OUT = "gathered", "reduced", "taken out"
"""Collectives of what the graph was given, with what makes their operands; collectives whose results leave the graph; and what
follows from those."""


def transfers_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """The operators that are such a transfer, and which kind: `GATHERED`, `REDUCED` or `TAKEN_OUT`.

    Takes: a graph in its final order. An operator that also computes something else than a transfer is none.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    given = {*graph.find_nodes(op="placeholder")}
    for node in nodes:
        apart = is_start(node) or is_kernel(node) or node.target in WAITS
        if not apart and all(n in given for n in node.all_input_nodes):
            given.add(node)
    kinds: dict[fx.Node, str] = {}
    for start in filter(is_start, nodes):
        parts = [u for u in start.users if u.target is operator.getitem]
        if all(n in given for n in start.all_input_nodes):
            kinds |= dict.fromkeys([start, *parts], GATHERED)
        elif (after := _only_leaves(start)) is not None:
            kinds |= dict.fromkeys(after, TAKEN_OUT) | dict.fromkeys([start, *parts], REDUCED)
    for node in reversed(nodes):
        if node in given and node.users and all(kinds.get(u) == GATHERED for u in node.users):
            kinds[node] = GATHERED
    return kinds


def transfers_before_products(graph: fx.Graph) -> None:
    """Have transfers stand right before operators that are kernels by themselves, in place.

    Takes: a functional graph in its final order. Afterwards: transfers that stood side by side stand as late as before the
    next matrix product or attention, unless something needs them earlier; where none follows, they stay. So a graph that is cut
    around them is cut where no kernel would have gone on.
    """
    kinds = transfers_of(graph)
    stretch: list[fx.Node] = []
    for node in list(graph.nodes):
        if node in kinds:
            stretch.append(node)
        elif stretch and (is_kernel(node) or compat.mutates(node.target) or any(n in stretch for n in node.all_input_nodes)):
            for moved in stretch if node.op != "output" else ():
                node.prepend(moved)
            stretch = []
    graph.lint()


def is_kernel(node: fx.Node) -> bool:
    """Whether an operator is a kernel by itself, which others are not computed in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.overloadpacket in PRODUCTS or is_attention_kernel(target.overloadpacket.__name__)


def is_start(node: fx.Node) -> bool:
    """Whether an operator begins a collective, which another one waits for."""
    of_torch = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional"
    return of_torch and node.target not in WAITS and not compat.mutates(node.target)


def _only_leaves(start: fx.Node) -> set[fx.Node] | None:
    """What follows from a collective, if that is computed from nothing else and leaves the graph; None if not."""
    after: set[fx.Node] = set()
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node.op == "output" or node in after:
            continue
        if is_start(node):
            return None
        after.add(node)
        waiting += node.users
    return after if all(n in after or n is start for node in after for n in node.all_input_nodes) else None
