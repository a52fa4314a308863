"""buckets: small reductions of gradients started together."""

from __future__ import annotations

import operator

import torch
from torch import fx

c10d = torch.ops._c10d_functional
BUCKET_BYTES = 128 * 2**20


def bucket_reductions(graph: fx.Graph, limit: int = BUCKET_BYTES) -> None:
    """Join all-reduces whose results only leave the graph, in place.

    Takes: a functional graph in its final order. Afterwards: runs of such all-reduces over one group, of at most about
    `limit` bytes, are one ``all_reduce_coalesced`` (one launch, no copies), started where the last of them was.
    """
    open_buckets: dict[tuple, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is c10d.all_reduce.default and _leaves(node):
            key = (*node.args[1:], node.meta["val"].dtype)
            bucket = open_buckets.setdefault(key, [])
            bucket.append(node)
            if sum(_bytes(n) for n in bucket) >= limit:
                _join(graph, open_buckets.pop(key))
    for bucket in open_buckets.values():
        _join(graph, bucket)
    graph.lint()


def _leaves(node: fx.Node) -> bool:
    """Whether the result is waited for and returned, and nothing else."""
    waits = list(node.users)
    return (
        len(waits) == 1 and waits[0].target is c10d.wait_tensor.default and all(_only_output(u) for u in waits[0].users)
    )


def _only_output(node: fx.Node) -> bool:
    return node.op == "output" or (len(node.all_input_nodes) == 1 and all(_only_output(u) for u in node.users))


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()


def _join(graph: fx.Graph, bucket: list[fx.Node]) -> None:
    if len(bucket) < 2:
        return
    last = bucket[-1]
    with graph.inserting_after(last):
        joined = graph.call_function(c10d.all_reduce_coalesced.default, ([n.args[0] for n in bucket], *last.args[1:]))
    joined.meta["val"] = [n.meta["val"] for n in bucket]
    output, after = graph.output_node(), joined
    for i, node in enumerate(bucket):
        with graph.inserting_after(after):
            part = graph.call_function(operator.getitem, (joined, i))
        part.meta = dict(node.meta)
        after = part
        wait = next(iter(node.users))
        wait.replace_input_with(node, part)
        _sink(wait, output)
        graph.erase_node(node)


def _sink(node: fx.Node, output: fx.Node) -> None:
    """Move a wait, and what follows it, to the end: it must not come before the joined start."""
    output.prepend(node)
    for user in list(node.users):
        if user.op != "output":
            _sink(user, output)
