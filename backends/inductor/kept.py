"""kept: whether the forward pass of a model with more blocks keeps, in each of them, what it keeps with few.

AOTAutograd's partitioner decides that for all of a joint graph at once: values that the backward pass needs are kept or made
again from others, as costs least. Its answer is a minimum cut of a flow network; here the network gets the missing blocks, and
is cut again. Before it cuts, it bans values from being made again by rules that follow chains of operators through the graph;
these rules are written down here again, must say of the few blocks what the partitioner said, and then are asked about all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx
from torch import fx

from fxpar.backends import periods, repeats
from fxpar.compat.stages import Decision

CHAIN = 100
"""The partitioner does not make again what ends a chain of operators that goes on for longer than this."""
Point = tuple[fx.Node, bool]
"""Where a value is made (False), or made and at hand (True)."""


_CHOICE = "choice"


@dataclass(frozen=True)
class _Choice:
    """What the partitioner's network has of a value.

    price: of keeping it. fixed: whether it may for its own sake not be made again. made, needed: whether the backward pass has to
    make it, or to have it. saved: whether it is kept. forward: whether the forward makes it. fusible, joins, exempt: see
    `Decision`.
    """

    price: float
    fixed: bool
    made: bool
    needed: bool
    saved: bool
    forward: bool
    fusible: bool
    joins: bool
    exempt: bool


def _choice(node: fx.Node) -> _Choice:
    found: _Choice = node.meta[_CHOICE]
    return found


def confirm(decision: Decision, missing: int, inputs: int, least: int) -> None:
    """Raise `NotEqual` unless the cut of a network with `missing` more blocks is that of `decision`, block by block.

    inputs: how many the operators of the longer program's forward pass take (about any other there is nothing to decide).
    least: how many blocks of the network must be equal.
    """
    graph, copies = _priced(decision)
    if _banned(graph) != {copies[n] for n in decision.banned}:
        raise repeats.NotEqual  # the rules are others in this version of PyTorch
    run = repeats.find(graph, lambda n: n.meta.get(_CHOICE), least)
    if run is None:
        raise repeats.NotEqual
    periods.lengthen(run, missing)
    if sum(bool(n.users) for n in graph.find_nodes(op="placeholder")) != inputs:
        raise repeats.NotEqual
    sink = _sink_side(graph, _banned(graph))
    for node in _values(graph):
        if _choice(node).saved != ((node, False) not in sink and (node, True) in sink):
            raise repeats.NotEqual


def _values(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op != "output"]


def _priced(decision: Decision) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of the values that the partitioner decides about, each with its `_Choice`; and what stands for each of the
    decision's nodes.
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
        new.meta = {_CHOICE: _Choice(
            price=network[enters][leaves]["capacity"] if own else 0, fixed=network.has_edge("source", enters),
            made=network.has_edge(enters, "sink"), needed=needed, saved=node in decision.saved, forward=node in decision.forward,
            fusible=node in decision.fusible, joins=node in decision.joins, exempt=node in decision.exempt)}
        copies[node] = new
    graph.output(())
    return graph, copies


def _banned(graph: fx.Graph) -> set[fx.Node]:
    """What may not be made again: for its own sake, because it is used far behind something that no kernel can hold together with
    what is used before, or because it ends a long chain."""
    forward = [n for n in _values(graph) if _choice(n).forward]
    order = {n: i for i, n in enumerate(forward)}
    banned = {n for n in _values(graph) if _choice(n).fixed}
    users = {n: [u for u in n.users if u in order] for n in forward}
    for node in forward:
        first = _first_alone(users[node], users, order)
        banned |= {u for u in users[node] if order[u] > first and _together(node, u) and not _choice(u).exempt}
    visited: set[fx.Node] = set()
    for start in forward:
        chain = [(order[start], start)]
        while chain:
            at, node = heapq.heappop(chain)
            if node in visited:
                continue
            visited.add(node)
            if at > order[start] + CHAIN and not chain:
                banned |= {node} if not _choice(node).exempt else set()
                break
            for user in users[node]:
                if _together(node, user) and user not in banned:
                    heapq.heappush(chain, (order[user], user))
    return banned


def _first_alone(starts: Sequence[fx.Node], users: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int]) -> int:
    """The number of the first node behind `starts` that needs a kernel other than what comes before it; that of the last of
    `starts`, if that comes first."""
    last = max((order[n] for n in starts), default=0)
    pending = [(order[n], n, True) for n in starts]
    heapq.heapify(pending)
    seen = set(pending)
    while pending:
        at, node, joined = heapq.heappop(pending)
        if not joined:
            return at
        for user in users[node]:
            following = order[user], user, _together(node, user)
            if order[user] <= last and following not in seen:
                seen.add(following)
                heapq.heappush(pending, following)
    return last


def _together(node: fx.Node, user: fx.Node) -> bool:
    """Whether one kernel may compute both."""
    return _choice(user).joins or (_choice(node).fusible and _choice(user).fusible)


def _sink_side(graph: fx.Graph, banned: set[fx.Node]) -> set[Point]:
    """The points on the side of the backward pass in the minimum cut that has the fewest of them there."""
    values = _values(graph)
    after: dict[Point, list[Point]] = {}
    for n in values:
        after[n, True] = [(u, False) for u in n.users if u.op != "output"]
        after[n, False] = [(n, True)] if _choice(n).price == math.inf else []
    before: dict[Point, list[Point]] = {p: [] for p in after}
    for p, others in after.items():
        for q in others:
            before[q].append(p)
    sink = _closure([*((n, False) for n in values if _choice(n).made), *((n, True) for n in values if _choice(n).needed)], before)
    source = _closure([(n, False) for n in values if n in banned], after)
    if sink & source:
        raise repeats.NotEqual
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))

    def end(point: Point) -> Point | str:
        return "source" if point in source else "sink" if point in sink else point

    for n in values:
        a, b = end((n, False)), end((n, True))
        if _choice(n).price != math.inf and a != "sink" and b != "source":
            known = network.get_edge_data(a, b, {"capacity": 0})["capacity"]
            network.add_edge(a, b, capacity=known + _choice(n).price)
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
