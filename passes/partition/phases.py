"""phases: a local program as the phases of a step: unshard parameters, compute microbatches, reduce gradients.

Between the microbatches of one step parameters do not change: they are gathered once, and what was gathered is passed in. And
where gradients may stay unreduced (zero=0 and 1) they are summed over ranks once, after the last microbatch or along with it.

    parameters --unshard--> values --compute--> loss ... values' gradients --reduce--> parameters' gradients
                              |______ per microbatch ______________|
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpar.ops.collectives import Collective, typed
from fxpar.program import Program, Source
from fxpar.sharding.facts import local_value
from fxpar.sharding.mesh import Axes


@dataclass(eq=False)
class Boundary:
    """Where a parameter becomes what the model computes with: the last of the collectives between the two.

    node: that collective in the program. chain: the nodes from the parameter to it. source: the parameter.
    gathers: it is a gather, whose result can be kept. sums: its backward sums what differs between ranks with other data.
    """

    node: fx.Node
    chain: tuple[fx.Node, ...]
    source: Source
    gathers: bool
    sums: bool

    @property
    def key(self) -> str:
        """The same for the same boundary in another program of the model."""
        steps = (f"{getattr(n.target, '__name__', n.target)}{n.args[1:]}" for n in self.chain[1:])
        return " ".join([self.source.name, *steps])

    @property
    def dtype(self) -> torch.dtype:
        """In which its gradients are summed."""
        made = typed(self.node)
        assert made is not None
        dtype = local_value(made.value).dtype
        assert dtype is not None
        return dtype


@dataclass
class Compute:
    """A program with more inputs, at the end: for each what it is (see below), and the boundary it belongs to.

    "detached": the value at the boundary; its gradient is this rank's own, still to be reduced. "unsharded": the value, where its
    gradient goes on to the parameter. "unreduced": gradients to be reduced along with those of this program.
    """

    module: fx.GraphModule
    extra: list[tuple[str, Boundary]]

    def boundaries(self, kind: str) -> list[Boundary]:
        """Those that have an extra input of this kind, in order."""
        return [b for k, b in self.extra if k == kind]


@dataclass
class Phases:
    """The graphs of a step's phases.

    unshard: parameters -> the value at every boundary. compute: a microbatch, whose gradients stay unreduced.
    compute_and_reduce: a microbatch whose backward reduces its gradients, and with them the unreduced ones of those before: the
    last one of a step; where gradients do not stay unreduced (zero=2 and 3), every one. reduce: parameters -> the values in the
    dtypes that gradients are summed in; its backward takes unreduced gradients to those of the parameters.
    """

    boundaries: list[Boundary]
    unshard: fx.GraphModule
    compute: Compute
    compute_and_reduce: Compute
    reduce: fx.GraphModule


def split_phases(program: Program) -> Phases:
    """The phases of a partitioned program, which is left as it is."""
    found = _boundaries(program)
    unsharded = {b: {"unsharded"} if b.gathers else set() for b in found}
    compute = {b: {"detached"} if b.sums else unsharded[b] for b in found}
    stay = not program.plan.reduces_each_backward
    both = {b: unsharded[b] | ({"unreduced"} if b.sums and stay else set()) for b in found}
    return Phases(found, _values(program, found), _compute(program, compute), _compute(program, both),
                  _values(program, found, wide=True))


def once_a_step(program: Program) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of a partitioned program whose forward, and those whose backward, runs once in a step of several microbatches:
    what unshards parameters, and what reduces their gradients, where the plan keeps the results."""
    plan, mesh = program.plan, program.mesh
    forward: set[fx.Node] = set()
    backward: set[fx.Node] = set()
    if mesh.size(*mesh.data) == 1 or plan.gathers_each_use:
        return forward, backward
    for boundary in _boundaries(program):
        for nodes, once in ((forward, boundary.gathers or not plan.reduces_each_backward),
                            (backward, boundary.sums and not plan.reduces_each_backward)):
            for node in reversed(boundary.chain[1:]):
                if once and (node is boundary.node or all(u in nodes for u in node.users)):
                    nodes.add(node)
    return forward, backward


def beside_computation(program: Program) -> tuple[set[fx.Node], set[fx.Node]]:
    """The collectives that unshard parameters, and those whose backward reduces their gradients, which the plan has run beside
    computation, as far as they do not run once a step (see `once_a_step`)."""
    plan, data = program.plan, tuple(a for a in program.mesh.data if program.mesh.size(a) > 1)
    found = {n for b in _boundaries(program) for n in b.chain if _over(n, data) is not None}
    return found if plan.overlap_param_gather else set(), found if plan.overlap_grad_reduce else set()


def _boundaries(program: Program) -> list[Boundary]:
    params = {n: s for n, s in program.source_of().items() if s.kind == "param"}
    data = tuple(a for a in program.mesh.data if program.mesh.size(a) > 1)
    chains = {n: chain for n in program.graph.nodes if (chain := _from_parameter(n, params, data))}
    inner = {n for chain in chains.values() for n in chain[1:-1]}
    inner |= {chain[-1] for chain in chains.values()}
    out = []
    for node, chain in chains.items():
        if all(u in inner for u in node.users):
            continue
        steps = [made for n in chain if (made := _over(n, data)) is not None]
        out.append(Boundary(node, chain, params[chain[0]], steps[-1].gathers, any(s.sums for s in steps)))
    return out


def _over(node: fx.Node, axes: Axes) -> Collective | None:
    """A collective over some of `axes` that brings a parameter to its use."""
    made = typed(node)
    return made if made is not None and (made.gathers or made.sums) and set(axes) & set(made.axes) else None


def _from_parameter(node: fx.Node, params: dict[fx.Node, Source], axes: Axes) -> tuple[fx.Node, ...]:
    """For a collective over some of `axes` of a parameter (through casts and views): the chain from the parameter to it."""
    if _over(node, axes) is None:
        return ()
    chain = [node]
    while chain[0] not in params:
        if chain[0].op != "call_function" or len(chain[0].all_input_nodes) != 1:
            return ()
        chain.insert(0, chain[0].all_input_nodes[0])
    return tuple(chain)


def _values(program: Program, boundaries: list[Boundary], wide: bool = False) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, source in program.source_of().items():
        if source.kind == "param":
            copies[node] = graph.node_copy(node)
    for boundary in boundaries:
        for node in boundary.chain[1:]:
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                made = typed(copies[node])
                if wide and made is not None and made.gathers:
                    copies[node].args = replace(made, dtype=None, reduce=None).args
    graph.output(tuple(copies[b.node] for b in boundaries))
    return fx.GraphModule(program.module, graph)


def _compute(program: Program, wanted: dict[Boundary, set[str]]) -> Compute:
    kinds = ("detached", "unsharded", "unreduced")
    extra: list[tuple[str, Boundary]] = [(kind, b) for kind in kinds for b in wanted if kind in wanted[b]]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    more: dict[fx.Node, dict[str, Any]] = {b.node: {} for b in wanted}
    last = program.placeholders()[-1]
    for node in program.graph.nodes:
        if "detached" in more.get(node, ()):
            copies[node] = more[node]["detached"]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].kwargs = {**copies[node].kwargs, **more.get(node, {})}
        if node is last:
            for kind, boundary in extra:
                more[boundary.node][kind] = graph.placeholder(f"{boundary.node.name}_{kind}")
    graph.eliminate_dead_code()
    return Compute(fx.GraphModule(program.module, graph), extra)
