"""kept: whether the forward pass of a model with more blocks keeps, in each of them, what it keeps with few.

AOTAutograd's partitioner decides that for all of a joint graph at once: values that the backward pass needs are kept or made
again from others, as costs least. Its answer is a minimum cut of a flow network; here the network gets the missing blocks, and
is cut again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import networkx
from torch import fx

from fxpar.backends import repeats
from fxpar.compat.stages import Decision

HORIZON = 200
"""Values that a traced forward pass has to have, so that the partitioner's limit on chains (100) shows where it decides."""
Point = tuple[fx.Node, bool]
"""Where a value is made (False), or made and at hand (True)."""


def confirm(decision: Decision, missing: int, inputs: int, least: int) -> None:
    """Raise `NotEqual` unless the cut of a network with `missing` more blocks is that of `decision`, block by block.

    inputs: how many the longer program takes. least: how many blocks of the network must be equal.
    """
    if decision.by_chains or len(decision.forward) < HORIZON:
        raise repeats.NotEqual
    graph = _priced(decision)
    run = repeats.find(graph, lambda n: tuple(n.meta.values()), least)
    if run is None:
        raise repeats.NotEqual
    repeats.lengthen(run, missing)
    if len(graph.find_nodes(op="placeholder")) != inputs:
        raise repeats.NotEqual
    sink = _sink_side(graph)
    for node in _values(graph):
        if node.meta["saved"] != ((node, False) not in sink and (node, True) in sink):
            raise repeats.NotEqual


def _values(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op != "output"]


def _priced(decision: Decision) -> fx.Graph:
    """A graph of the values that the partitioner decides about, each with what concerns it of the network.

    ``meta``: the price of keeping it; whether it may not be made again; whether the backward pass has to make it, or to have it;
    whether it is kept.
    """
    network, graph = decision.network, fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    points = {f"{n.name}_in" for n in decision.graph.nodes if network.has_edge(f"{n.name}_in", f"{n.name}_out")}
    for node in decision.graph.nodes:
        enters, leaves = f"{node.name}_in", f"{node.name}_out"
        if enters not in points and node not in decision.forward:
            continue
        if node.op == "placeholder":
            new = graph.placeholder(node.name)
        else:
            new = graph.call_function(node.target, tuple(copies[n] for n in node.all_input_nodes if n in copies))
        own = enters in points  # what has to be made again has no price there, nor successors
        after = network.successors(leaves) if own else ()
        needed = any(n == "sink" or (n not in points and network.has_edge(n, "sink")) for n in after)
        new.meta = dict(price=network[enters][leaves]["capacity"] if own else 0, fixed=network.has_edge("source", enters),
                        made=network.has_edge(enters, "sink"), needed=needed, saved=node in decision.saved)
        copies[node] = new
    graph.output(())
    return graph


def _sink_side(graph: fx.Graph) -> set[Point]:
    """The points on the side of the backward pass in the minimum cut that has the fewest of them there."""
    values = _values(graph)
    after: dict[Point, list[Point]] = {}
    for n in values:
        after[n, True] = [(u, False) for u in n.users if u.op != "output"]
        after[n, False] = [(n, True)] if n.meta["price"] == math.inf else []
    before: dict[Point, list[Point]] = {p: [] for p in after}
    for p, others in after.items():
        for q in others:
            before[q].append(p)
    sink = _closure([*((n, False) for n in values if n.meta["made"]), *((n, True) for n in values if n.meta["needed"])], before)
    source = _closure([(n, False) for n in values if n.meta["fixed"]], after)
    if sink & source:
        raise repeats.NotEqual
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))

    def end(point: Point) -> Point | str:
        return "source" if point in source else "sink" if point in sink else point

    for n in values:
        a, b = end((n, False)), end((n, True))
        if n.meta["price"] != math.inf and a != "sink" and b != "source":
            known = network.get_edge_data(a, b, {"capacity": 0})["capacity"]
            network.add_edge(a, b, capacity=known + n.meta["price"])
    for p, others in after.items():
        for q in others:
            if end(p) == p and end(q) == q:
                network.add_edge(p, q, capacity=math.inf)
    _, (_, behind) = networkx.minimum_cut(network, "source", "sink")
    return sink | (behind - {"sink"})


def _closure(found: Iterable[Point], steps: dict[Point, list[Point]]) -> set[Point]:
    seen: set[Point] = set()
    pending = list(found)
    while pending:
        point = pending.pop()
        if point not in seen:
            seen.add(point)
            pending += steps[point]
    return seen
