"""trace: the form in which AOTAutograd takes a partitioned program."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.backends.remat import mark
from fxpar.backends.tables import MATERIALIZE, is_table
from fxpar.ops.logsumexp import logsumexp

LOGSUMEXP = torch.ops.aten.logsumexp.default


def tensor_inputs_only(module: fx.GraphModule, example: list[Any], fused: bool = False) -> tuple[fx.GraphModule, list[int]]:
    """A copy of the graph without the placeholders that carry no tensor (captured as constants, and unused).

    example: local inputs, one per placeholder. fused: for a compiler that fuses operators: what many blocks read is materialized,
    and a long logsumexp is cut. The copy's nodes are marked for the passes over the joint graph. Also returns which of the
    inputs it takes.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    feed = iter(example)
    for node in module.graph.nodes:
        if node.op == "placeholder" and not isinstance(next(feed), torch.Tensor):
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        copies[node].meta["custom"] = mark(node)
        if fused and node.target is LOGSUMEXP and node.args[1:] == ([-1],):
            copies[node].target, copies[node].args = logsumexp, copies[node].args[:1]
        if fused and is_table(node):
            copies[node] = graph.call_function(MATERIALIZE, (copies[node],))
    keep = [i for i, x in enumerate(example) if isinstance(x, torch.Tensor)]
    return fx.GraphModule(module, graph), keep
