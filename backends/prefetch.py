"""prefetch: parameters gathered in buckets, each while the one before it is in use."""

from __future__ import annotations

import torch
from torch import fx

from fxpar.backends.buckets import BUCKET_BYTES, join
from fxpar.backends.remat import UNSHARD

SMALL_BYTES = 2**20

c10d = torch.ops._c10d_functional
GATHER, WAIT = c10d.all_gather_into_tensor.default, c10d.wait_tensor.default


def prefetch_parameters(graph: fx.Graph, limit: int = BUCKET_BYTES) -> None:
    """Reorder the gathers of parameters in a forward or backward graph, in place.

    Takes: a functional graph in its final order, in which every wait stands before its first use. Afterwards: gathers over one
    group are joined, in the order of their first use, into buckets of at least about `limit` bytes of results, and each bucket
    starts where the one before it is first waited for: at most two are held at a time, and all but the first run beside
    computation. The first comes at the start; or, where little is gathered that was passed in (token ids), after what follows
    from that, up to the next wait, so that neither is held up.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    ready = [n for n in graph.find_nodes(op="call_function", target=GATHER) if _from_input(n)]
    gathers = [n for n in ready if n.meta.get("custom", {}).get(UNSHARD)]
    small = [n for n in ready if n not in gathers and _bytes([n]) < SMALL_BYTES]
    gathers.sort(key=lambda n: order[_wait(n)])
    buckets: list[list[fx.Node]] = []
    for node in gathers:
        if buckets and _alike(buckets[-1][-1], node) and _bytes(buckets[-1]) < limit:
            buckets[-1].append(node)
        else:
            buckets.append([node])
    chains = [dict.fromkeys(n for gather in bucket for n in _chain(gather)) for bucket in (small, *buckets)]
    moved = {n for chain in chains for n in chain}
    first = next(n for n in graph.nodes if n.op != "placeholder" and n not in moved)
    for node in chains[0]:
        first.prepend(node)
    if small:
        early = set(map(_wait, small))
        first = next(n for n in graph.nodes if n.target is WAIT and n not in early)
    anchors = [first, *(_wait(bucket[0]) for bucket in buckets)]
    for bucket, chain, anchor in zip(buckets, chains[1:], anchors, strict=False):
        for node in chain:
            anchor.prepend(node)
        join(graph, bucket, bucket[-1])
    graph.lint()


def _from_input(node: fx.Node) -> bool:
    """Made from one input of the graph alone, such as a stored parameter: no computation has to come before."""
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return a.args[1:] == b.args[1:] and a.meta["val"].dtype == b.meta["val"].dtype


def _bytes(bucket: list[fx.Node]) -> int:
    return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in bucket)


def _wait(gather: fx.Node) -> fx.Node:
    return next(u for u in gather.users if u.target is WAIT)


def _chain(gather: fx.Node) -> list[fx.Node]:
    """A gather and what it is made from, but for the parameter."""
    chain = [gather]
    while chain[0].all_input_nodes[0].op != "placeholder":
        chain.insert(0, chain[0].all_input_nodes[0])
    return chain
