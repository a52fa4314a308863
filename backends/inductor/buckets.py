"""buckets: small reductions of gradients started together."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxpar.backends.remat import block_of
from fxpar.backends.transport.base import NCCL, REDUCTION_BYTES, Transport
from fxpar.ops.vocabulary import ALL_REDUCE, GATHER, SCATTER, WAIT, bytes_of

c10d = torch.ops._c10d_functional
COALESCED: dict[Any, Any] = {
    ALL_REDUCE: c10d.all_reduce_coalesced.default,
    SCATTER: c10d.reduce_scatter_tensor_coalesced.default,
    GATHER: c10d.all_gather_into_tensor_coalesced.default,
}
REDUCTIONS = (SCATTER, ALL_REDUCE)


BLOCK_BYTES = 4 * 2**20
"""A bucket of as much need not go on where another block begins: it is large enough to be moved at full speed."""


def bucket_reductions(graph: fx.Graph, limit: int = REDUCTION_BYTES, transport: Transport = NCCL, by_block: bool = False) -> None:
    """Join reductions whose results only leave the graph, in place.

    Takes: a functional graph in its final order. Afterwards: runs of such reductions of one kind over one group, of at most
    `limit` bytes of operands (a larger one is a bucket by itself), are one coalesced operator (one launch, no copies), started
    where the last of them was.
    A bucket of reduce-scatters is waited for when the second after it starts, because its operands are kept until then; what
    is reduced in place is waited for at the end. All members of a bucket are waited for before anything is made of one of them:
    gloo writes the results of all reduce-scatters of a bucket, again, whenever one is waited for (torch 2.11 to 2.13), whatever
    has been made of them in place. Reduce-scatters go by the `transport`. by_block: a bucket of `BLOCK_BYTES` has
    gradients of one block alone, so that equal blocks have equal buckets.
    """
    for kind in REDUCTIONS:
        _bucket_kind(graph, kind, limit, transport, by_block)
    graph.lint()


def _bucket_kind(graph: fx.Graph, kind: Any, limit: int, transport: Transport, by_block: bool) -> None:
    open_buckets: dict[tuple, list[fx.Node]] = {}
    full: list[list[fx.Node]] = []
    for node in [n for n in graph.nodes if n.target is kind and leaves_graph(n) and not _is_reduced_again(n, kind)]:
        key = (*node.args[1:], node.meta["val"].dtype)
        bucket = open_buckets.setdefault(key, [])
        sizes = [bytes_of(n.all_input_nodes[0]) for n in [*bucket, node]]
        if bucket and (sum(sizes) > limit or (by_block and ends_block(bucket[-1], node, sum(sizes[:-1])))):
            full.append(bucket)
            bucket = open_buckets[key] = []
        bucket.append(node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    full = sorted([*full, *open_buckets.values()], key=lambda b: order[b[-1]])
    scatter = kind is SCATTER
    starts = [join(graph, bucket, bucket[-1], transport if scatter else NCCL) for bucket in full]
    output = graph.output_node()
    for k, start in enumerate(starts):
        until = starts[k + 2] if scatter and k + 2 < len(starts) else output
        waits = _waits(start)
        for wait in waits:
            until.prepend(wait)
        for user in [u for wait in waits for u in wait.users if u.op != "output"]:
            _sink(user, until)


def ends_block(last: fx.Node, following: fx.Node, size: int) -> bool:
    """Whether a bucket of `size` bytes, whose last member is `last`, ends with a block."""
    return size >= BLOCK_BYTES and block_of(last) != block_of(following)


def leaves_graph(node: fx.Node) -> bool:
    """Whether the result is waited for and returned, and at most reduced once more before."""
    waits = list(node.users)
    return len(waits) == 1 and waits[0].target is WAIT and all(map(_only_output, waits[0].users))


def _only_output(node: fx.Node) -> bool:
    if node.op == "output" or node.target in REDUCTIONS:
        return node.op == "output" or leaves_graph(node)
    return len(node.all_input_nodes) == 1 and all(map(_only_output, node.users))


def _is_reduced_again(node: fx.Node, kind: Any) -> bool:
    """Whether the result goes into another reduction of this kind, which cannot start together with it."""
    return any(u.target is kind or (u.op != "output" and _is_reduced_again(u, kind)) for u in node.users)


def join(graph: fx.Graph, bucket: list[fx.Node], at: fx.Node, transport: Transport) -> fx.Node:
    """One coalesced operator after `at` in place of the bucket's, by the `transport`; their waits are left where they are."""
    first = bucket[0]
    args: Any = first.args
    group = transport.group(args[-1])
    if len(bucket) == 1:
        first.args = (*args[:-1], group)
        return first
    with graph.inserting_after(at):
        operands = [n.args[0] for n in bucket]
        joined = graph.call_function(COALESCED[first.target], (operands, *args[1:-1], group))
    joined.meta = dict(first.meta)
    joined.meta["val"] = [n.meta["val"] for n in bucket]
    after = joined
    for i, node in enumerate(bucket):
        with graph.inserting_after(after):
            part = graph.call_function(operator.getitem, (joined, i))
        part.meta = dict(node.meta)
        after = part
        node.replace_all_uses_with(part)
    for node in bucket:
        graph.erase_node(node)
    return joined


def _waits(start: fx.Node) -> list[fx.Node]:
    parts = list(start.users) if start.target in COALESCED.values() else [start]
    return [wait for part in parts for wait in part.users]


def _sink(node: fx.Node, until: fx.Node) -> None:
    """Move what follows a wait, and what follows that, to right before `until`."""
    until.prepend(node)
    for user in list(node.users):
        if user.op != "output":
            _sink(user, until)
