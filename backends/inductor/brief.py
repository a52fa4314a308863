"""brief: the lowered graphs of a long run of equal blocks, of which a few are traced."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.backends import periods, repeats
from fxpar.backends.inductor import kept
from fxpar.backends.numbered import STACKS
from fxpar.backends.remat import BLOCK, UNSHARD
from fxpar.compat import stages
from fxpar.plan import Plan
from fxpar.program import block_path

KEPT, WORTH, STEADY = 5, 10, 3
"""Of a run of equal blocks: how many are traced, and once more with one block more; how many more than `KEPT` there have to be
for that to gain anything; how many of those that are traced have to have equal traces."""


@dataclass
class Input:
    """A tensor that the graphs take: fake, of local shape; which part of a peak it is; whether the optimizer has state for it."""

    value: Tensor
    part: str
    trained: bool = False

    def facts(self) -> Hashable:
        """What is equal of inputs that stand for each other in equal blocks."""
        value = self.value
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, self.part, self.trained


@dataclass
class TracedInPart:
    """A program's graphs before the passes that look at all of a graph, what it takes, and what the partitioner decided.

    equal: families of inputs that stand for each other in the program's equal blocks: number of the block -> position.
    """

    graphs: list[fx.GraphModule]
    inputs: list[Input]
    decisions: list[stages.Decision]
    equal: list[dict[int, int]]

    def saved(self) -> tuple[list[Any], dict[fx.Node, fx.Node]]:
        """What the forward graph returns but for the backward graph, and, of each placeholder of that one, what fills it."""
        outputs: Any = self.graphs[0].graph.output_node().args[0]
        if len(self.graphs) == 1:
            return list(outputs), {}
        places = [n for n in self.graphs[1].graph.find_nodes(op="placeholder") if not _is_tangent(n)]
        count = len(outputs) - len(places)
        return list(outputs[:count]), dict(zip(places, outputs[count:], strict=True))

    def text(self) -> Hashable:
        """Equal for graphs of which memory is the same."""
        fills = dict(zip(self.graphs[0].graph.find_nodes(op="placeholder"), self.inputs, strict=True))
        texts, numbers = zip(*(repeats.written(g.graph, lambda n: (shapes(n), fills[n].facts() if n in fills else ()))
                               for g in self.graphs), strict=True)
        results, saved = self.saved()
        returned = [[numbers[0].get(r, r) for r in results]]
        for module in self.graphs[1:]:
            returned += [[numbers[1].get(n, -1) for n in module.graph.find_nodes(op="placeholder") if _is_tangent(n)],
                         sorted(numbers[1].get(n, -1) for n in module.graph.output_node().args[0] if n is not None),
                         sorted((numbers[1].get(place, -1), str(numbers[0][n] if n in numbers[0] else fills[n].facts()))
                                for place, n in saved.items())]
        return texts, str(returned)


def _is_tangent(node: fx.Node) -> bool:
    return node.name.startswith("tangents")


def lowered(plain: fx.GraphModule, taken: list[Input], plan: Plan, settings: dict[str, Any]
            ) -> tuple[list[fx.Graph], list[Input]] | None:
    """What `memory.trace` gives, of a program (it is spoilt) of which few of many equal blocks are traced.

    settings: of Inductor, with the passes over joint graph, forward and backward.

    Proved, by operators and their connections: that the blocks are equal; that their traces are, in the middle; that the trace of
    one block more is the trace of the few with a copy of a block; that what the few keep is what the partitioner would have all
    blocks keep. Then the traces get the other blocks back, before the passes of Inductor and ours that look at all of a graph.
    None where one of these cannot be proved: no long run of equal blocks; traces that do not repeat as blocks do; a memory
    budget, which is for all blocks together; passes of Inductor that somebody turned on and that may look at all blocks.
    """
    if plan.memory_budget is not None or not stages.passes_are_local():
        return None
    run = run_of(plain, taken, KEPT + WORTH)
    if run is None:
        return None
    missing = run.count - KEPT - 1
    try:
        repeats.check_names(run)
        inputs = shortened(plain, taken, run, missing)
        if len(inputs) == len(taken):
            return None  # how many blocks are put back is told by the inputs that they take
        run = run_of(plain, inputs, KEPT + 1)
        if run is None or run.count != KEPT + 1:
            return None
        more = _trace(copied(plain), inputs, run, settings)
        inputs = shortened(plain, inputs, run, 1)
        run = run_of(plain, inputs, KEPT)
        if run is None:
            return None
        few = _trace(plain, inputs, run, settings)
        lengthen(few, 1)
        if few.text() != more.text():
            return None
        lengthen(more, missing)
        if len(more.decisions) != len(more.graphs) - 1:
            return None  # another partitioner, or one that asks for more than a cut
        for decision in more.decisions:
            kept.confirm(decision, missing, used(more.graphs[0].graph), STEADY)
    except repeats.NotEqual:
        return None
    if Counter(i.facts() for i in more.inputs) != Counter(i.facts() for i in taken):
        return None
    return [stages.apply_graph_passes(g, settings).graph for g in more.graphs], more.inputs


def run_of(plain: fx.GraphModule, taken: list[Input], least: int) -> repeats.Repeats | None:
    fills = dict(zip(plain.graph.find_nodes(op="placeholder"), taken, strict=True))
    return repeats.find(plain.graph, lambda n: fills[n].facts() if n in fills else _marks(n), least)


def shortened(plain: fx.GraphModule, taken: list[Input], run: repeats.Repeats, missing: int) -> list[Input]:
    """Take blocks out of a program, in place; what it then takes."""
    fills = dict(zip(plain.graph.find_nodes(op="placeholder"), taken, strict=True))
    _relabel(run, missing)
    periods.shorten(run, missing)
    plain.recompile()
    return [fills[n] for n in plain.graph.find_nodes(op="placeholder")]


def copied(plain: fx.GraphModule) -> fx.GraphModule:
    copy = fx.Graph()
    copy.output(copy.graph_copy(plain.graph, {}))
    return fx.GraphModule(plain, copy)


def _trace(plain: fx.GraphModule, inputs: list[Input], run: repeats.Repeats, settings: dict[str, Any]) -> TracedInPart:
    """run: the equal blocks of `plain`, or of a graph that it is a copy of."""
    decisions: list[stages.Decision] = []
    graphs = stages.graphs_before(plain, [i.value for i in inputs], settings, decisions.append)
    return TracedInPart(graphs, inputs, decisions, equal_inputs(run))


def equal_inputs(run: repeats.Repeats) -> list[dict[int, int]]:
    """Families of inputs that stand for each other in equal blocks: number of the block -> position."""
    at = {n: i for i, n in enumerate(run.graph.find_nodes(op="placeholder"))}
    return [{q: at[n] for q, n in members.items()} for members in run.families if all(n in at for n in members.values())]


def used(graph: fx.Graph) -> int:
    """How many of its inputs the operators of a graph take."""
    return sum(any(u.op != "output" for u in n.users) for n in graph.find_nodes(op="placeholder"))


def _marks(node: fx.Node) -> Hashable:
    custom = node.meta.get("custom", {})
    return bool(custom.get(BLOCK)), bool(custom.get(UNSHARD))


def _relabel(run: repeats.Repeats, missing: int) -> None:
    """Prepare a run for being shortened: what comes after the missing blocks is in the blocks that follow then."""
    before: dict[str, str] = {}
    for members in run.families[: run.region]:
        for q, node in members.items():
            if q + 1 in members:
                a, b = _label(node), _label(members[q + 1])
                if before.setdefault(b, a) != a:
                    raise repeats.NotEqual
    if len(set(before.values())) != len(before):
        raise repeats.NotEqual
    passed, last = False, (run.count - missing - 1) // 2 + missing
    for node in run.graph.nodes:
        family, number = run.place.get(node, (-1, 0))
        passed = passed or (0 <= family < run.region and number > last)
        label = _label(node)
        if not label or not (passed if family < 0 else number > last):
            continue
        for _ in range(missing):
            label = before.get(label, label)
        node.meta["custom"] = {**node.meta["custom"], BLOCK: label}


def _label(node: fx.Node) -> str:
    return node.meta.get("custom", {}).get(BLOCK, "")


def lengthen(traced: TracedInPart, missing: int
             ) -> tuple[repeats.Repeats, repeats.Repeats | None, dict[tuple[fx.Node, int], fx.Node]]:
    """Put the missing blocks into the forward graph, and into the backward graph if there is one.

    Returns the runs of both, as they are then, and the new nodes, by what they are copies of and how much further on.
    """
    graphs = traced.graphs
    places = graphs[0].graph.find_nodes(op="placeholder")
    fills = dict(zip(places, traced.inputs, strict=True))
    forward = repeats.find(graphs[0].graph, lambda n: (shapes(n), fills[n].facts() if n in fills else ()), STEADY)
    if forward is None:
        raise repeats.NotEqual
    repeats.add_inputs(forward, [{q: places[i] for q, i in members.items()} for members in traced.equal])
    results, kept = traced.saved()
    backward = _aligned(forward, graphs[1].graph, kept) if len(graphs) > 1 else None
    bases = {n: base for module in graphs for n, base in _bases(module.graph).items()}
    for run in (forward, backward):
        if run is not None:
            _check_sharing(run)
    made = periods.lengthen(forward, missing)
    bases |= {new: bases[old] for (old, _), new in made.items()}
    fills |= {new: fills[old] for (old, _), new in made.items() if old in fills}
    copies = dict(made)
    if backward is not None:
        more = periods.lengthen(backward, missing)
        copies |= more
        for (old, r), new in more.items():
            bases[new] = bases[old]
            if old in kept:
                family, _ = forward.place[kept[old]]
                kept[new] = made[forward.families[family][forward.split(family)], missing + 1 - r]
        places = [n for n in graphs[1].graph.find_nodes(op="placeholder") if not _is_tangent(n)]
        graphs[0].graph.output_node().args = ((*results, *(kept[n] for n in places)),)
    for module in graphs:
        _check_defined(module.graph)
        module.graph.lint()
        _number(module.graph)
        with compat.no_modes():
            _own_values(module.graph, bases, {new: copied for copied, new in copies.items()})
    traced.inputs = [fills[n] for n in graphs[0].graph.find_nodes(op="placeholder")]
    return forward, backward, copies


def _aligned(forward: repeats.Repeats, graph: fx.Graph, kept: dict[fx.Node, fx.Node]) -> repeats.Repeats:
    """The run of a backward graph that is that of the forward graph's blocks: what is made again may be a run of its own."""
    for run in repeats.runs(graph, shapes, STEADY):
        with contextlib.suppress(repeats.NotEqual):
            periods.align(forward, run, kept)
            return run
    raise repeats.NotEqual


def _check_defined(graph: fx.Graph) -> None:
    """Raise `NotEqual` where a value is used before it is made: what was put in stands in the place of more than one run."""
    made: set[fx.Node] = set()
    for node in graph.nodes:
        if not made.issuperset(node.all_input_nodes):
            raise repeats.NotEqual
        made.add(node)


def _number(graph: fx.Graph) -> None:
    """Have the nodes of a longer graph be in the blocks whose modules they are of, which `repeats` has numbered."""
    for node in graph.nodes:
        if _label(node):
            made_in = next((b for key in STACKS if (b := block_path(node, key))), _label(node))
            node.meta["custom"] = {**node.meta["custom"], BLOCK: made_in}


Bases = list[int | None]
"""Of every tensor that a node makes: which of the node's inputs it is a view of."""


def _bases(graph: fx.Graph) -> dict[fx.Node, Bases]:
    """Raises `NotEqual` if what an operator makes shares memory with a value that it is not made from."""
    seen: set[int] = set()
    out = {}
    for node in graph.nodes:
        inputs = [{_memory(v) for v in _tensors(x)} for x in node.all_input_nodes]
        own = [_memory(v) for v in _tensors(node)]
        out[node] = [next((i for i, held in enumerate(inputs) if m in held), None) for m in own]
        fresh = [m for m, base in zip(own, out[node], strict=True) if base is None]
        if len({*fresh}) < len(fresh) or (node.op != "placeholder" and seen & {*fresh}):
            raise repeats.NotEqual
        seen |= {*fresh}
    return out


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [value]
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _check_sharing(run: repeats.Repeats) -> None:
    """Raise `NotEqual` unless the inputs of each block share memory with each other as those of the block where copies are put in
    do: a backward takes queries, keys and values that are parts of one tensor."""
    further = {n: q - run.split(f) for n, (f, q) in run.place.items()}
    together: dict[int, list[fx.Node]] = {}
    for node in run.graph.find_nodes(op="placeholder"):
        for memory in map(_memory, _tensors(node)):
            together.setdefault(memory, []).append(node)
    partners: dict[int, set[frozenset[int]]] = {}
    for nodes in together.values():
        if len({further.get(n) for n in nodes}) > 1:
            raise repeats.NotEqual
        families = frozenset(run.place[n][0] for n in nodes if n in run.place)
        for family in families:
            partners.setdefault(family, set()).add(families)
    if any(len(found) > 1 for found in partners.values()):
        raise repeats.NotEqual


def _own_values(graph: fx.Graph, bases: dict[fx.Node, Bases], new: dict[fx.Node, tuple[fx.Node, int]]) -> None:
    """Give every new node a value of its own in ``meta``, or a view of its input's: Inductor reads from shared memory what may be
    written in place, and a copied node has the memory of what it was copied from. So have others that are views of a new one.

    new: which node each is a copy of, and how much further on.
    """
    memory: dict[Hashable, Tensor] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node in new:
            old, further = new[node]
            value = old.meta["val"]
            if isinstance(value, compat.FakeTensor):
                held = memory.setdefault((_memory(value), further), _same_size(value))
                node.meta["val"] = stages.fake_view(value, held)
                continue
        if node.target is operator.getitem:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]
            continue
        values = _tensors(node)
        if not values or (node not in new and all(_is_in(v, node, i) for v, i in zip(values, bases[node], strict=True))):
            continue
        if isinstance(node.meta["val"], Tensor):
            node.meta["val"] = _anew(values[0], node, bases[node][0])
            continue
        feed = iter(bases[node])
        node.meta["val"] = pytree.tree_map_only(Tensor, lambda v: _anew(v, node, next(feed)), node.meta["val"])  # noqa: B023


def _same_size(value: compat.FakeTensor) -> Tensor:
    """Memory of its own, as much as a value is in."""
    return compat.fake_like(value.fake_mode, value, value.device, torch.uint8, (value.untyped_storage().nbytes(),))


def _is_in(value: Tensor, node: fx.Node, base: int | None) -> bool:
    """Whether a value is in the memory of the input that it is a view of, if it is one."""
    return base is None or any(_memory(v) == _memory(value) for v in _tensors(node.all_input_nodes[base]))


def _anew(value: Tensor, node: fx.Node, base: int | None) -> Tensor:
    if not isinstance(value, compat.FakeTensor):
        raise repeats.NotEqual
    if base is None:
        return compat.fake_like(value.fake_mode, value, value.device)
    held = _tensors(node.all_input_nodes[base])
    if any(v.dtype != value.dtype for v in held) or len({_memory(v) for v in held}) > 1:
        raise repeats.NotEqual
    return stages.fake_view(value, held[0])


def shapes(node: fx.Node) -> Hashable:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return (*((str(tuple(v.shape)), str(v.stride()), v.dtype) if isinstance(v, Tensor) else str(v) for v in leaves), _marks(node))
