"""overlap: order the operators of a compiled graph so that communication runs beside computation.

A pass over the graphs that Inductor is about to lower (forward and backward); Inductor keeps the order it is given. On a
GPU a collective runs on a stream of its own, from the operator that starts it to the `wait_tensor` before its first
use. The order follows from the graph alone, so every rank issues the same collectives in the same order.

What was tried and is not here, because it gained nothing: holding weight gradients back to run them beside what NCCL
gathers and scatters for tensor parallelism. Matrix products that fill the GPU lose as much time to the
collective's blocks as they hide (benchmarks/RESULTS.md). `tp_overlap` does so where it is asked to, by copy engines.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxpar import compat
from fxpar.backends.inductor.casts import CAST
from fxpar.backends.remat import block_of
from fxpar.ops.exchange import COUNTS, ORDER, PLANS, ROOM, ROWS
from fxpar.ops.vocabulary import WAITS
from fxpar.program import made_from


def overlap_communication(graph: fx.Graph) -> None:
    """Reorder `graph` in place.

    Takes: a functional graph with ``_c10d_functional`` operators. Afterwards: the same operators in another valid order.
    A collective starts where it did; the wait for it, and what only rearranges its result, comes right before the
    first operator that computes with it (for a gradient: at the end), so that everything between runs beside it. While rows
    are on their way to experts and back, what does not wait for them and belongs to the same block (an expert that all
    tokens share) is computed, and what says where they belong; the host asks how many they are right before they start, when
    all that takes no time and can do without the answer has been started.
    """
    for room in graph.find_nodes(op="call_function", target=ROOM):
        room.update_arg(3, _started_before(room))
    nodes = _beside_exchanges(graph)
    late: set[fx.Node] = set()
    for node in nodes:
        if node.target in (*WAITS, ROOM, ORDER) or (_rearranges(node) and set(node.all_input_nodes) & late):
            late.add(node)
    placed: dict[fx.Node, None] = {}
    for node in nodes:
        if node.op != "output" and node not in late:
            _place(node, placed)
    for node in nodes:
        if node.op != "output":
            _place(node, placed)
    output = graph.output_node()
    for node in placed:
        if node.op != "placeholder":
            output.prepend(node)
    graph.lint()


def _beside_exchanges(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in an order in which those of its block that do not wait for an exchange of rows come right behind its start, and
    first of them those that say where what arrives belongs; counts of rows set out as early as can be."""
    nodes = list(graph.nodes)
    for counts in graph.find_nodes(op="call_function", target=COUNTS):
        nodes.remove(counts)
        nodes.insert(max(map(nodes.index, counts.all_input_nodes)) + 1, counts)
    for start in graph.find_nodes(op="call_function", target=ROWS):
        compat.lower_as_collective(ROWS)
        at = nodes.index(start)
        told = _told_of_rows(start, nodes[:at])
        waiting = {start}
        moved: list[fx.Node] = []
        kept: list[fx.Node] = []
        for node in nodes[at + 1 :]:
            if any(n in waiting for n in node.all_input_nodes):
                waiting.add(node)
            free = node not in waiting and node.op == "call_function" and block_of(node) == block_of(start) != ""
            (moved if free else kept).append(node)
        nodes = [*(n for n in nodes[:at] if n not in told), start, *told, *moved, *kept]
    return nodes


def _told_of_rows(start: fx.Node, before: list[fx.Node]) -> dict[fx.Node, None]:
    """What says where the rows of an exchange belong, and what follows from it, unless its start needs any of that."""
    needed = made_from(start)
    found: dict[fx.Node, None] = {}
    for node in before:
        of_plan = node.target is ORDER and node.args[1] is start.args[3]
        if of_plan or any(n in found for n in node.all_input_nodes):
            if node in needed:
                return {}
            found[node] = None
    return found


def _started_before(room: fx.Node) -> list[fx.Node]:
    """What the GPU is to have been given when the host waits for how many rows arrive: the rows that leave, and of what the block
    goes on with all that costs next to nothing, which are numbers of rows and casts of its parameters."""
    known, behind = made_from(room.all_input_nodes[0].all_input_nodes[0]), {room}  # of the counts
    found: dict[fx.Node, None] = {}
    node = room.next
    while node.op != "output":
        if any(n in behind for n in node.all_input_nodes):
            behind.add(node)
            for value in node.all_input_nodes:
                while _rearranges(value):
                    value = value.all_input_nodes[0]
                leaves = node.target is ROWS and node.args[0] is value and node.args[3] is room
                light = block_of(node) == block_of(room) and (_is_cast_for(value, block_of(room)) or _are_numbers(value, known))
                if value not in known and value not in behind and (leaves or light):
                    found[value] = None
        node = node.next
    return [*found]


def _is_cast_for(value: fx.Node, block: str) -> bool:
    """Whether a value is an input in another dtype, for one block alone."""
    of_input = value.target is CAST and value.all_input_nodes[0].op == "placeholder"
    return of_input and {*map(block_of, value.users)} == {block} != {""}


def _are_numbers(value: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a value is of integers, made of no more than such and what is known."""
    made, inputs = value.meta.get("val"), value.all_input_nodes
    if not isinstance(made, torch.Tensor) or made.is_floating_point() or value.target in (*WAITS, *PLANS, ROWS) or not inputs:
        return False
    return all(n in known or n.op == "placeholder" or _are_numbers(n, known) for n in inputs)


VIEWS = (
    "view",
    "permute",
    "reshape",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
    "t",
    "transpose",
    "as_strided",
    "alias",
)


def _rearranges(node: fx.Node) -> bool:
    """A view, or one of several results: it costs nothing wherever it stands."""
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in VIEWS


def _place(node: fx.Node, placed: dict[fx.Node, None]) -> None:
    """Place a node after everything that it needs, of which waits come last."""
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [m for m in top.all_input_nodes if m not in placed]
        if missing and top not in placed:
            stack.extend(sorted(missing, key=lambda m: m.target not in WAITS))
            continue
        stack.pop()
        placed.setdefault(top)
