"""traffic: what a step communicates: collectives alike, and totals of them, by strategy and by axis."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpar.cost.operators import measure
from fxpar.ops.collectives import Collective, typed
from fxpar.ops.ring.costs import traffic_of
from fxpar.ops.ring.operator import axes_of
from fxpar.ops.rng import dropout_mask
from fxpar.ops.vocabulary import is_view
from fxpar.passes.partition.phases import once_a_step
from fxpar.plan import Plan
from fxpar.program import Program, block_path, module_path
from fxpar.sharding.facts import local_value
from fxpar.sharding.mesh import Axes, Mesh

aten = torch.ops.aten
ADDS = (aten.add.Tensor, aten.sub.Tensor)
SCALED = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
ADDED: dict[Any, int] = {**dict.fromkeys(PRODUCTS, 2), aten.addmm.default: 0, aten.layer_norm.default: 3}
"""Operator -> which of its operands it adds: its backward does not read that one."""
RING = "ring"
"""The kind of what ring attention sends around."""


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives alike: kind ("all_gather", ...), axes, phase ("forward" or "backward"), the module they serve (layer
    numbers replaced by ``*``), how many a step, and the bytes of their results on one rank, all together.

    The kind "ring" is what ring attention sends around: each counts as one, with all keys and values that a rank receives, in
    the backward their gradients too.

    stage: of a pipeline, whose ranks take part; None where all do. What is sent from stage to stage is in `Report.pipeline`.
    strategy: what they are for: "zero" (parameters in parts, and their gradients), or the strategy whose axes they are over
    ("dp", "tp", "cp", "ep", "pp"; several joined by "+").
    """

    kind: str
    axes: tuple[str, ...]
    phase: str
    where: str
    count: int
    bytes: int
    stage: int | None = None
    strategy: str = ""


@dataclass(frozen=True)
class Total:
    """What a step communicates for one strategy, or over one group of axes, on the pipeline rank that has most.

    count: collectives (of "pp", messages). forward, backward: bytes that they leave on one rank.
    """

    name: str
    count: int
    forward: int
    backward: int

    @property
    def bytes(self) -> int:
        return self.forward + self.backward


def rows_of(program: Program, count: int, stage: int | None = None) -> list[CollectiveRow]:
    """Those of a step of `count` microbatches, of which the program runs one, and what ring attention sends around. What all
    microbatches are passed is computed once; so are unsharded parameters and the sums of gradients, as far as the plan keeps them
    (see `once_a_step`), where gradients are wanted and in pipelines. Under zero=3 parameters are gathered for the backward pass
    once more (see `gathered_again`)."""
    rows: dict[tuple, list[int]] = {}

    def add(kind: str, axes: Axes, strategy: str, phase: str, node: fx.Node, size: int, times: int) -> None:
        where = re.sub(r"\b\d+\b", "*", module_path(node))
        entry = rows.setdefault((kind, axes, phase, where, strategy), [0, 0])
        entry[0] += times
        entry[1] += times * size

    step, keeps = program.microbatches, count > 1 and (program.training or stage is not None)
    once_forward, once_backward = once_a_step(program) if keeps else (set(), set())
    again = gathered_again(program)
    before = [] if step is None or step.prologue is None else list(step.prologue.graph.nodes)
    for node, times in [*((n, count) for n in program.graph.nodes), *((n, 1) for n in before)]:
        made = typed(node)
        if made is None:
            continue
        size, of = local_value(node).bytes, (made.axes, strategy_of(node, made, program.mesh))
        if made.forward.comm is not None:
            add(made.forward.comm, *of, "forward", node, size, 1 if node in once_forward else times)
            if node in again:
                add(made.forward.comm, *of, "backward", node, size, times)
        if local_value(node).needs_grad and made.backward is not None and made.backward.comm is not None:
            back = returned_bytes(node, made, program.mesh)
            add(made.backward.comm, *of, "backward", node, back, 1 if node in once_backward else times)
    for node, axes, there, back in sent_around(program):
        add(RING, axes, "cp", "forward", node, there, count)
        if back:
            add(RING, axes, "cp", "backward", node, back, count)
    ordered = sorted(rows.items(), key=lambda r: (r[0][2] != "forward", r[0]))
    return [
        CollectiveRow(kind, axes, phase, where, times, size, stage, strategy)
        for (kind, axes, phase, where, strategy), (times, size) in ordered
    ]


def returned_bytes(node: fx.Node, made: Collective, mesh: Mesh) -> int:
    """Bytes that the backward of a collective leaves on one rank."""
    known = local_value(node)
    assert known.result is not None
    return made.backward_bytes(known.bytes, local_value(made.value).dtype or known.result[1], mesh)


def sent_around(program: Program) -> Iterator[tuple[fx.Node, Axes, int, int]]:
    """The ring attentions of a program, with the axes that keys and values go round, and the bytes that a rank receives, forward
    and backward."""
    calls = [(n, axes) for n in program.graph.nodes if (axes := axes_of(n)) is not None]
    values = measure(program).values if calls else {}
    for node, axes in calls:
        there, back = traffic_of(node, program.mesh.size(*axes), values)
        yield node, axes, there, back if program.training and values[node].requires_grad else 0


def strategy_of(node: fx.Node, made: Collective, mesh: Mesh) -> str:
    """What a collective is for; see `CollectiveRow`."""
    if local_value(node).unshard:
        return "zero"
    if made.kind.startswith("to_"):
        return "ep"
    left, named = {a for a in made.axes if mesh.size(a) > 1}, []
    for strategy in ("dp", "cp", "tp"):
        mine = left & {*mesh.axes(strategy)}
        left -= mine
        named += [strategy] if mine else []
    return "+".join(named) or "+".join(made.axes)


def gathered_again(program: Program) -> set[fx.Node]:
    """The gathers of a program that its backward pass does again: under zero=3 those of stored parameters which it reads, but for
    those used behind the last block, which are kept. Under a memory budget all that may be: what is made again, and so reads its
    parameters again, is then PyTorch's choice; so it is, under a plan that recomputes, of what a model computes between modules
    of a block and outside of it."""
    if not program.training or not program.plan.gathers_each_use:
        return set()
    nodes = list(program.graph.nodes)
    last = max((i for i, n in enumerate(nodes) if n.op == "call_function" and block_path(n)), default=-1)
    keep, wants = {*nodes[last + 1 :]} if last >= 0 else set(), _want_gradients(program)
    again = _made_again(nodes, wants, program.plan)
    return {
        n
        for n in nodes
        if n not in keep
        and (made := typed(n)) is not None
        and made.gathers
        and local_value(n).unshard
        and any(_reads(user, value, wants) or user in again for user, value in _uses(n))
    }


def _want_gradients(program: Program) -> set[fx.Node]:
    """The nodes to which, as far as the graph tells, a gradient flows."""
    found = {n for n, s in program.source_of().items() if s.requires_grad}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not dropout_mask and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _uses(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(operator, its operand) of all that use a gathered parameter, through views and casts."""
    for user in node.users:
        if len(user.all_input_nodes) == 1 and user.op == "call_function" and typed(user) is None:
            yield from _uses(user)
        else:
            yield user, node


def _reads(user: fx.Node, value: fx.Node, wants: set[fx.Node]) -> bool:
    """Whether the backward of an operator reads its operand. wants: nodes that get gradients."""
    if user not in wants or is_view(user) or user.target in ADDS or typed(user) is not None:
        return False
    position = ADDED.get(user.target)
    added = user.args[position] if position is not None and len(user.args) > position else None
    others = [n for n in user.all_input_nodes if n not in (value, added)]
    return value is not added and (any(n in wants for n in others) if others else user.target not in SCALED)


def _made_again(nodes: list[fx.Node], wants: set[fx.Node], plan: Plan) -> set[fx.Node]:
    """The operators that run once more for the backward pass, by what the plan recomputes: for others of their block, whose
    backward reads their result or which run once more themselves. (Of what it masks, dropout's mask reads the shape alone.)"""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if plan.recompute == "none" or not block_path(node) or (plan.recompute == "selective" and node.target in PRODUCTS):
            continue
        users = [u for u in node.users if block_path(u) == block_path(node) and u.target is not dropout_mask]
        if any(_reads(u, node, wants) or u in found for u in users):
            found.add(node)
    return found


def totals(rows: Sequence[CollectiveRow], owner: Sequence[int] | None, by: str) -> list[Total]:
    """What rows come to. by: "strategy" or "axes". owner: of a pipeline, the rank that holds each stage."""
    found: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        name = row.strategy if by == "strategy" else "+".join(row.axes)
        entry = found.setdefault(name, {}).setdefault(owner[row.stage] if owner and row.stage is not None else 0, [0, 0, 0])
        entry[0] += row.count
        entry[1 if row.phase == "forward" else 2] += row.bytes
    most = {name: max(ranks.values(), key=lambda each: each[1] + each[2]) for name, ranks in found.items()}
    made = [Total(name, *numbers) for name, numbers in most.items()]
    return sorted(made, key=lambda total: -total.bytes)
