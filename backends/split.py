"""split: a backward graph in two, of which the second makes only what can wait.

Pipelines wait for the gradients of a stage's inputs, which the stage before needs, and for those of its parameters not: made
later, these fill what would be the pipeline's bubble.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxpar import compat
from fxpar.ops.vocabulary import bytes_of, is_view
from fxpar.program import is_tensor, user_line

aten = torch.ops.aten
SUMS = (aten.sum.default, aten.sum.dim_IntList)
CONVOLUTION = aten.convolution_backward.default


class Unsplittable(Exception):
    """An operator keeps a backward from being split: `what` it does, and on which `line` of the model."""

    def __init__(self, node: fx.Node, does: str):
        line = user_line(node)
        super().__init__(node.name, does)
        self.what = f"operator {node.target}" + (f" ({line})" if line else "") + f" {does}"


@dataclass
class Half:
    """A part of a backward graph.

    reads: the positions, among the inputs of the backward, of those it takes. makes: the positions, among the outputs of the
    backward, of those it gives.
    """

    module: fx.GraphModule
    reads: list[int]
    makes: list[int]


@dataclass
class Halves:
    """A backward in two; None: nothing to do.

    carried: what the first gives behind its gradients, and the second takes behind what it reads.
    """

    first: Half | None
    second: Half | None
    carried: list[fx.Node]


def split_backward(module: fx.GraphModule, early: Collection[int]) -> Halves:
    """A backward graph in two: the gradients at the positions `early` of its outputs, and the others.

    Takes: a functional graph, as AOTAutograd hands it over; it stays as it is. Afterwards: every operator but for views is in
    one of the halves, in the order in which it was. The first has what the early gradients need, so the collectives of
    activations; the second all else, so those of the gradients of parameters. An operator that makes both (a layer norm's) is
    in the first, but for a convolution's, which becomes two; so are sums that are smaller than what would be kept to add up.
    The second reads what was saved for it alone from where the first reads. Of what the first made it is handed what it needs,
    and makes views of that again.
    Raises: `Unsplittable` for an operator that writes to its operands, or makes what is no tensor, between the halves.
    """
    graph, outputs, soon, later = _copied(module, early)
    if soon and later:
        _require_functional(graph)
        _convolutions_apart(graph, outputs, soon)
    first = _made_with(graph, _cone(outputs[i] for i in soon))
    return _halves(module, graph, outputs, soon, later, _with_sums(graph, first, [outputs[i] for i in later]))


def whole_backward(module: fx.GraphModule, early: Collection[int]) -> Halves:
    """As `split_backward`, but the first half makes everything, and the second gives the other gradients, which were kept: for
    whoever runs one behind the other."""
    graph, outputs, soon, later = _copied(module, early)
    return _halves(module, graph, outputs, soon, later, {n for n in graph.nodes if n.op != "output"} if soon else set())


def _copied(module: fx.GraphModule, early: Collection[int]) -> tuple[fx.Graph, list[fx.Node | None], list[int], list[int]]:
    """The graph, its outputs, and the positions of those that come first and of those that come later."""
    graph = fx.Graph()
    outputs: list[fx.Node | None] = list(graph.graph_copy(module.graph, {}))  # type: ignore[arg-type]
    graph.output(tuple(outputs))
    wanted = [i for i, node in enumerate(outputs) if node is not None]
    return graph, outputs, [i for i in wanted if i in early], [i for i in wanted if i not in early]


def _halves(module: fx.GraphModule, graph: fx.Graph, outputs: list[fx.Node | None], soon: list[int], later: list[int],
            first: set[fx.Node]) -> Halves:
    second, carried = _rest(first, [outputs[i] for i in later])
    kept = [n for n in graph.nodes if n in carried]
    return Halves(_half(module, graph, first, [], soon, [*(outputs[i] for i in soon), *kept]) if soon else None,
                  _half(module, graph, second, kept, later, [outputs[i] for i in later]) if later else None, kept)


def _require_functional(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if compat.mutates(node.target):
            raise Unsplittable(node, "writes to an operand in the backward")


def _cone(roots: Iterable[fx.Node | None]) -> set[fx.Node]:
    """What the roots are made from, and they."""
    found: set[fx.Node] = set()
    stack = [n for n in roots if n is not None]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _made_with(graph: fx.Graph, nodes: set[fx.Node]) -> set[fx.Node]:
    """`nodes`, and all results of those that have several."""
    return nodes | {n for n in graph.nodes if n.target is operator.getitem and _maker(n) in nodes}


def _maker(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _rest(first: set[fx.Node], roots: Iterable[fx.Node | None]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What the second half consists of, inputs among it, so that it makes `roots`; and what of `first` it needs."""
    second: set[fx.Node] = set()
    carried: set[fx.Node] = set()
    stack = [n for n in roots if n is not None]
    while stack:
        node = stack.pop()
        if node in second or node in carried:
            continue
        if node.op == "call_function" and node in first and not _made_again(node):
            if not is_tensor(node):
                raise Unsplittable(node, "makes what is no tensor, and gradients of activations and of parameters need it")
            carried.add(node)
        else:
            second.add(node)
            stack += node.all_input_nodes
    return second, carried


def _with_sums(graph: fx.Graph, first: set[fx.Node], roots: list[fx.Node | None]) -> set[fx.Node]:
    """`first`, and sums for which only what they add up would have to be kept: those of a norm's weights, which take little time
    where its input gradient is made."""
    if not first:
        return first
    fewest = _carried_bytes(first, roots)
    again = True
    while again:
        again = False
        for node in graph.nodes:
            if node.target not in SUMS or node in first:
                continue
            moved = _cone([node]) - first
            if all(n.op == "placeholder" or n.target in SUMS or compat.is_pointwise(n.target) or is_view(n) for n in moved):
                less = _carried_bytes(first | moved, roots)
                if less < fewest:
                    first, fewest, again = first | moved, less, True
    return first


def _carried_bytes(first: set[fx.Node], roots: list[fx.Node | None]) -> int:
    """Bytes that are kept for the second half."""
    second, carried = _rest(first, roots)
    return sum(bytes_of(n) for n in (*second, *carried) if n in carried or (n.op == "placeholder" and is_tensor(n)))


def _made_again(node: fx.Node) -> bool:
    """A view whose operand is kept anyway, or takes no more memory than it."""
    if not is_view(node) or not is_tensor(node):
        return False
    operand = node.all_input_nodes[0]
    return operand.op == "placeholder" or (is_tensor(operand) and bytes_of(operand) <= bytes_of(node))


def _half(module: fx.GraphModule, graph: fx.Graph, nodes: set[fx.Node], carried: list[fx.Node], makes: list[int],
          outputs: list[fx.Node | None]) -> Half:
    """The graph of `nodes`, which takes the inputs among them, and `carried`."""
    inputs = graph.find_nodes(op="placeholder")
    reads = [i for i, n in enumerate(inputs) if n in nodes]
    half = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*(inputs[i] for i in reads), *carried]:
        copies[node] = half.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in nodes and node not in copies:
            copies[node] = half.node_copy(node, copies.__getitem__)
    half.output(tuple(copies[n] for n in outputs if n is not None))
    half.lint()
    return Half(fx.GraphModule(module, half), reads, makes)


def _convolutions_apart(graph: fx.Graph, outputs: list[fx.Node | None], soon: list[int]) -> None:
    """Have another operator compute the gradients of a convolution that are not needed soon, in place: one that computes two of
    them does not take less time than two."""
    for node in graph.find_nodes(op="call_function", target=CONVOLUTION):
        first = _cone(outputs[i] for i in soon)
        parts = {part: part.args[1] for part in node.users}
        late = [i for part, i in parts.items() if part not in first]
        if not late or len(late) == len(parts):
            continue
        *args, mask = node.args
        with graph.inserting_after(node):
            other = graph.call_function(CONVOLUTION, (*args, [wanted and i in late for i, wanted in enumerate(mask)]))
        other.meta = dict(node.meta)
        node.args = (*args, [wanted and i not in late for i, wanted in enumerate(mask)])
        for part, i in parts.items():
            if i in late:
                other.append(part)
                part.replace_input_with(node, other)
