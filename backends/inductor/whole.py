"""whole: the graphs of a program with many equal blocks, made from a trace of few of them.

AOTAutograd's trace, and the passes over what it traced, take the longer the more blocks a model has, and say the same of each.
Here a program is shortened to few of its equal blocks before it is traced, and what was traced gets the others back, behind the
partitioner and before the passes that look at all of a graph. What is added to `brief`, which predicts memory in this way, is
which of the longer graphs' inputs and gradients are which of the program's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from fxpar import compat
from fxpar.backends import repeats
from fxpar.backends.inductor import brief, kept
from fxpar.backends.inductor.brief import KEPT, STEADY, Input, TracedInPart
from fxpar.compat import stages
from fxpar.plan import Plan

FEWER = 3
"""By how many blocks a trace has to be shorter for that to be worth its proof."""


@dataclass
class Whole:
    """A program's graphs, behind all passes or, in steps, before Inductor's over each of them.

    forward: takes the program's inputs, and returns its outputs and behind them what the backward takes. backward: takes that and
    then the gradients of the outputs `seeds`, and returns a gradient, or None, for each input; None where there is no backward.
    outputs: how many the program has. donated: positions of the backward's inputs that it may overwrite. options: with which
    Inductor generates code for each graph.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    outputs: int
    seeds: list[int]
    donated: list[int]
    options: list[dict[str, Any]]


def from_few_blocks(plain: fx.GraphModule, taken: list[Input], plan: Plan, settings: dict[str, Any],
                    then: Callable[[Whole], None], in_steps: bool = False) -> bool:
    """Call `then` with a program's graphs, of which few of many equal blocks were traced; whether that could be done.

    plain: a flat graph over the inputs `taken`, which is not changed. settings: of Inductor, with the passes over joint graph,
    forward and backward. then: is called in the context in which Inductor generates code. in_steps: the graphs are to be those
    before Inductor's passes over each of them, so that a backward can be split.
    Proved, by operators and their connections: that the blocks are equal; that their traces are, in the middle; that each block
    keeps what the partitioner would have it keep among all; that of equal inputs the first is the first block's in either graph,
    and so on. Not done where one of these cannot be proved, where outputs share memory, and under a memory budget.
    """
    if plan.memory_budget is not None or not stages.passes_are_local():
        return False
    short = brief.copied(plain)
    run = brief.run_of(short, taken, KEPT + FEWER)
    if run is None:
        return False
    missing = run.count - KEPT
    try:
        repeats.check_names(run)
        origin = _Shortened(short, run)
        inputs = brief.shortened(short, taken, run, missing)
        origin.keep(short)
        run = brief.run_of(short, inputs, KEPT)
        if run is None or run.count != KEPT:
            return False
        equal = brief.equal_inputs(run)
        decisions: list[stages.Decision] = []

        def lengthened(handed: list[stages.HandedOver]) -> None:
            traced = TracedInPart([made.module for made in handed], inputs, decisions, equal)
            whole = _lengthened(traced, handed, missing, origin, plain, taken)
            if not in_steps:
                for graph, h in zip(traced.graphs, handed, strict=True):
                    stages.apply_graph_passes(graph, settings, h.options["is_inference"])
            then(whole)

        stages.graphs_before(short, [i.value for i in inputs], settings, decisions.append, lengthened, in_steps)
    except (repeats.NotEqual, compat.SharedOutputs, compat.NotInSteps):
        return False
    return True


class _Shortened:
    """Which inputs of a whole program those of the shortened one are."""

    def __init__(self, whole: fx.GraphModule, run: repeats.Repeats):
        """run: the equal blocks of a graph that is going to be shortened, in place."""
        self._at = {n: i for i, n in enumerate(whole.graph.find_nodes(op="placeholder"))}
        self._place = {n: run.place[n] for n in self._at if n in run.place}
        self._families = [{q: self._at[n] for q, n in members.items() if n in self._at} for members in run.families]
        self.index: list[int] = []

    def keep(self, short: fx.GraphModule) -> None:
        """The graph was shortened."""
        places = short.graph.find_nodes(op="placeholder")
        self.index = [self._at[n] for n in places]
        self._places = [self._place.get(n) for n in places]

    def alike(self, short: list[int]) -> list[int]:
        """The program's inputs that stand for each other in its equal blocks, in the order of these.

        short: those of the shortened program, in their order. Raises `NotEqual` where they are not all that it has of the same.
        """
        places = [self._places[i] for i in short]
        members = self._families[places[0][0]] if places[0] is not None else {}
        there = set(self.index)
        if [members[q] for q in sorted(members) if members[q] in there] != [self.index[i] for i in short]:
            raise repeats.NotEqual
        return [members[q] for q in sorted(members)]


def _lengthened(traced: TracedInPart, handed: list[stages.HandedOver], missing: int, origin: _Shortened, plain: fx.GraphModule,
                taken: list[Input]) -> Whole:
    graphs = traced.graphs
    places = graphs[0].graph.find_nodes(op="placeholder")
    short = {n: i for i, n in enumerate(places)}
    wanted: list[Any] = list(graphs[1].graph.output_node().args[0]) if len(graphs) > 1 else []  # type: ignore[arg-type]
    made_for = {n: i for i, n in enumerate(wanted) if n is not None}
    if len(made_for) != sum(n is not None for n in wanted):
        raise repeats.NotEqual  # one value is the gradient of two inputs
    free = {n for h, g in zip(handed, graphs, strict=True)
            for i, n in enumerate(g.graph.find_nodes(op="placeholder")) if i in h.donated}
    forward, backward, copies = brief.lengthen(traced, missing)
    if backward is not None:
        if len(traced.decisions) != 1:
            raise repeats.NotEqual  # another partitioner, or one that asks for more than a cut
        kept.confirm(traced.decisions[0], missing, brief.used(graphs[0].graph), STEADY)
    free |= {new for (old, _), new in copies.items() if old in free}
    inputs = _named(forward, short, traced.equal, origin)
    _check_order(forward, plain.graph, inputs)
    _put_in_order(graphs[0], inputs, taken, traced.inputs)
    if backward is not None:
        grads = {i: n for n, i in _named(backward, made_for, traced.equal, origin).items()}
        graphs[1].graph.output_node().args = ([grads.get(i) for i in range(len(taken))],)
    for graph in graphs:
        graph.graph.lint()
    donated = [i for i, n in enumerate(graphs[1].graph.find_nodes(op="placeholder")) if n in free] if backward is not None else []
    return Whole(graphs[0], graphs[1] if backward is not None else None, handed[0].outputs, handed[0].seeds, donated,
                 [h.options for h in handed])


def _named(run: repeats.Repeats, known: dict[fx.Node, int], equal: list[dict[int, int]], origin: _Shortened
           ) -> dict[fx.Node, int]:
    """Of every node of a lengthened graph that stands for an input of the program: the number of that input.

    known: of those that the trace has, the number of the input among those of the shortened program. equal: families of these.
    A family of nodes is one of inputs, in their order or in the opposite one, but for what is at the ends of either. Raises
    `NotEqual` where that is not so.
    """
    family = {i: members for members in equal for i in members.values()}
    out = {n: origin.index[i] for n, i in known.items()}
    for members in run.families:
        nodes = [members[q] for q in sorted(members)]
        while nodes and known.get(nodes[0], -1) not in family and nodes[0] in known:
            del nodes[0]
        while nodes and known.get(nodes[-1], -1) not in family and nodes[-1] in known:
            del nodes[-1]
        there = [known[n] for n in nodes if n in known]
        if not there:
            continue
        alike = family.get(there[0], {})
        mine = [alike[q] for q in sorted(alike)]
        if {there[0], there[-1]} <= {*mine} and mine.index(there[0]) > mine.index(there[-1]):
            nodes, there = nodes[::-1], there[::-1]
        indices = origin.alike(mine)
        low = mine.index(there[0]) if there[0] in mine else 0
        high = low + len(there) - len(mine)
        indices = indices[low : len(indices) + high]
        if len(there) < 2 or there != mine[low : len(mine) + high] or len(nodes) != len(indices):
            raise repeats.NotEqual
        out |= zip(nodes, indices, strict=True)
    return out


def _check_order(run: repeats.Repeats, plain: fx.Graph, inputs: dict[fx.Node, int]) -> None:
    """Raise `NotEqual` unless of equal inputs of two blocks, in the longer graph as in the program, that of the same block comes
    first, as far as the other block needs what it makes.

    run: the longer graph's. inputs: its own, each with its number among those of the program.
    """
    mine, theirs, names = _ahead(run.graph), _ahead(plain), plain.find_nodes(op="placeholder")
    for members in run.families:
        ahead = sorted((theirs[names[inputs[n]]], mine[n]) for n in members.values() if n in inputs)
        if any(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(ahead)):
            raise repeats.NotEqual


def _ahead(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many operators follow each value, one after the other."""
    ahead: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        ahead[node] = max((ahead[u] + 1 for u in node.users), default=0)
    return ahead


def _put_in_order(module: fx.GraphModule, inputs: dict[fx.Node, int], taken: Sequence[Input], given: Sequence[Input]) -> None:
    """Have a graph take its inputs in the program's order. given: what they are like in the order that they have."""
    places = module.graph.find_nodes(op="placeholder")
    if sorted(inputs.get(n, -1) for n in places) != [*range(len(taken))]:
        raise repeats.NotEqual
    if any(taken[inputs[n]].facts() != like.facts() for n, like in zip(places, given, strict=True)):
        raise repeats.NotEqual
    behind = next(n for n in module.graph.nodes if n.op != "placeholder")
    for node in sorted(places, key=inputs.__getitem__):
        behind.prepend(node)
