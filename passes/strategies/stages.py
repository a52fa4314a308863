"""stages: the local program of one rank is cut by depth into the programs of pipeline stages.

The cut comes after `partition`: what crosses it are local tensors, sent from a rank to the one at the same coordinate of the next
stage's mesh, and collectives stay within a stage. A node of the program is one of four kinds:

- *free*: depends on no parameter and on no input that wants a gradient (positions, masks, label counts);
- *weight*: depends on parameters, and on nothing of the batch (gathered or cast parameters, relative positions);
- *echo*: one activation in another form that takes as many bytes or more (gathered, marked as varying, cast up, viewed);
- *activation*: everything else.

Activations are made by one stage, and sent to later ones that use them, through the stages between. The other kinds are made
again by each stage that uses them and never sent: so a tied parameter is on several stages, whose gradients of it are to be
summed, and a gather of an activation stands behind the cut. Gradients need no rule of their own: autograd takes each stage's
backward, and what it returns for a received value is the gradient of what was sent.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from fxpar.cost.operators import Costs, TensorSpec, measure
from fxpar.cost.stages import recomputed
from fxpar.errors import PlanError
from fxpar.ops.collectives import GATHER, SAME, typed
from fxpar.ops.exchange import counted
from fxpar.ops.vocabulary import RESHAPES, is_view
from fxpar.program import Program, Sink, Source, copy_provenance, module_path, user_line
from fxpar.sharding.facts import describe_local, local_value
from fxpar.sharding.layout import Piece, shard_shape

aten = torch.ops.aten
FREE, WEIGHT, ECHO, ACTIVATION = "free", "weight", "echo", "activation"
COPIES = (*RESHAPES, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default)
"""Operators that hold their operand's elements, in another shape, dtype or order."""
IN_EVERY_CALL = "the names of modules that begin stages in every call"
SLACK = 0.02
"""How much larger than it has to be the largest stage may become where fewer bytes are sent for it."""


@dataclass(frozen=True)
class Message:
    """A value that crosses a cut, as every rank sends it to its partner in the next stage.

    name: the same in every stage's program. shape, bytes: on one rank. requires_grad: whether a gradient comes back (autograd may
    return None for one of zeros, where later stages use the value but for what has none).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    bytes: int


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of a pipeline.

    program: an ordinary local program. Its first sources, of kind "received", are what it `receives` from the stage before; its
        first outputs, with sinks of kind "sent", what it `sends` to the next. A value that it only relays is both, or received,
        used and sent on: the gradients of both uses are summed by autograd.
    outputs: which of the whole program's outputs it makes (positions in `Program.tensor_sinks`), in order, behind what it sends.
        Leaves of the model's output that are no tensors belong to no stage. The new value of a buffer that depends on no
        activation (a counter's) is made by every stage that reads the buffer, as each has its own copy, and by the last.
    first, last: the modules that make its first and its last activation; "" for the model itself.
    flops: of one microbatch, forward and backward, and forward again where the plan recomputes it.
    parameter_bytes: of the parameters that it uses, as they are stored on one rank; a tied one counts on each of its stages.
    """

    index: int
    program: Program
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]
    outputs: tuple[int, ...]
    first: str
    last: str
    flops: int
    parameter_bytes: int

    @property
    def bytes_sent(self) -> int:
        """What crosses the cut behind it on one rank, forward, for one microbatch."""
        return sum(m.bytes for m in self.sends)

    @property
    def bytes_returned(self) -> int:
        """The same of gradients, which come back through it."""
        return sum(m.bytes for m in self.sends if m.requires_grad)


def cut_stages(program: Program, count: int, boundaries: Sequence[str | fx.Node] | None = None) -> list[Stage]:
    """Cut a partitioned program, which is left as it is, into the programs of `count` stages.

    boundaries: where the stages behind the first begin, in order: names of modules (a stage begins with the first activation that
    the module makes), or nodes of the program. Default: those of the plan, `Plan.stage_boundaries`; where it has none, the
    largest stage is as small as it can be (within `SLACK`), and of such cuts those are taken that fewest bytes cross.

    Afterwards: the stages' programs, run one after the other on what each sends to the next, compute what the whole program
    computes; their backwards, in the opposite order, its gradients, where those of a parameter on several stages are summed.
    What depends on no activation is returned by the last stage. A stage that reads a buffer which the program updates makes
    its new value, too.
    Raises: `PlanError` where there are not enough places to cut, a boundary is none, or a stage reads a buffer that another
    updates.
    """
    depth = _Depth(program)
    wanted = (program.plan.stage_boundaries if boundaries is None else boundaries) if count > 1 else ()
    at = _named(depth, count, wanted) if wanted else _chosen(depth, count)
    bounds = [0, *at, len(depth.order)]
    return [_stage(depth, i, bounds) for i in range(count)]


class _Depth:
    """A program seen as a line of activations, which may be cut between any two.

    order: the activations, in the order of the program. position: where each stands in it; the results of an operator that
    has several all stand where it does, and what only a buffer's new value is made of where the last of its operands does, since
    that stage reads the buffer. last: the position of the last operator that uses one, itself or an echo of it.
    root: of an activation or echo, the activation. crossing: how many bytes cross a cut in front of each position. done: the cost
    of what comes before it. sealed: positions in front of which is no cut, as messages have sizes that ranks know before.
    """

    def __init__(self, program: Program):
        self.program = program
        self.measured: Costs = measure(program)
        self.number = {n: i for i, n in enumerate(program.graph.nodes)}
        self.sources = program.source_of()
        self.kind: dict[fx.Node, str] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self._of_batch: dict[fx.Node, bool] = {}
        self._for_buffers = _for_buffers(program)
        self.order: list[fx.Node] = []
        self.position: dict[fx.Node, int] = {}
        self.last: dict[fx.Node, int] = {}
        for node in program.graph.nodes:
            if node.op != "output":
                self._add(node)
        self.crossing, self.done = self._crossing(), self._done()
        late = counted(program.graph) & self.last.keys()
        self.sealed = {p for n in late for p in range(self.position[n] + 1, self.last[n] + 1)}

    def _add(self, node: fx.Node) -> None:
        self.kind[node] = self._kind(node)
        if self.kind[node] == ECHO:
            self.root[node] = self.root[node.all_input_nodes[0]]
        if self.kind[node] != ACTIVATION:
            return
        self.root[node] = node
        before = [self.position[self.root[n]] for n in node.all_input_nodes if n in self.root]
        if before and (self._is_part(node) or node in self._for_buffers):
            self.position[node] = max(before)
        else:
            self.position[node] = len(self.order)
            self.order.append(node)
        self.last[node] = self.position[node]
        for used in node.all_input_nodes:
            if used in self.root:
                self.last[self.root[used]] = self.position[node]

    def _kind(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            source = self.sources[node]
            self._of_batch[node] = source.kind not in ("param", "buffer", "constant")
            return WEIGHT if source.kind == "param" else ACTIVATION if source.requires_grad else FREE
        inputs = node.all_input_nodes
        kinds = {self.kind[n] for n in inputs}
        self._of_batch[node] = any(self._of_batch[n] for n in inputs)
        if kinds & {ACTIVATION, ECHO}:
            return ECHO if self._is_echo(node) else ACTIVATION
        if WEIGHT not in kinds:
            return FREE
        return ACTIVATION if self._of_batch[node] else WEIGHT

    def _is_part(self, node: fx.Node) -> bool:
        """Whether it is one result of an operator that has several."""
        made = self.value(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None
        return isinstance(made, tuple)

    def _is_echo(self, node: fx.Node) -> bool:
        """Whether making it again costs nothing but communication within a stage, and sending it would cost as much or more."""
        if len(node.all_input_nodes) != 1:
            return False
        made, before, after = typed(node), self.value(node.all_input_nodes[0]), self.value(node)
        moves = made.forward in (GATHER, SAME) if made is not None else is_view(node) or node.target in COPIES
        return (moves and isinstance(before, TensorSpec) and isinstance(after, TensorSpec) and before.bytes <= after.bytes
                and before.requires_grad == after.requires_grad)

    def value(self, node: fx.Node) -> Any:
        return self.measured.values[node]

    def _crossing(self) -> list[int]:
        change = [0] * (len(self.order) + 1)
        for node, last in self.last.items():
            if last > self.position[node]:
                change[self.position[node] + 1] += self.value(node).bytes
                change[last + 1] -= self.value(node).bytes
        return list(accumulate(change))

    def _done(self) -> list[int]:
        return list(accumulate(map(self.flops, self.order), initial=0))

    def flops(self, node: fx.Node) -> int:
        """Forward and backward; and forward again where the plan recomputes it."""
        cost = self.measured.costs.get(node)
        if cost is None:
            return 0
        if not self.program.training:
            return cost.forward
        return cost.forward + int(recomputed(self.program, node) * cost.forward) + cost.backward

    def across(self, position: int) -> list[fx.Node]:
        """The activations that cross a cut in front of a position."""
        return [n for n, last in self.last.items() if self.position[n] < position <= last]


def cut_like(program: Program, stages: Sequence[Stage]) -> list[Stage]:
    """Cut another program of the same model (other shapes, another mode) so that each stage uses parameters that the one of
    `stages` uses, which hold them already.

    A stage begins where a parameter is used first that no earlier stage uses; one that has none (a head that shares the table)
    where one of its own is used after the last use of those that only earlier stages have.
    Raises: `PlanError` where that is no order, or a stage would use a parameter that it does not hold, or read a buffer that
    another one updates.
    """
    depth = _Depth(program)
    parameters = [_parameters(s.program) for s in stages]
    uses = _uses(depth)
    at: list[int] = []
    for i in range(1, len(stages)):
        new = parameters[i] - set().union(*parameters[:i])
        earlier = set().union(*parameters[:i]) - parameters[i]
        behind = -1 if new else max((uses[name][-1] for name in earlier if name in uses), default=-1)
        mine = [place for name in new or parameters[i] for place in uses.get(name, ()) if place > behind]
        at.append(min(mine, default=-1))
    bounds = [0, *at, len(depth.order)]
    made = [_stage(depth, i, bounds) for i in range(len(stages))] if all(a < b for a, b in pairwise(bounds)) else []
    if not made or not all(_parameters(s.program) <= have for s, have in zip(made, parameters, strict=True)):
        _refuse((), "must say where stages begin: called like this the model uses its parameters in another order than it did "
                "first, and they are on the ranks of their stages already", IN_EVERY_CALL)
    for each, others in ((stages, made), (made, stages)):
        updated = set().union(*(_updated(s.program) for s in each))
        for one, other in zip(each, others, strict=True):
            for name in sorted((_read_buffers(other.program) & updated) - _updated(one.program)):
                _refuse((), f"must say where stages begin: called like this the model has buffer {name!r} on another stage than "
                        "it did first, and what the one makes of it the other does not have", IN_EVERY_CALL)
    return made


def _parameters(program: Program) -> set[str]:
    return {s.name for n, s in program.source_of().items() if s.kind == "param" and n.users}


def _read_buffers(program: Program) -> set[str]:
    return {s.name for n, s in program.source_of().items() if s.kind == "buffer" and n.users}


def _updated(program: Program) -> set[str]:
    return {s.name for s in program.sinks if s.kind == "buffer"}


def _uses(depth: _Depth) -> dict[str, list[int]]:
    """Name of a parameter -> the positions of the activations that use it."""
    behind: dict[fx.Node, frozenset[str]] = {}
    found: dict[str, list[int]] = {}
    for node in depth.number:
        if node.op == "output":
            continue
        source = depth.sources.get(node)
        names = frozenset([source.name]) if source is not None and source.kind == "param" else frozenset().union(
            *(behind.get(n, ()) for n in node.all_input_nodes))
        if depth.kind[node] == ACTIVATION:
            for name in names:
                found.setdefault(name, []).append(depth.position[node])
        elif names:
            behind[node] = names
    return found


# ---- where to cut ----


def _chosen(depth: _Depth, count: int) -> list[int]:
    """The cost model's cuts. Where several places have the same cost before them, the one that fewest bytes cross stands for
    all; so there is one for each operator with a cost, and a stage has at least one of these."""
    done, crossing = depth.done, depth.crossing
    lightest: dict[int, int] = {}
    for place in range(1, len(depth.order)):
        level = done[place]
        inside = 0 < level < done[-1] and place not in depth.sealed
        if inside and (level not in lightest or crossing[place] < crossing[lightest[level]]):
            lightest[level] = place
    places = [0, *lightest.values(), len(depth.order)]
    if count >= len(places):
        _refuse_count(depth.program, count, len(places) - 1)
    levels = [done[p] for p in places]
    bound = int(_least_bound(levels, count) * (1 + SLACK))
    chosen = _lightest_within(levels, [crossing[p] for p in places], count, bound)
    return [places[i] for i in chosen]


def _least_bound(levels: list[int], count: int) -> int:
    """The cost of the largest of `count` stages where it is smallest. levels: the cost before each place, from 0 to all."""
    low, high = max(b - a for a, b in pairwise(levels)), levels[-1]
    while low < high:
        bound, start, used = (low + high) // 2, 0, 0
        while start < len(levels) - 1 and used <= count:  # as much as fits into each stage
            start, used = bisect_right(levels, levels[start] + bound) - 1, used + 1
        low, high = (low, bound) if used <= count else (bound + 1, high)
    return low


def _lightest_within(levels: list[int], crossing: list[int], count: int, bound: int) -> list[int]:
    """The cuts between `count` stages none of which costs more than `bound`, that fewest bytes cross; of those, the most even.

    By dynamic programming over the places: a cut behind the k-th stage can stand only where k stages reach and the others reach
    the end, which are few places; and before it only those that one stage reaches.
    """
    total, end = levels[-1], len(levels) - 1
    before: list[dict[int, int]] = []  # of each stage: where it ends -> where it begins
    cost = np.array(levels, dtype=float)
    sent, uneven = np.full(end + 1, np.inf), np.zeros(end + 1)
    sent[0] = 0
    for stage in range(1, count + 1):
        first = max(stage, bisect_left(levels, total - (count - stage) * bound))
        last = min(end - (count - stage), bisect_right(levels, stage * bound) - 1)
        more, rougher = np.full(end + 1, np.inf), np.zeros(end + 1)
        before.append({})
        for place in range(first, last + 1):
            reach = slice(bisect_left(levels, levels[place] - bound), place)
            fewest = sent[reach].min()
            if fewest < np.inf:
                squares = np.where(sent[reach] == fewest, uneven[reach] + (cost[place] - cost[reach]) ** 2, np.inf)
                more[place], rougher[place] = fewest + crossing[place], squares.min()
                before[-1][place] = reach.start + int(squares.argmin())
        sent, uneven = more, rougher
    cuts = [end]
    for begins in reversed(before):
        cuts.append(begins[cuts[-1]])
    return cuts[-2:0:-1]


def _refuse_count(program: Program, count: int, most: int) -> NoReturn:
    virtual = program.plan.virtual_stages
    requirement = (f"with virtual_stages = {virtual} asks for {count} stages, and the model has operators for {most}: each stage "
                   "has a matrix product, a convolution or an attention")
    raise PlanError("pp", count // virtual, requirement, f"pp={max(most // virtual, 1)}")


def _named(depth: _Depth, count: int, boundaries: Sequence[str | fx.Node]) -> list[int]:
    """The positions of the activations that the stages behind the first begin with."""
    names = tuple(b if isinstance(b, str) else b.name for b in boundaries)
    if len(names) != count - 1:
        _refuse(names, f"must name the first module of every stage but the first, which are {count - 1}, and names {len(names)}",
                "leaving stage_boundaries out")
    begins: dict[str, int] = {}
    for position, node in enumerate(depth.order):
        for path in _paths(node):
            begins.setdefault(path, position)
    numbers = [depth.number[n] for n in depth.order]
    found = [_begin(depth, names, b, begins) if isinstance(b, str) else bisect_left(numbers, depth.number[b])
             for b in boundaries]
    ordered = [n for _, n in sorted(zip(found, names))]
    for name, position, earlier, before in zip(names, found, ["", *names], [0, *found]):
        if position in (0, len(numbers)):
            _refuse(names, f"leaves no operator for the stage {'before' if position == 0 else 'that begins with'} {name!r}",
                    "a module between the first and the last")
        if position in depth.sealed:
            _refuse(names, f"must not begin a stage inside of experts, as {name!r} does: their rows are under way", "the layer")
        if position == before:
            _refuse(names, f"begins two stages with the same operator: {earlier!r} and {name!r} begin with it",
                    "modules that begin one after the other")
        if position < before:
            _refuse(names, f"must name modules in the order in which they run: {name!r} runs before {earlier!r}",
                    f"stage_boundaries={';'.join(ordered)}")
    return found


def _begin(depth: _Depth, names: tuple[str, ...], name: str, begins: dict[str, int]) -> int:
    if name in begins:
        return begins[name]
    if any(name in _paths(n) for n in depth.number):
        _refuse(names, f"must name modules that make activations; what {name!r} makes depends on no parameter or no input and is "
                "made by every stage that uses it", "the module that uses it")
    match = difflib.get_close_matches(name, begins, n=1) or list(begins)[-1:]
    _refuse(names, f"must name modules of the model that run: {name!r} is none",
            f"stage_boundaries={';'.join(match[0] if n == name else n for n in names)}" if match else "stage_boundaries=none")


def _refuse(names: tuple[str, ...], requirement: str, suggestion: str) -> NoReturn:
    raise PlanError("stage_boundaries", names, requirement, suggestion)


def _paths(node: fx.Node) -> list[str]:
    """The modules that an operator is in, as "model", "model.layers", "model.layers.0"."""
    return list(accumulate(module_path(node).split("."), "{}.{}".format)) if module_path(node) else []


# ---- the stages' programs ----


def _stage(depth: _Depth, index: int, bounds: list[int]) -> Stage:
    program, (begin, end) = depth.program, bounds[index : index + 2]
    final = index == len(bounds) - 2
    received, sent = (sorted(depth.across(p), key=depth.number.__getitem__) for p in (begin, end))
    outputs = program.outputs()
    mine = [i for i, n in enumerate(outputs)
            if (begin <= depth.position[depth.root[n]] < end if n in depth.root else final)]
    mine = _with_buffers(depth, index, mine, sent, set(received))
    results = [*sent, *(outputs[i] for i in mine)]
    graph, copies = fx.Graph(), {}
    sources: list[Source] = []
    for node in received:
        copies[node] = _receive(depth, graph, node)
        value = depth.value(node)
        sources.append(Source("received", node.name, value.empty(), value.requires_grad))
    for node in _needed(depth, results, set(received)):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "placeholder":
            sources.append(depth.sources[node])
    graph.output(tuple(copies[n] for n in results))
    sinks = [*(Sink("sent", n.name) for n in sent), *(program.tensor_sinks()[i] for i in mine)]
    made = replace(program, module=fx.GraphModule(program.module, graph), sources=sources, sinks=sinks, timings={},
                   notes=list(program.notes), placements=None)
    parameters = sum(depth.value(n).bytes for n in copies if n.op == "placeholder" and depth.sources[n].kind == "param")
    ends = module_path(depth.order[begin]), module_path(depth.order[end - 1])
    return Stage(index, made, _messages(depth, received), _messages(depth, sent), tuple(mine), *ends,
                 sum(depth.flops(n) for n in copies if n not in received), parameters)


def _for_buffers(program: Program) -> set[fx.Node]:
    """What is made for new values of buffers, and for nothing else."""
    found: set[fx.Node] = set()
    others = {n for s, n in zip(program.tensor_sinks(), program.outputs(), strict=True) if s.kind != "buffer"}
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and node not in others and all(u.op == "output" or u in found for u in node.users):
            found.add(node)
    return found


def _with_buffers(depth: _Depth, index: int, mine: list[int], sent: list[fx.Node], received: set[fx.Node]) -> list[int]:
    """The outputs `mine` of a stage, and the new values of the buffers that it reads."""
    outputs = depth.program.outputs()
    updates = {s.name: i for i, s in enumerate(depth.program.tensor_sinks()) if s.kind == "buffer"}
    while True:
        needed = _needed(depth, [*sent, *(outputs[i] for i in mine)], received)
        read = {depth.sources[n].name: n for n in needed if n.op == "placeholder" and depth.sources[n].kind == "buffer"}
        more = {updates[name]: n for name, n in read.items() if name in updates and updates[name] not in mine}
        for i, n in more.items():
            if outputs[i] in depth.root:
                _refuse_buffer(depth, depth.sources[n].name, outputs[i], index, [u for u in n.users if u in needed])
        if not more:
            return sorted(mine)
        mine = [*mine, *more]


def _refuse_buffer(depth: _Depth, name: str, new: fx.Node, stage: int, readers: list[fx.Node]) -> NoReturn:
    lines = [f" ({line})" if (line := user_line(n)) else "" for n in (readers[0], new)]
    raise PlanError("stage_boundaries", depth.program.plan.stage_boundaries,
                    f"must leave buffer {name!r} to one stage: stage {stage} reads it{lines[0]}, and another stage updates "
                    f"it{lines[1]}, whose ranks alone would have its new value",
                    "names of modules that begin stages so that both are in one stage, or fewer stages")


def _needed(depth: _Depth, results: list[fx.Node], received: set[fx.Node]) -> list[fx.Node]:
    """What a stage makes of what it receives, of parameters and inputs; placeholders first, in the order of the program."""
    seen, stack = set(received), list(results)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return sorted(seen - received, key=lambda n: (n.op != "placeholder", depth.number[n]))


def _receive(depth: _Depth, graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The placeholder for a value of an earlier stage. It is described as `partition` describes placeholders; a value that is
    part of no global one (a sum before it is complete, a part between two reshardings) as its local self."""
    new, value = graph.placeholder(node.name), depth.value(node)
    copy_provenance(new, node)
    describe_local(new, source=node.name, needs_grad=value.requires_grad, dtype=value.dtype)
    known = local_value(node)
    if known.sharding is not None and shard_shape(known.sharding, depth.program.mesh) == value.shape:
        describe_local(new, full=known.full, sharding=known.sharding, layout_text=known.layout_text,
                       global_name=known.global_name)
    else:
        describe_local(new, full=value.empty().detach(), sharding=tuple((Piece(n),) for n in value.shape),
                       layout_text=str(list(value.shape)))
    return new


def _messages(depth: _Depth, nodes: list[fx.Node]) -> tuple[Message, ...]:
    return tuple(Message(n.name, v.shape, v.dtype, v.requires_grad, v.bytes) for n in nodes for v in [depth.value(n)])
