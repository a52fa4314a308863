"""`fxpar.inspect` and `Report`: what a plan does to a model, without running it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from torch import fx, nn

from fxpar.compiler import Captured, capture
from fxpar.cost.clusters import Cluster
from fxpar.cost.clusters import cluster as read_cluster
from fxpar.cost.operators import measure
from fxpar.errors import FxparError
from fxpar.ops.collectives import typed
from fxpar.passes.partition.phases import once_a_step
from fxpar.passes.strategies.stages import Stage, cut_stages
from fxpar.pipeline.schedules import schedule
from fxpar.plan import Plan, Plans
from fxpar.program import Program, module_path
from fxpar.report.attention import AttentionRow, attention_rows, gathered_note, lines
from fxpar.report.experts import ExpertsRow, experts_rows, lines_of_experts
from fxpar.report.memory import Peak, predict
from fxpar.report.pipeline import PipelineReport, describe, uses
from fxpar.report.step import StepReport
from fxpar.report.text import GIB, MIB, ranges, table
from fxpar.report.verdict import Verdict, bytes_of, verdict
from fxpar.sharding.facts import full_value, local_value, sharding_at
from fxpar.sharding.layout import shard_shape
from fxpar.sharding.mesh import KIND, Mesh


@dataclass(frozen=True)
class ParameterRow:
    """name, global shape, layout as text, shape and bytes that one rank holds, of those that hold it: under pp, ranks of the
    stages that use it (where `stages` is empty, it is on all ranks)."""

    name: str
    shape: tuple[int, ...]
    layout: str
    local_shape: tuple[int, ...]
    local_bytes: int
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives alike: kind ("all_gather", ...), axes, phase ("forward" or "backward"), the module they serve (layer
    numbers replaced by ``*``), how many a step, and the bytes of their results on one rank, all together.

    stage: of a pipeline, whose ranks take part; None where all do. What is sent from stage to stage is in `Report.pipeline`.
    """

    kind: str
    axes: tuple[str, ...]
    phase: str
    where: str
    count: int
    bytes: int
    stage: int | None = None


@dataclass
class Report:
    """What one rank holds, computes and communicates in one training step.

    mesh: of the ranks that run one program; under pp there are as many meshes as pipeline ranks.
    memory: bytes that are there between steps: "parameters", "optimizer" (AdamW's two moments, in the parameters' dtypes); and
    "gradients", from the backward pass to the optimizer step. flops: of one step, forward and backward (see
    `fxpar.cost.operators`); a gradient that nothing asks for, such as that of the model's input, counts nothing.
    attention: how each runs under context parallelism. experts: how tokens reach them under expert parallelism. step: what a step
    takes, and its cluster. limit: bytes of a device, where `inspect` was told them, for `verdict`. pipeline: its stages, under
    pp. Then `memory`, `flops` (here with what is recomputed) and `peak` are each those of the pipeline rank that has most.
    """

    plan: Plan
    mesh: Mesh
    parameters: list[ParameterRow]
    collectives: list[CollectiveRow]
    memory: dict[str, int]
    flops: int
    notes: list[str] = field(default_factory=list)
    pipeline: PipelineReport | None = None
    attention: list[AttentionRow] = field(default_factory=list)
    experts: list[ExpertsRow] = field(default_factory=list)
    step: StepReport = field(kw_only=True)
    predicted: Callable[[], Peak] = field(kw_only=True, repr=False, compare=False)
    limit: int | None = field(default=None, kw_only=True)
    peak_of: Callable[[Plan], int] | None = field(default=None, kw_only=True, repr=False, compare=False)

    @functools.cached_property
    def peak(self) -> Peak:
        """When a step of the Inductor backend holds most, and what. Traced when it is first asked for (or the report is printed):
        about a second a layer; of many equal layers, a few are traced.

        Raises what PyTorch raises for a model that Inductor cannot compile.
        """
        return self.predicted()

    @property
    def peak_memory(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` is expected to show: bytes of one rank."""
        return self.peak.bytes

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """Whether the peak fits into `limit`, and what would make it fit, each change predicted as the peak is; None where no
        memory was named. Raises as `peak`."""
        if self.limit is None:
            return None
        return verdict(self.plan, self.peak_memory, self.limit, self.peak_of or _none_other)

    def count(self, kind: str, phase: str | None = None, axes: tuple[str, ...] | None = None) -> int:
        """How many collectives of a kind a step has; under pp, over all stages."""
        return sum(r.count for r in self.collectives if r.kind == kind and phase in (None, r.phase)
                   and axes in (None, r.axes))

    def __str__(self) -> str:
        peak, pipeline = self._peak(), self.pipeline
        mesh = f"{KIND}={self.plan.pp} x {self.mesh}" if pipeline else str(self.mesh)
        pipes = pipeline.lines(None if isinstance(peak, str) else pipeline.peaks) if pipeline else []
        attention = [*lines(self.attention), ""] if self.attention else []
        attention += [*lines_of_experts(self.experts), ""] if self.experts else []
        return "\n".join([f"plan {self.plan}   mesh {mesh}   world size {self.plan.world_size}", "",
                          *self._parameters(), "", *self._collectives(), "", *attention, *pipes, *([""] if pipes else []),
                          "memory a rank: " + ", ".join(f"{k} {v / GIB:.3f} GiB" for k, v in self.memory.items()),
                          f"peak memory a rank: {peak}",
                          *([str(self.verdict)] if self.limit is not None and not isinstance(peak, str) else []),
                          f"compute a rank and step: {self.flops / 1e12:.4g} TFLOP",
                          self.step.line(),
                          *(f"note: {n}" for n in self.notes)])

    def _peak(self) -> Peak | str:
        try:
            return self.peak
        except Exception as error:  # whatever stops Inductor must not hide the rest of the report
            return f"not predicted ({type(error).__name__}: {str(error).partition(chr(10))[0]})"

    def _parameters(self) -> list[str]:
        """Repeated layers share a line."""
        lines: dict[tuple, list[ParameterRow]] = {}
        for p in self.parameters:
            lines.setdefault((re.sub(r"\b\d+\b", "*", p.name), p.shape, p.layout, p.local_shape), []).append(p)
        rows = []
        for (name, shape, layout, local), alike in lines.items():
            size = sum(p.local_bytes for p in alike)
            stages = ranges(sorted({s for p in alike for s in p.stages})) or "all"
            rows.append((f"{name}{f'  (x{len(alike)})' if len(alike) > 1 else ''}", str(list(shape)), layout, str(list(local)),
                         f"{size / MIB:.2f}", *([stages] if self.pipeline else [])))
        head = ("parameter", "shape", "layout", "a rank holds", *(("MiB of all", "on stages") if self.pipeline else ("MiB",)))
        return table(head, rows)

    def _collectives(self) -> list[str]:
        """Stages that have as many share a line."""
        lines: dict[CollectiveRow, list[int | None]] = {}
        for r in self.collectives:
            lines.setdefault(replace(r, stage=None), []).append(r.stage)
        rows = []
        for r, stages in lines.items():
            known = ranges(sorted(s for s in stages if s is not None)) or "all"
            rows.append((r.kind, "+".join(r.axes), r.phase, r.where, str(r.count), f"{r.bytes / MIB:.2f}",
                         *([known] if self.pipeline else [])))
        return table(("collective", "over", "phase", "where", "count", "MiB", *(["stage"] if self.pipeline else [])), rows)


@overload
def inspect(model: nn.Module | Captured, plan: Plan | str, example_inputs: Any = None, *, memory: int | float | str | None = None,
            cluster: Cluster | str | None = None) -> Report: ...


@overload
def inspect(model: nn.Module | Captured, plan: Plans, example_inputs: Any = None, *, memory: int | float | str | None = None,
            cluster: Cluster | str | None = None) -> list[Report]: ...


def inspect(model: nn.Module | Captured, plan: Plan | str | Plans, example_inputs: Any = None, *,
            memory: int | float | str | None = None, cluster: Cluster | str | None = None) -> Report | list[Report]:
    """What `plan` does to `model`: layouts, collectives, memory, FLOPs; for any world size, without processes.

    model: may be on the meta device; or what `fxpar.capture` made of one. plan: one, or several, of which each has a report; the
    model is captured once for all of them. example_inputs: the *global* batch (a dict of keyword arguments or a tuple), of which
    only shapes and dtypes matter; may be left out for Hugging Face models, and is of no use with what is captured.
    memory: of a device, in bytes or as text ("80GiB"): `Report.verdict` says whether the plan fits, and what would. cluster: what
    times are for, a name or a .toml file; its devices' memory is meant where `memory` is left out.
    Raises: as `fxpar.parallelize`; `PlanError` for a memory or a cluster that is none.
    """
    captured = model if isinstance(model, Captured) else capture(model, example_inputs)
    machine = read_cluster(cluster) if isinstance(cluster, str) else cluster
    limit = bytes_of(memory) if memory is not None else machine.memory if machine is not None else None
    if isinstance(plan, Plan | str):
        return _inspect(captured, plan, limit, machine)
    return [_inspect(captured, each, limit, machine) for each in plan]


def _inspect(captured: Captured, plan: Plan | str, limit: int | None, machine: Cluster | None) -> Report:
    program = captured.partition(plan)
    pp = program.plan.pp
    made = report_of(program, cut_stages(program, pp * program.plan.virtual_stages) if pp > 1 else [])
    made.limit, made.peak_of = limit, lambda other: _inspect(captured, other, None, None).peak_memory
    if machine is not None:
        made.step.cluster = machine
    return made


def _none_other(plan: Plan) -> int:
    raise FxparError("a report of a program that was not captured tells of no other plan")


def report_of(program: Program, stages: Sequence[Stage] = ()) -> Report:
    """The report of a partitioned program. stages: what it is cut into, under a plan with pipeline parallelism."""
    plan, mesh = program.plan, program.mesh
    count = program.microbatches.count if program.microbatches is not None else 1
    on = _users(stages)
    parameters = [replace(_parameter(n, mesh), stages=on.get(s.name, ())) for n, s in program.source_of().items()
                  if s.kind == "param"]
    trained = {s.name for s in program.sources if s.kind == "param" and s.requires_grad}
    attention, notes = attention_rows(program, count), [*program.notes, *gathered_note(program)]
    experts = experts_rows(program, count)
    sizes = {p.name: (p.local_bytes, p.local_bytes if p.name in trained else 0) for p in parameters}
    if not stages:
        size, gradients = (sum(each[i] for each in sizes.values()) for i in (0, 1))
        memory = {"parameters": size, "gradients": gradients, "optimizer": 2 * gradients}
        costs = measure(program).costs.values()
        flops = count * sum(cost.forward + (cost.backward if program.training else 0) for cost in costs)
        alone = schedule("1f1b", ranks=1, microbatches=count, unshard=count > 1 and plan.stores_parts)
        return Report(plan, mesh, parameters, _collectives(program, count), memory, flops, notes, attention=attention,
                      experts=experts, step=StepReport(alone, [(program, 0)], gradients),
                      predicted=functools.partial(predict, program))
    order = schedule(plan.schedule, ranks=plan.pp, virtual_stages=plan.virtual_stages, microbatches=count,
                     unshard=plan.stores_parts)
    on_rank = {rank: {p.name for p in parameters if not p.stages or {*p.stages} & {*order.stages_of(rank)}}
            for rank in range(plan.pp)}
    pipeline = describe(order, stages, on_rank, sizes)
    rows = [row for stage in stages for row in _collectives(stage.program, count, stage.index)]
    rows += _sums_over_stages([p for p in parameters if p.name in trained and program.training], order.owner)
    memory = max((rank.memory for rank in pipeline.ranks), key=lambda each: sum(each.values()))
    flops = max(sum(pipeline.stages[s].flops for s in rank.stages) for rank in pipeline.ranks)
    return Report(plan, mesh, parameters, rows, memory, flops, notes, pipeline, attention, experts, step=pipeline.step,
                  predicted=lambda: max(pipeline.peaks, key=lambda peak: peak.bytes))


def _users(stages: Sequence[Stage]) -> dict[str, tuple[int, ...]]:
    """Name of a parameter -> the stages that use it."""
    found: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        for name in uses(stage):
            found[name] = (*found.get(name, ()), stage.index)
    return found


def _sums_over_stages(trained: Sequence[ParameterRow], owner: Sequence[int]) -> list[CollectiveRow]:
    """The sums of gradients of parameters that several pipeline ranks hold, marked with each rank's first stage that has them."""
    out = []
    for p in trained:
        firsts = {owner[s]: s for s in reversed(p.stages)}
        if len(firsts) > 1:
            where = re.sub(r"\b\d+\b", "*", p.name.rpartition(".")[0])
            out += [CollectiveRow("all_reduce", (KIND,), "backward", where, 1, p.local_bytes, s) for s in sorted(firsts.values())]
    return out


def _parameter(node: fx.Node, mesh: Mesh) -> ParameterRow:
    value, shape = full_value(node), shard_shape(sharding_at(node), mesh)
    size = math.prod(shape) * value.element_size()
    return ParameterRow(local_value(node).source, tuple(value.shape), local_value(node).layout_text, shape, size)


def _collectives(program: Program, count: int, stage: int | None = None) -> list[CollectiveRow]:
    """Those of a step of `count` microbatches, of which the program runs one. What all of them are passed is computed once; so
    are unsharded parameters and the sums of gradients, as far as the plan keeps them (see `once_a_step`), where gradients are
    wanted and in pipelines."""
    rows: dict[tuple, list[int]] = {}

    def add(kind: str, axes: tuple, phase: str, node: fx.Node, size: int, times: int) -> None:
        where = re.sub(r"\b\d+\b", "*", module_path(node))
        entry = rows.setdefault((kind, axes, phase, where), [0, 0])
        entry[0] += times
        entry[1] += times * size

    step, keeps = program.microbatches, count > 1 and (program.training or stage is not None)
    once_forward, once_backward = once_a_step(program) if keeps else (set(), set())
    before = [] if step is None or step.prologue is None else list(step.prologue.graph.nodes)
    for node, times in [*((n, count) for n in program.graph.nodes), *((n, 1) for n in before)]:
        made = typed(node)
        if made is None:
            continue
        size = local_value(node).bytes
        if made.forward.comm is not None:
            add(made.forward.comm, made.axes, "forward", node, size, 1 if node in once_forward else times)
        if local_value(node).needs_grad and made.backward is not None and made.backward.comm is not None:
            add(made.backward.comm, made.axes, "backward", node, made.operand_bytes(size, program.mesh),
                1 if node in once_backward else times)
    ordered = sorted(rows.items(), key=lambda r: (r[0][2] != "forward", r[0]))
    return [CollectiveRow(kind, axes, phase, where, count, size, stage)
            for (kind, axes, phase, where), (count, size) in ordered]
