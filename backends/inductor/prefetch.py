"""prefetch: parameters gathered in buckets, each while those before it are in use."""

from __future__ import annotations

import itertools

from torch import fx

from fxpar.backends.inductor.buckets import REDUCTIONS, ends_block, join, leaves_graph
from fxpar.backends.inductor.casts import cast_together, concatenation, gather_casts
from fxpar.backends.remat import UNSHARD
from fxpar.backends.transport.base import BUCKET_BYTES, NCCL, Transport
from fxpar.ops.vocabulary import GATHER, WAIT, bytes_of

FIRST_BYTES, SMALL_BYTES = 16 * 2**20, 2**20
LEAD = 2
"""How many buckets are under way while one is in use."""


def prefetch_parameters(graph: fx.Graph, limit: int = BUCKET_BYTES, transport: Transport = NCCL,
                        by_block: bool = False) -> None:
    """Reorder the gathers of parameters in a forward or backward graph, in place.

    Takes: a functional graph in its final order, in which every wait stands before its first use. Afterwards: gathers over one
    group are joined, in the order of their first use, into buckets of at most `limit` bytes of results (a larger one, or more
    that are concatenated, are a bucket by themselves), and each bucket starts where the one `LEAD` before it is first waited
    for: at most ``LEAD + 1`` are held at a time, and all but the first run beside computation. The first is small, so that
    computation starts soon, and comes at the start; or, where little is gathered that was passed in (token ids), after what
    follows from that, up to the next wait. The second starts once all of the first has been waited for, the third where the
    second is waited for; both no later than the first gradients are reduced, which would keep them waiting. Casts in a bucket
    are one operator, or part of the gather. Gathers go by the `transport`. by_block: see `bucket_reductions`.
    """
    for gather in graph.find_nodes(op="call_function", target=GATHER):
        if _from_input(gather):
            _own_chain(graph, gather)
    order = {n: i for i, n in enumerate(graph.nodes)}
    ready = [n for n in graph.find_nodes(op="call_function", target=GATHER) if _from_input(n)]
    gathers = [n for n in ready if n.meta.get("custom", {}).get(UNSHARD)]
    small = [n for n in ready if n not in gathers and _bytes([n]) < SMALL_BYTES]
    gathers.sort(key=lambda n: order[_wait(n)])
    buckets = _buckets(gathers, limit, by_block)
    chains = [dict.fromkeys(n for gather in bucket for n in _chain(gather)) for bucket in (small, *buckets)]
    moved = {n for chain in chains for n in chain}
    stay = [n for n in graph.nodes if n.op != "placeholder" and n not in moved]
    for node in chains[0]:
        stay[0].prepend(node)
    anchors = _anchors(stay, order, set(map(_wait, small)), buckets)
    for chain, anchor in zip(chains[1:], anchors, strict=True):
        for node in chain:
            anchor.prepend(node)
    for bucket in buckets:
        if not gather_casts(graph, bucket, transport):
            cast_together(graph, [n.all_input_nodes[0] for n in bucket])
            join(graph, bucket, bucket[-1], transport)
    graph.lint()


def _anchors(stay: list[fx.Node], order: dict[fx.Node, int], early: set[fx.Node], buckets: list[list[fx.Node]]) -> list[fx.Node]:
    """Before which of the nodes that stay each bucket starts. early: waits for what comes before the first."""
    if not buckets:
        return []
    first = next((n for n in stay if n.target is WAIT and n not in early), stay[0]) if early else stay[0]
    last = max(order[_wait(n)] for n in buckets[0])
    second = next(n for n in stay if n.op == "output" or order[n] > last)
    reduction = next((n for n in stay if n.target in REDUCTIONS and leaves_graph(n)), stay[-1])
    waits = [_wait(bucket[0]) for bucket in buckets[1:]]
    soon = [min(n, reduction, key=order.__getitem__) for n in (second, *waits[: LEAD - 1])]
    return [first, *soon, *waits][: len(buckets)]


def _buckets(gathers: list[fx.Node], limit: int, by_block: bool) -> list[list[fx.Node]]:
    """Gathers that are concatenated stay together."""
    buckets: list[list[fx.Node]] = []
    for _, group in itertools.groupby(gathers, key=lambda n: concatenation(n)[1] or n):
        nodes = list(group)
        room = min(limit, FIRST_BYTES) if len(buckets) == 1 else limit
        ends = by_block and bool(buckets) and ends_block(buckets[-1][-1], nodes[0], _bytes(buckets[-1]))
        if buckets and not ends and _alike(buckets[-1][-1], nodes[0]) and _bytes([*buckets[-1], *nodes]) <= room:
            buckets[-1] += nodes
        else:
            buckets.append(nodes)
    return buckets


def _from_input(node: fx.Node) -> bool:
    """Made from one input of the graph alone, such as a stored parameter: neither computation nor communication has to come
    before."""
    while len(node.all_input_nodes) == 1 and node.target is not WAIT:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _own_chain(graph: fx.Graph, gather: fx.Node) -> None:
    """Make what a gather is made from its own, in place: what something else uses, too (a cast table that is also looked up in),
    is computed once more for the gather, so that it can move with it."""
    made = gather
    while (operand := made.all_input_nodes[0]).op != "placeholder":
        if len(operand.users) > 1:
            with graph.inserting_before(made):
                own = graph.node_copy(operand, lambda n: n)
            made.replace_input_with(operand, own)
            operand = own
        made = operand


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return a.args[1:] == b.args[1:] and a.meta["val"].dtype == b.meta["val"].dtype


def _bytes(bucket: list[fx.Node]) -> int:
    return sum(map(bytes_of, bucket))


def _wait(gather: fx.Node) -> fx.Node:
    return next(u for u in gather.users if u.target is WAIT)


def _chain(gather: fx.Node) -> list[fx.Node]:
    """A gather and what it is made from, but for the parameter."""
    chain = [gather]
    while chain[0].all_input_nodes[0].op != "placeholder":
        chain.insert(0, chain[0].all_input_nodes[0])
    return chain
