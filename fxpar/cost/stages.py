"""stages: what a step takes on a cluster, from the programs of the stages of a pipeline; or from one program, as of one stage.

An operator takes the time of its floating-point operations, at the rate that products or attention were measured to reach, or of
its bytes, whichever is longer. One that is no matrix product,
convolution or attention takes that of its bytes, unless a single operator of its own kind reads it: then it is computed there, as
compilers do it. The backward of a product is as fast as its forward, for each of its gradients; of another operator, it moves
twice the bytes.

Collectives are rings over the slowest link of their group. Those of activations hide behind nothing but other ranks' bubbles.
Those of parameters and their gradients take what is longer than the computation of their pass, where the plan overlaps them;
once a step (see `StageLoad`) they are actions of the schedule, and without a pipeline the last backward hides reductions. In ring
attention a block of keys travels while the one before is computed.

Gradients of all microbatches but the first are added to the sum of those before.

An optimizer step reads parameters, gradients and AdamW's two moments, and writes all but gradients.

What a step's seconds are for is in `StepTime.terms`, under the names that `fxpar.cost.formulas` has for the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxpar.cost.clusters import Cluster, Link
from fxpar.cost.operators import TensorSpec, measure
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import EXCHANGES
from fxpar.ops.ring import costs as ring
from fxpar.ops.ring.chunks import attention_of_chunks
from fxpar.ops.ring.operator import axes_of, ring_attention
from fxpar.ops.vocabulary import ATTENTION
from fxpar.pipeline.schedules import Kind, Schedule
from fxpar.pipeline.timeline import StageTimes, Timeline, timeline
from fxpar.program import Program, block_path
from fxpar.sharding.mesh import Axes, Mesh

_ATTENTION = (*ATTENTION, ring_attention, attention_of_chunks)

PRODUCTS, ATTENDING, OTHERS, AGAIN = "matrix products", "attention", "other operators", "recomputation"
TENSOR, CONTEXT, EXPERTS, DATA = "tp collectives", "cp collectives", "ep collectives", "dp collectives"
BUBBLE, OPTIMIZER = "bubble", "optimizer"
TERMS = (PRODUCTS, ATTENDING, OTHERS, AGAIN, TENSOR, CONTEXT, EXPERTS, DATA, BUBBLE, OPTIMIZER)
"""What seconds of a step are for. Of collectives, those that nothing hides; under "dp" all of parameters and their gradients.
"bubble": a pipeline rank waits for others, for messages, and for what is gathered and reduced once a step."""


@dataclass(frozen=True)
class StageLoad:
    """A stage, as far as its time depends on it.

    program: of one rank and one microbatch. sent: bytes that it sends to the next stage for one microbatch.
    once_forward, once_backward: nodes whose forward, or backward, runs once a step and not for each microbatch.
    beside_forward, beside_backward: collectives that run beside computation, in their forward, or in their backward.
    microbatches: of a step, whose gradients are added up.
    """

    program: Program
    sent: int
    once_forward: Collection[fx.Node] = ()
    once_backward: Collection[fx.Node] = ()
    beside_forward: Collection[fx.Node] = ()
    beside_backward: Collection[fx.Node] = ()
    microbatches: int = 1


@dataclass(frozen=True)
class StepTime:
    """What a training step takes on a cluster.

    timeline: of forwards, backwards and what is communicated. optimizer: seconds of the optimizer step, on the rank that has most
    to do. flops: of one step, forward and backward, of all ranks; what is computed again for the backward counts nothing.
    peak: FLOP/s of all ranks' devices, as their maker says, in the dtype in which most is computed.
    terms: what the step's seconds are for (`TERMS`), on the pipeline rank that computes longest; their sum is `seconds`.
    """

    cluster: Cluster
    timeline: Timeline
    optimizer: float
    flops: int
    peak: float
    terms: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.timeline.step + self.optimizer

    @property
    def utilization(self) -> float:
        """The part of the devices' peak that the model's operations are (MFU)."""
        return self.flops / (self.seconds * self.peak)


def step_time(cluster: Cluster, schedule: Schedule, loads: Sequence[StageLoad], stored: int) -> StepTime:
    """What a step takes; arguments as of `step_on`.

    stored: bytes of the parameters that are trained, on the rank that stores most of them; gradients and moments are as large.
    """
    done = flops_by_dtype([load.program for load in loads], schedule.microbatches)
    dtype = max(done, key=lambda name: done[name], default="float32")
    ranks = schedule.ranks * loads[0].program.mesh.world_size
    made = [stage_cost(cluster, load) for load in loads]
    line = _line(cluster, schedule, loads, made)
    optimizer = 7 * stored / cluster.memory_bandwidth
    return StepTime(cluster, line, optimizer, sum(done.values()), ranks * cluster.peak(dtype),
                    {**_terms(line, made), OPTIMIZER: optimizer})


def flops_by_dtype(programs: Sequence[Program], microbatches: int) -> dict[str, int]:
    """Name of a dtype -> operations computed in it, of a step of programs that each run all microbatches, forward and backward,
    of all ranks; what is computed again counts nothing."""
    done: dict[str, int] = {}
    for program in programs:
        measured = measure(program)
        for node, cost in measured.costs.items():
            if cost.forward:
                flops = cost.forward + (cost.backward if program.training else 0)
                dtype = _dtype(measured.values[node])
                done[dtype] = done.get(dtype, 0) + flops * microbatches * program.mesh.world_size
    return done


def step_on(cluster: Cluster, schedule: Schedule, loads: Sequence[StageLoad]) -> Timeline:
    """When everything of a pipeline's step runs on a cluster, whose ranks are numbered pipeline rank by pipeline rank.

    loads: of every stage. Raises `PlanError` for a dtype that the cluster does not compute in.
    """
    return _line(cluster, schedule, loads, [stage_cost(cluster, load) for load in loads])


@dataclass(frozen=True)
class StageCost:
    """What a stage takes on its rank. terms: what its seconds of one microbatch, forward and backward, are for."""

    times: StageTimes
    terms: Mapping[str, float]


def _line(cluster: Cluster, schedule: Schedule, loads: Sequence[StageLoad], costs: Sequence[StageCost]) -> Timeline:
    ranks = loads[0].program.mesh.world_size
    hops = [_hop(cluster, schedule.owner[s], schedule.owner[s + 1], ranks, load.sent) for s, load in enumerate(loads[:-1])]
    times = [cost.times for cost in costs]
    if len(loads) == 1 and loads[0].program.plan.overlap_grad_reduce:
        times = [replace(t, reduce=max(0.0, t.reduce - t.of(Kind.B))) for t in times]
    return timeline(schedule, times, hops)


def _terms(line: Timeline, costs: Sequence[StageCost]) -> dict[str, float]:
    """What the seconds of a timeline are for, on the rank that computes longest."""
    schedule = line.schedule
    rank = max(range(schedule.ranks), key=lambda r: line.busy[r])
    terms = dict.fromkeys(TERMS, 0.0)
    for stage in schedule.stages_of(rank):
        for term, seconds in costs[stage].terms.items():
            terms[term] += schedule.microbatches * seconds
    terms[BUBBLE if schedule.ranks > 1 else DATA] += line.step - line.busy[rank]
    return terms


def stage_times(cluster: Cluster, load: StageLoad) -> StageTimes:
    """Seconds that a stage takes on its rank; see the head of this file for what is assumed. Raises as `step_on`."""
    return stage_cost(cluster, load).times


def stage_cost(cluster: Cluster, load: StageLoad) -> StageCost:
    """The same, and what the seconds are for. Raises as `step_on`."""
    clock, training = OperatorTimes(cluster, load.program), load.program.training
    forward = inputs = weights = unshard = reduce = beside_forward = beside_backward = 0.0
    terms = dict.fromkeys(TERMS, 0.0)
    for node in clock.costs:
        pieces = clock.pieces(node)
        ahead, back = clock.seconds(node)
        again = recomputed(load.program, node) * ahead if training else 0.0
        if node in load.once_forward:
            unshard += ahead
        elif node in load.beside_forward:
            beside_forward += ahead
            beside_backward += ahead if training and load.program.plan.gathers_each_use else 0.0
        else:
            forward += ahead
            inputs += again
            terms[AGAIN] += again
            for term, seconds, _ in pieces:
                terms[term] += seconds
        if node in load.once_backward:
            reduce += back
        elif node in load.beside_backward:
            beside_backward += back
        else:
            early = clock.early_part(node)
            inputs, weights = inputs + early * back, weights + (1 - early) * back
            for term, _, seconds in pieces:
                terms[term] += seconds
    if training:
        added = (1 - 1 / load.microbatches) * added_bytes(load, clock.values) / cluster.memory_bandwidth
        weights, terms[OTHERS] = weights + added, terms[OTHERS] + added
    terms[DATA] += max(0.0, beside_forward - forward) + max(0.0, beside_backward - inputs - weights)
    times = StageTimes(max(forward, beside_forward), inputs, max(weights, beside_backward - inputs), unshard=unshard,
                       reduce=reduce)
    return StageCost(times, terms)


def added_bytes(load: StageLoad, values: Mapping[fx.Node, Any]) -> int:
    """Bytes that adding one microbatch's gradients to those of the ones before reads and writes: of what is stored, or, where
    gradients stay unreduced, of what was gathered, cast to the dtype of the sum first."""
    total, kept = 0, set()
    for end in load.once_backward:
        if any(user in load.once_backward for user in end.users):
            continue
        source, before = end, end.all_input_nodes[0]
        while source.op != "placeholder":
            source = source.all_input_nodes[0]
        kept.add(source)
        used, summed = (values[node].dtype.itemsize for node in (end, before))
        total += values[end].bytes // used * (3 * summed + (used + summed if used != summed else 0))
    return total + sum(3 * values[node].bytes for node, source in load.program.source_of().items()
                       if source.kind == "param" and source.requires_grad and node.users and node not in kept)


def recomputed(program: Program, node: fx.Node) -> float:
    """Which part of an operator's forward the backward pass makes again: all of a block, or what a memory budget leaves of it.
    (`selective` keeps all products.)"""
    plan = program.plan
    if not block_path(node):
        return 0.0
    return 1.0 if plan.recompute == "full" else 0.0 if plan.memory_budget is None else 1 - plan.memory_budget


def _hop(cluster: Cluster, one: int, other: int, ranks: int, size: int) -> float:
    """Seconds for what passes between two pipeline ranks of `ranks` ranks each; of the slowest pair of partners."""
    if one == other:
        return 0.0
    return max(cluster.between(one * ranks + r, other * ranks + r).seconds(size) for r in range(ranks))


class OperatorTimes:
    """Seconds of a program's operators. early: nodes through which the gradients of what the stage receives flow."""

    def __init__(self, cluster: Cluster, program: Program):
        self.cluster, self.program, self.mesh = cluster, program, program.mesh
        measured = measure(program)
        self.values, self.costs = measured.values, measured.costs
        self.early = {n for n, s in program.source_of().items() if s.kind == "received" and s.requires_grad}
        for node in self.costs:
            if self.wants_gradient(node) and any(n in self.early for n in node.all_input_nodes):
                self.early.add(node)

    def wants_gradient(self, node: fx.Node) -> bool:
        value = self.values[node]
        return any(isinstance(v, TensorSpec) and v.requires_grad for v in (value if isinstance(value, tuple) else [value]))

    def early_part(self, node: fx.Node) -> float:
        """The part of a node's backward that the gradients of what the stage receives take."""
        wanted = [n for n in node.all_input_nodes if self.wants_gradient(n)]
        if not self.costs[node].backward:
            return float(node in self.early)
        return sum(n in self.early for n in wanted) / max(len(wanted), 1)

    def seconds(self, node: fx.Node) -> tuple[float, float]:
        """Of its forward, and of its backward."""
        pieces = self.pieces(node)
        return sum(ahead for _, ahead, _ in pieces), sum(back for _, _, back in pieces)

    def pieces(self, node: fx.Node) -> list[tuple[str, float, float]]:
        """What its seconds are for, with those of its forward, and of its backward."""
        cost, trained = self.costs[node], self.program.training and self.wants_gradient(node)
        made = typed(node)
        if made is not None:
            ahead, back = self._communication(node)
            return [(_strategy(node.target, made.axes), ahead, back if trained else 0.0)]
        moved = (cost.read + cost.written) / self.cluster.memory_bandwidth
        if cost.forward:
            attends = node.target in _ATTENTION
            reached = self.cluster.reached(_dtype(self.values[node]), attention=attends)
            ahead = max(cost.forward / reached, moved)
            back = ahead * cost.backward / cost.forward if trained else 0.0
            longer = self._around(node, ahead, back)
            return [(ATTENDING if attends else PRODUCTS, ahead, back), (CONTEXT, longer[0] - ahead, longer[1] - back)]
        if self._is_fused(node):
            return []
        return [(OTHERS, moved, 2 * moved if trained else 0.0)]

    def _around(self, node: fx.Node, ahead: float, back: float) -> tuple[float, float]:
        """Seconds of attention that takes this long by itself, where its keys and values go round among ranks."""
        axes = axes_of(node)
        if axes is None:
            return ahead, back
        ranks, (there, again) = self.mesh.size(*axes), self.travels(node)
        return max(ahead, ahead / ranks + there), max(back, back / ranks + again) if back else 0.0

    def travels(self, node: fx.Node) -> tuple[float, float]:
        """Seconds in which the keys and values of ring attention go round, forward and backward; 0 of another operator."""
        axes = axes_of(node)
        if axes is None:
            return 0.0, 0.0
        link, ranks = self.cluster.link(_reach(self.mesh, axes)), self.mesh.size(*axes)
        there, again = ((ranks - 1) * link.alpha + size / link.beta for size in ring.traffic_of(node, ranks, self.values))
        return there, again

    def _is_fused(self, node: fx.Node) -> bool:
        users = list(node.users)
        return len(users) == 1 and users[0] in self.costs and not self.costs[users[0]].forward and typed(users[0]) is None

    def _communication(self, node: fx.Node) -> tuple[float, float]:
        made = typed(node)
        assert made is not None
        link, ranks = self.cluster.link(_reach(self.mesh, made.axes)), made.ranks(self.mesh)
        result = self.values[node]
        back = made.backward_bytes(result.bytes, self.values[made.value].dtype, self.mesh)
        return (_collective(link, made.forward.comm, ranks, result.bytes),
                _collective(link, made.backward.comm if made.backward is not None else None, ranks, back))


def _strategy(target: Any, axes: Axes) -> str:
    """The term that a collective over these axes belongs to."""
    if target in EXCHANGES:
        return EXPERTS
    named = {found[0] for axis in axes if (found := re.match("[a-z]+", axis))}
    return TENSOR if "tp" in named else CONTEXT if named == {"cp"} else DATA


def _dtype(value: Any) -> str:
    return str((value[0] if isinstance(value, tuple) else value).dtype)


def _reach(mesh: Mesh, axes: Axes) -> int:
    """How many neighbouring ranks the blocks have that groups over these axes lie in."""
    first = min((i for i, name in enumerate(mesh.names) if name in axes and mesh.sizes[i] > 1), default=len(mesh.names))
    return mesh.size(*mesh.names[first:])


def _collective(link: Link, kind: str | None, ranks: int, result: int) -> float:
    """Seconds of a ring. result: bytes that it leaves on one rank."""
    if kind is None or ranks == 1:
        return 0.0
    full = result * ranks if kind == "reduce_scatter" else result
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) * link.seconds(full / ranks)
