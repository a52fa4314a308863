"""stages: what a step of a pipeline takes on a cluster, from the programs of its stages.

An operator takes the time of its floating-point operations or of its bytes, whichever is longer. One that is no matrix product,
convolution or attention takes that of its bytes, unless a single operator of its own kind reads it: then it is computed there, as
compilers do it. Collectives are rings over the slowest link of their group, and hide behind nothing but other ranks' bubbles. The
backward of a product is as fast as its forward, for each of its gradients; of another operator, it moves twice the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from fxpar.cost.clusters import Cluster, Link
from fxpar.cost.operators import TensorSpec, measure
from fxpar.ops.collectives import typed
from fxpar.pipeline.schedules import Schedule
from fxpar.pipeline.timeline import StageTimes, Timeline, timeline
from fxpar.program import Program, block_path
from fxpar.sharding.mesh import Axes, Mesh


@dataclass(frozen=True)
class StageLoad:
    """A stage, as far as its time depends on it.

    program: of one rank and one microbatch. sent: bytes that it sends to the next stage for one microbatch.
    once_forward, once_backward: nodes whose forward, or backward, runs once a step and not for each microbatch.
    """

    program: Program
    sent: int
    once_forward: Collection[fx.Node] = ()
    once_backward: Collection[fx.Node] = ()


def step_on(cluster: Cluster, schedule: Schedule, loads: Sequence[StageLoad]) -> Timeline:
    """When everything of a pipeline's step runs on a cluster, whose ranks are numbered pipeline rank by pipeline rank.

    loads: of every stage. Raises `PlanError` for a dtype that the cluster does not compute in.
    """
    ranks = loads[0].program.mesh.world_size
    hops = [_hop(cluster, schedule.owner[s], schedule.owner[s + 1], ranks, load.sent) for s, load in enumerate(loads[:-1])]
    return timeline(schedule, [stage_times(cluster, load) for load in loads], hops)


def stage_times(cluster: Cluster, load: StageLoad) -> StageTimes:
    """Seconds that a stage takes on its rank; see the head of this file for what is assumed. Raises as `step_on`."""
    clock = _OperatorTimes(cluster, load.program)
    forward = inputs = weights = unshard = reduce = 0.0
    for node in clock.costs:
        ahead, back = clock.seconds(node)
        if node in load.once_forward:
            unshard += ahead
        else:
            forward += ahead
            inputs += recomputed(load.program, node) * ahead if load.program.training else 0.0
        if node in load.once_backward:
            reduce += back
        else:
            early = clock.early_part(node)
            inputs, weights = inputs + early * back, weights + (1 - early) * back
    return StageTimes(forward, inputs, weights, unshard=unshard, reduce=reduce)


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


class _OperatorTimes:
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
        cost, trained = self.costs[node], self.program.training and self.wants_gradient(node)
        if typed(node) is not None:
            ahead, back = self._communication(node)
            return ahead, back if trained else 0.0
        moved = (cost.read + cost.written) / self.cluster.memory_bandwidth
        if cost.forward:
            ahead = max(cost.forward / self.cluster.reached(self._dtype(node)), moved)
            return ahead, ahead * cost.backward / cost.forward if trained else 0.0
        if self._is_fused(node):
            return 0.0, 0.0
        return moved, 2 * moved if trained else 0.0

    def _dtype(self, node: fx.Node) -> str:
        value = self.values[node]
        return str((value[0] if isinstance(value, tuple) else value).dtype)

    def _is_fused(self, node: fx.Node) -> bool:
        users = list(node.users)
        return len(users) == 1 and users[0] in self.costs and not self.costs[users[0]].forward and typed(users[0]) is None

    def _communication(self, node: fx.Node) -> tuple[float, float]:
        made = typed(node)
        assert made is not None
        link, ranks = self.cluster.link(_reach(self.mesh, made.axes)), made.ranks(self.mesh)
        result = self.values[node]
        back = made.operand_bytes(result.bytes, self.mesh)
        if made.reduce is not None:
            back = back * made.reduce.itemsize // result.dtype.itemsize
        return (_collective(link, made.forward.comm, ranks, result.bytes),
                _collective(link, made.backward.comm if made.backward is not None else None, ranks, back))


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
