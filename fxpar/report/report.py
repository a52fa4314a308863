"""`fxpar.inspect` and `Report`: what a plan does to a model, without running it."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from torch import fx, nn

from fxpar.compiler import Captured, capture
from fxpar.cost.clusters import Cluster
from fxpar.cost.clusters import cluster as read_cluster
from fxpar.cost.operators import measure
from fxpar.errors import FxparError
from fxpar.passes.strategies.stages import Stage, cut_stages
from fxpar.pipeline.schedules import schedule
from fxpar.plan import Plan, Plans, require_one_of
from fxpar.program import Program
from fxpar.progress import stage as told
from fxpar.report.attention import AttentionRow, attention_rows, gathered_note, lines
from fxpar.report.data import as_dict, known_peak, known_verdict
from fxpar.report.experts import ExpertsRow, experts_rows, lines_of_experts
from fxpar.report.html.page import write_page
from fxpar.report.memory import Peak, predict
from fxpar.report.pipeline import PipelineReport, describe, uses
from fxpar.report.step import StepReport
from fxpar.report.terminal import in_colour
from fxpar.report.text import GIB, MIB, ranges, table
from fxpar.report.timings import Timings
from fxpar.report.traffic import CollectiveRow, Total, rows_of, totals
from fxpar.report.verdict import Verdict, bytes_of, verdict
from fxpar.report.words import layout_words, mesh_words, starred, without_letters
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


@dataclass
class Report:
    """What one rank holds, computes and communicates in one training step.

    mesh: of the ranks that run one program; under pp there are as many meshes as pipeline ranks.
    memory: bytes that are there between steps: "parameters", "optimizer" (AdamW's two moments, in the parameters' dtypes); and
    "gradients", from the backward pass to the optimizer step. flops: of one step, forward and backward (see
    `fxpar.cost.operators`); a gradient that nothing asks for, such as that of the model's input, counts nothing.
    attention: how each runs under context parallelism. experts: how tokens reach them under expert parallelism. step: what a step
    takes, and its cluster. limit: bytes of a device, where `inspect` was told them, for `verdict`. timings: where the time
    went on the way to the first step. pipeline: its stages, under pp. Then `memory`, `flops` (here with what is recomputed)
    and `peak` are each those of the pipeline rank that has most. predicted: what predicts `peak`; peak_of: the same of another
    plan. cuda_graphs: of a module that runs, whether its forward and backward are played back, and clipping and steps of
    optimizers behind them, or why not. tp_comm_overlap: the same of what tensor parallelism gathers and scatters: whether it is
    hidden behind products.
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
    timings: Timings = field(default=Timings({}, {}), kw_only=True, compare=False)
    predicted: Callable[[], Peak] = field(kw_only=True, repr=False, compare=False)
    limit: int | None = field(default=None, kw_only=True)
    peak_of: Callable[[Plan], int] | None = field(default=None, kw_only=True, repr=False, compare=False)
    cuda_graphs: str | None = field(default=None, kw_only=True, compare=False)
    tp_comm_overlap: str | None = field(default=None, kw_only=True, compare=False)

    @functools.cached_property
    def peak(self) -> Peak:
        """When a step of the Inductor backend holds most, and what. Traced when it is first asked for (or the report is printed):
        about a second a layer; of many equal layers, a few are traced.

        Raises what PyTorch raises for a model that Inductor cannot compile.
        """
        with told("predicting the peak memory"):
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
        """How many collectives a step has, under pp in all stages: of a kind ("all_gather", ...); of one phase ("forward" or
        "backward"); over just these axes of the mesh."""
        return sum(r.count for r in self.collectives if r.kind == kind and phase in (None, r.phase)
                   and axes in (None, r.axes))

    def totals(self, by: str = "strategy") -> list[Total]:
        """What a step communicates on one rank, most first: by "strategy" ("zero", "tp", ...), or by "axes" of the mesh. Under
        pp each on the pipeline rank that has most of it; "pp" are the messages between stages."""
        require_one_of("by", by, ("strategy", "axes"))
        made = totals(self.collectives, self.pipeline.schedule.owner if self.pipeline else None, by)
        if self.pipeline is not None:
            made.append(self.pipeline.messages())
        return made

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, numbers and text, as `to_json` writes it; bytes and seconds where nothing else is said."""
        return as_dict(self)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save_html(self, path: str | os.PathLike) -> Path:
        """Write the report as one page for a browser, which needs nothing else; returns its path.

        Raises: `FxparError` where nothing can be written.
        """
        return write_page(self, path)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """What ``rich.print(report)`` shows."""
        yield from in_colour(self)

    def __str__(self) -> str:
        peak, pipeline = known_peak(self), self.pipeline
        mesh = mesh_words(self.mesh, self.plan.pp)
        pipes = pipeline.lines(None if isinstance(peak, str) else pipeline.peaks) if pipeline else []
        attention = [*lines(self.attention), ""] if self.attention else []
        attention += [*lines_of_experts(self.experts), ""] if self.experts else []
        return "\n".join([f"plan {self.plan}   mesh {mesh}   world size {self.plan.world_size}", "",
                          *self._parameters(), "", *self._collectives(), "", *self._totals(), *attention,
                          *pipes, *([""] if pipes else []),
                          "memory a rank: " + ", ".join(f"{k} {v / GIB:.3f} GiB" for k, v in self.memory.items()),
                          f"peak memory a rank: {peak}",
                          *([str(fits)] if (fits := known_verdict(self)) is not None else []),
                          f"compute a rank and step: {self.flops / 1e12:.4g} TFLOP",
                          self.step.line(),
                          *([f"to the first step: {self.timings}"] if self.timings.ran else []),
                          *([f"CUDA graphs: {self.cuda_graphs}"] if self.cuda_graphs is not None else []),
                          *([f"overlap of tensor parallelism: {self.tp_comm_overlap}"] if self.tp_comm_overlap else []),
                          *(f"note: {n}" for n in self.notes)])

    def grouped(self) -> list[tuple[str, int, ParameterRow]]:
        """Parameters alike, once: their name with ``*`` for numbers of layers, how many they are, the first of them."""
        lines: dict[tuple, list[ParameterRow]] = {}
        for p in self.parameters:
            lines.setdefault((starred(p.name), p.shape, p.layout, p.local_shape), []).append(p)
        return [(key[0], len(alike), replace(alike[0], stages=tuple(sorted({s for p in alike for s in p.stages}))))
                for key, alike in lines.items()]

    def merged(self) -> list[CollectiveRow]:
        """Collectives with those of all stages together, as many as all stages have."""
        lines: dict[CollectiveRow, list[CollectiveRow]] = {}
        for r in self.collectives:
            lines.setdefault(replace(r, stage=None, count=0, bytes=0), []).append(r)
        return [replace(key, count=sum(r.count for r in alike), bytes=sum(r.bytes for r in alike))
                for key, alike in lines.items()]

    def _parameters(self) -> list[str]:
        """Repeated layers share a line."""
        rows = []
        for name, count, p in self.grouped():
            rows.append((f"{name}{f'  (x{count})' if count > 1 else ''}", str(list(p.shape)), layout_words(p.layout),
                         str(list(p.local_shape)), f"{count * p.local_bytes / MIB:.2f}",
                         *([ranges(p.stages) or "all"] if self.pipeline else [])))
        head = ("parameter", "shape", "layout", "a rank holds", *(("MiB of all", "on stages") if self.pipeline else ("MiB",)))
        return table(head, rows)

    def _totals(self) -> list[str]:
        """By strategy; nothing where nothing is communicated."""
        made = [(t.name, str(t.count), f"{t.forward / MIB:.2f}", f"{t.backward / MIB:.2f}") for t in self.totals()]
        return [*table(("all of a rank's, for", "count", "MiB forward", "MiB backward"), made), ""] if made else []

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
    attention, notes = attention_rows(program, count), [*program.notes, *gathered_note(program), *_budget_note(plan)]
    experts = experts_rows(program, count)
    sizes = {p.name: (p.local_bytes, p.local_bytes if p.name in trained else 0) for p in parameters}
    if not stages:
        size, gradients = (sum(each[i] for each in sizes.values()) for i in (0, 1))
        memory = {"parameters": size, "gradients": gradients, "optimizer": 2 * gradients}
        costs = measure(program).costs.values()
        flops = count * sum(cost.forward + (cost.backward if program.training else 0) for cost in costs)
        alone = schedule("1f1b", ranks=1, microbatches=count, unshard=count > 1 and plan.stores_parts)
        return Report(plan, mesh, parameters, rows_of(program, count), memory, flops, notes, attention=attention,
                      experts=experts, step=StepReport(alone, [(program, 0)], gradients), timings=Timings.of(program.timings),
                      predicted=functools.partial(predict, program))
    order = schedule(plan.schedule, ranks=plan.pp, virtual_stages=plan.virtual_stages, microbatches=count,
                     unshard=plan.stores_parts)
    on_rank = {rank: {p.name for p in parameters if not p.stages or {*p.stages} & {*order.stages_of(rank)}}
            for rank in range(plan.pp)}
    pipeline = describe(order, stages, on_rank, sizes)
    rows = [row for stage in stages for row in rows_of(stage.program, count, stage.index)]
    rows += _sums_over_stages([p for p in parameters if p.name in trained and program.training], order.owner)
    memory = max((rank.memory for rank in pipeline.ranks), key=lambda each: sum(each.values()))
    flops = max(sum(pipeline.stages[s].flops for s in rank.stages) for rank in pipeline.ranks)
    return Report(plan, mesh, parameters, rows, memory, flops, notes, pipeline, attention, experts, step=pipeline.step,
                  timings=Timings.of(program.timings),
                  predicted=lambda: max(pipeline.peaks, key=lambda peak: peak.bytes))


def _budget_note(plan: Plan) -> list[str]:
    return [] if plan.memory_budget is None or not plan.gathers_each_use else [
        "collectives of the backward list every parameter that may be gathered again: which are depends on what the memory "
        "budget has made again"]


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
            out += [CollectiveRow("all_reduce", (KIND,), "backward", where, 1, p.local_bytes, s, KIND)
                    for s in sorted(firsts.values())]
    return out


def _parameter(node: fx.Node, mesh: Mesh) -> ParameterRow:
    value, shape = full_value(node), shard_shape(sharding_at(node), mesh)
    size = math.prod(shape) * value.element_size()
    return ParameterRow(local_value(node).source, tuple(value.shape), without_letters(local_value(node).layout_text), shape,
                        size)
