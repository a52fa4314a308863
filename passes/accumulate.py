"""accumulate: the variant of a local program that leaves gradients unsummed over dp, for gradient accumulation."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpar.mesh import Axes
from fxpar.ops import collectives
from fxpar.program import Program, Source


def defer_sums(program: Program, axes: Axes) -> tuple[fx.GraphModule, list[Source]]:
    """Leave the sums of parameter gradients over `axes` to the caller.

    Takes: a partitioned program (left as it is). Returns its graph with one more placeholder, appended at the end, per
    parameter that is used in a way that varies over `axes`, and the source of each: the caller passes the same local
    parameter again, and what arrives as its gradient is this rank's part, still to be summed over `axes`. Uses that
    do not vary keep the first placeholder, whose gradient is complete.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    params = {n: s for n, s in program.source_of().items() if s.kind == "param"}
    again: dict[fx.Node, fx.Node] = {}
    extra: list[Source] = []
    last = program.placeholders()[-1]
    varied = {n: chain for n in program.graph.nodes if (chain := _from_parameter(n, params, axes))}
    for node in program.graph.nodes:
        if node in varied:
            copies[node] = _rebuild(graph, node, varied[node], again, axes)
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node is last:
            for chain in varied.values():
                if chain[0] not in again:
                    again[chain[0]] = graph.placeholder(f"{chain[0].name}_varying")
                    extra.append(params[chain[0]])
    return fx.GraphModule(program.module, graph), extra


def _from_parameter(node: fx.Node, params: dict[fx.Node, Source], axes: Axes) -> list[fx.Node]:
    """For a `vary` over some of `axes` of a parameter (through casts and views): the chain from the parameter to it."""
    args: Any = node.args
    if node.target is not collectives.vary or not set(axes) & set(args[1]):
        return []
    chain = [node]
    while chain[0] not in params:
        if chain[0].op != "call_function" or len(chain[0].all_input_nodes) != 1:
            return []
        chain.insert(0, chain[0].all_input_nodes[0])
    return chain


def _rebuild(
    graph: fx.Graph, vary: fx.Node, chain: list[fx.Node], again: dict[fx.Node, fx.Node], axes: Axes
) -> fx.Node:
    made = {chain[0]: again[chain[0]]}
    for link in chain[1:-1]:
        made[link] = graph.node_copy(link, lambda n: made[n])
    value = made[chain[-2]]
    rest = tuple(a for a in vary.args[1] if a not in axes)
    return graph.call_function(collectives.vary, (value, rest)) if rest else value
