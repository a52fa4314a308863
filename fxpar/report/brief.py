"""brief: the lowered graphs of a long run of equal blocks, of which a few are traced."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpar.backends import repeats
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.remat import BLOCK, UNSHARD
from fxpar.compat import stages
from fxpar.plan import Plan
from fxpar.report import kept

KEPT, WORTH, STEADY = 5, 2, 3
"""Of a run of equal blocks, how many are traced; how many more there have to be for that to gain anything; how many of those that
are traced have to have equal traces."""


@dataclass
class Input:
    """A tensor that the graphs take: fake, of local shape; which part of a peak it is; whether the optimizer has state for it."""

    value: Tensor
    part: str
    trained: bool = False

    def facts(self) -> Hashable:
        """What is equal of inputs that stand for each other in equal blocks."""
        value = self.value
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad, self.part, self.trained


def lowered(plain: fx.GraphModule, taken: list[Input], plan: Plan) -> tuple[list[fx.Graph], list[Input]] | None:
    """What `memory.trace` gives, of a program (it is spoilt) of which few of many equal blocks are traced.

    Proved, by operators and their connections: that the blocks are equal; that their traces are, in the middle; that what those
    keep is what the partitioner would have all blocks keep. Then the traces get the other blocks back, before the passes of
    Inductor and ours that look at all of a graph. None where one of these cannot be proved: no long run of equal blocks; traces
    that do not repeat as blocks do; a memory budget, which is for all blocks together.
    """
    if plan.memory_budget is not None:
        return None
    fills = dict(zip(plain.graph.find_nodes(op="placeholder"), taken, strict=True))
    run = repeats.find(plain.graph, lambda n: fills[n].facts() if n in fills else _marks(n), KEPT + WORTH)
    if run is None:
        return None
    missing = run.count - KEPT
    decisions: list[stages.Decision] = []
    settings = inductor.settings(plan, as_on_gpu=True)
    try:
        _relabel(run, missing)
        repeats.shorten(run, missing)
        plain.recompile()
        few = [fills[n] for n in plain.graph.find_nodes(op="placeholder")]
        if len(few) == len(taken):
            return None  # how many blocks are put back is told by the inputs that they take
        graphs = stages.graphs_before(plain, [i.value for i in few], settings, decisions.append)
        whole = _lengthened(graphs, few, missing)
        for decision in decisions:
            kept.confirm(decision, missing, len(whole), STEADY)
    except repeats.NotEqual:
        return None
    if Counter(i.facts() for i in whole) != Counter(i.facts() for i in taken):
        return None
    return [stages.apply_graph_passes(g, settings).graph for g in graphs], whole


def _marks(node: fx.Node) -> Hashable:
    custom = node.meta.get("custom", {})
    return bool(custom.get(BLOCK)), bool(custom.get(UNSHARD))


def _relabel(run: repeats.Repeats, missing: int) -> None:
    """Prepare a run for being shortened: what comes after the missing blocks is in the blocks that follow then."""
    before: dict[str, str] = {}
    for members in run.families[: run.region]:
        for q, node in members.items():
            if q + 1 in members:
                a, b = (n.meta["custom"][BLOCK] for n in (node, members[q + 1]))
                if before.setdefault(b, a) != a:
                    raise repeats.NotEqual
    if len(set(before.values())) != len(before):
        raise repeats.NotEqual
    passed, last = False, (run.count - missing - 1) // 2 + missing
    for node in run.graph.nodes:
        family, number = run.place.get(node, (-1, 0))
        passed = passed or (0 <= family < run.region and number > last)
        if "custom" not in node.meta or not (passed if family < 0 else number > last):
            continue
        label = node.meta["custom"][BLOCK]
        for _ in range(missing):
            label = before.get(label, label)
        node.meta["custom"] = {**node.meta["custom"], BLOCK: label}


def _lengthened(graphs: list[fx.GraphModule], few: list[Input], missing: int) -> list[Input]:
    """Put the missing blocks into the forward graph, and into the backward graph if there is one; what the forward then takes."""
    fills = dict(zip(graphs[0].graph.find_nodes(op="placeholder"), few, strict=True))
    forward = repeats.find(graphs[0].graph, lambda n: (_shapes(n), fills[n].facts() if n in fills else ()), STEADY)
    if forward is None:
        raise repeats.NotEqual
    outputs: Any = graphs[0].graph.output_node().args[0]
    results, kept = list(outputs), {}
    backward = None
    if len(graphs) > 1:
        backward = repeats.find(graphs[1].graph, _shapes, STEADY)
        if backward is None:
            raise repeats.NotEqual
        places = [n for n in graphs[1].graph.find_nodes(op="placeholder") if not n.name.startswith("tangents")]
        results, saved = outputs[: len(outputs) - len(places)], outputs[len(outputs) - len(places) :]
        kept = dict(zip(places, saved, strict=True))
        repeats.align(forward, backward, kept)
    bases = {n: _base(n) for module in graphs for n in module.graph.nodes}
    made = repeats.lengthen(forward, missing)
    bases |= {new: bases[old] for (old, _), new in made.items()}
    fills |= {new: fills[old] for (old, _), new in made.items() if old in fills}
    if backward is not None:
        for (old, r), new in repeats.lengthen(backward, missing).items():
            bases[new] = bases[old]
            if old in kept:
                family, _ = forward.place[kept[old]]
                kept[new] = made[forward.families[family][forward.split(family)], missing + 1 - r]
        places = [n for n in graphs[1].graph.find_nodes(op="placeholder") if not n.name.startswith("tangents")]
        graphs[0].graph.output_node().args = ((*results, *(kept[n] for n in places)),)
    for module in graphs:
        module.graph.lint()
        _own_values(module.graph, bases)
    return [fills[n] for n in graphs[0].graph.find_nodes(op="placeholder")]


def _base(node: fx.Node) -> int | None:
    """Which of its inputs a node's value is a view of."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        for i, x in enumerate(node.all_input_nodes):
            other = x.meta.get("val")
            if isinstance(other, Tensor) and other.untyped_storage()._cdata == value.untyped_storage()._cdata:
                return i
    return None


def _own_values(graph: fx.Graph, bases: dict[fx.Node, int | None]) -> None:
    """Give every node a value of its own in ``meta``, or a view of its input's: Inductor reads from shared memory what may be
    written in place, and a copied node has the memory of what it was copied from."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]
        elif isinstance(value, Tensor) and (i := bases[node]) is not None:
            base = node.all_input_nodes[i].meta["val"]
            if base.dtype != value.dtype:
                raise repeats.NotEqual
            node.meta["val"] = base.as_strided(value.shape, value.stride(), value.storage_offset())
        elif value is not None:
            node.meta["val"] = pytree.tree_map_only(Tensor, lambda v: v.new_empty_strided(v.shape, v.stride()), value)


def _shapes(node: fx.Node) -> Hashable:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return (*((str(tuple(v.shape)), str(v.stride()), v.dtype) if isinstance(v, Tensor) else str(v) for v in leaves), _marks(node))
