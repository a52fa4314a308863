"""`fxpar.inspect` and `Report`: what a plan does to a model, without running it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, overload

from torch import fx, nn

from fxpar.compiler import Captured, capture, compile_program
from fxpar.model.inputs import microbatch
from fxpar.ops.collectives import typed
from fxpar.plan import Plan, Plans
from fxpar.program import Program, module_path
from fxpar.report.memory import Peak, predict
from fxpar.sharding.layout import held_shape
from fxpar.sharding.mesh import Mesh

GIB = 2**30


@dataclass(frozen=True)
class ParameterRow:
    """name, global shape, layout as text, shape and bytes that one rank holds."""

    name: str
    shape: tuple[int, ...]
    layout: str
    local_shape: tuple[int, ...]
    local_bytes: int


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives alike: kind ("all_gather", ...), axes, phase ("forward" or "backward"), the module they serve (layer
    numbers replaced by ``*``), how many a step, and the bytes of their results on one rank, all together."""

    kind: str
    axes: tuple[str, ...]
    phase: str
    where: str
    count: int
    bytes: int


@dataclass
class Report:
    """What one rank holds, computes and communicates in one training step.

    memory: bytes that are there between steps: "parameters", "optimizer" (AdamW's two moments, in the parameters' dtypes); and
    "gradients", from the backward pass to the optimizer step. flops: of one step, forward and backward.
    """

    plan: Plan
    mesh: Mesh
    parameters: list[ParameterRow]
    collectives: list[CollectiveRow]
    memory: dict[str, int]
    flops: int
    notes: list[str] = field(default_factory=list)
    predicted: Callable[[], Peak] = field(kw_only=True, repr=False, compare=False)

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

    def count(self, kind: str, phase: str | None = None, axes: tuple[str, ...] | None = None) -> int:
        """How many collectives of a kind a step has."""
        return sum(r.count for r in self.collectives if r.kind == kind and phase in (None, r.phase)
                   and axes in (None, r.axes))

    def __str__(self) -> str:
        return "\n".join([f"plan {self.plan}   mesh {self.mesh}   world size {self.mesh.world_size}", "",
                          *_table(("parameter", "shape", "layout", "a rank holds", "MiB"), _parameter_rows(self.parameters)), "",
                          *_table(("collective", "over", "phase", "where", "count", "MiB"), [
                              (r.kind, "+".join(r.axes), r.phase, r.where, str(r.count), f"{r.bytes / 2**20:.2f}")
                              for r in self.collectives]), "",
                          "memory a rank: " + ", ".join(f"{k} {v / GIB:.3f} GiB" for k, v in self.memory.items()),
                          f"peak memory a rank: {self._peak()}",
                          f"compute a rank and step: {self.flops / 1e12:.4g} TFLOP",
                          *(f"note: {n}" for n in self.notes)])

    def _peak(self) -> str:
        try:
            return str(self.peak)
        except Exception as error:  # whatever stops Inductor must not hide the rest of the report
            return f"not predicted ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


@overload
def inspect(model: nn.Module | Captured, plan: Plan | str, example_inputs: Any = None) -> Report: ...


@overload
def inspect(model: nn.Module | Captured, plan: Plans, example_inputs: Any = None) -> list[Report]: ...


def inspect(model: nn.Module | Captured, plan: Plan | str | Plans, example_inputs: Any = None) -> Report | list[Report]:
    """What `plan` does to `model`: layouts, collectives, memory, FLOPs; for any world size, without processes.

    model: may be on the meta device; or what `fxpar.capture` made of one. plan: one, or several, of which each has a report; the
    model is captured once for all of them. example_inputs: the *global* batch (a dict of keyword arguments or a tuple), of which
    only shapes and dtypes matter; may be left out for Hugging Face models, and is of no use with what is captured.
    Raises: as `fxpar.parallelize`.
    """
    captured = model if isinstance(model, Captured) else capture(model, example_inputs)
    if isinstance(plan, Plan | str):
        return _inspect(captured, plan)
    return [_inspect(captured, each) for each in plan]


def _inspect(captured: Captured, plan: Plan | str) -> Report:
    program = captured.partition(plan)

    def predicted() -> Peak:
        if program.plan.microbatches == 1:
            return predict(program)
        dims = {s.name: n.meta.get("batch_dim") for n, s in program.source_of().items() if s.kind == "input"}
        part = microbatch(captured.call, program.plan.microbatches, dims)
        return predict(compile_program(captured.model, program.plan, part[1] or part[0]))

    return report_of(program, predicted)


def report_of(program: Program, predicted: Callable[[], Peak] | None = None) -> Report:
    """The report of a partitioned program. predicted: how its peak memory is found, if not from the program as it is."""
    parameters = [_parameter(n, program.mesh) for n, s in program.source_of().items() if s.kind == "param"]
    trained = [(n, s) for n, s in program.source_of().items() if s.kind == "param" and s.requires_grad]
    gradients = sum(_local_numel(n, program.mesh) * n.meta["global"].element_size() for n, _ in trained)
    memory = {"parameters": sum(p.local_bytes for p in parameters), "gradients": gradients, "optimizer": 2 * gradients}
    forward = sum(n.meta.get("flops", 0) for n in program.graph.nodes)
    return Report(program.plan, program.mesh, parameters, _collectives(program), memory,
                  forward * (3 if program.training else 1), list(program.notes),
                  predicted=predicted or functools.partial(predict, program))


def _local_shape(node: fx.Node, mesh: Mesh) -> tuple[int, ...]:
    return held_shape(node.meta["tiling"], mesh)


def _local_numel(node: fx.Node, mesh: Mesh) -> int:
    return math.prod(_local_shape(node, mesh))


def _parameter(node: fx.Node, mesh: Mesh) -> ParameterRow:
    value = node.meta["global"]
    return ParameterRow(node.meta["source"], tuple(value.shape), node.meta["shows"], _local_shape(node, mesh),
                        _local_numel(node, mesh) * value.element_size())


def _collectives(program: Program) -> list[CollectiveRow]:
    rows: dict[tuple, list[int]] = {}

    def add(kind: str, axes: tuple, phase: str, node: fx.Node, size: int) -> None:
        where = re.sub(r"\b\d+\b", "*", module_path(node))
        entry = rows.setdefault((kind, axes, phase, where), [0, 0])
        entry[0] += 1
        entry[1] += size

    for node in program.graph.nodes:
        made = typed(node)
        if made is None:
            continue
        size = node.meta.get("bytes", 0)
        if made.forward.comm is not None:
            add(made.forward.comm, made.axes, "forward", node, size)
        if node.meta.get("needs_grad") and made.backward is not None and made.backward.comm is not None:
            add(made.backward.comm, made.axes, "backward", node, made.operand_bytes(size, program.mesh))
    ordered = sorted(rows.items(), key=lambda r: (r[0][2] != "forward", r[0]))
    return [CollectiveRow(kind, axes, phase, where, count, size)
            for (kind, axes, phase, where), (count, size) in ordered]


def _parameter_rows(parameters: list[ParameterRow]) -> list[tuple[str, ...]]:
    """Repeated layers share a line."""
    lines: dict[tuple, list] = {}
    for p in parameters:
        key = (re.sub(r"\b\d+\b", "*", p.name), p.shape, p.layout, p.local_shape)
        entry = lines.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += p.local_bytes
    return [(f"{name}{f'  (x{n})' if n > 1 else ''}", str(list(shape)), layout, str(list(local)), f"{size / 2**20:.2f}")
            for (name, shape, layout, local), (n, size) in lines.items()]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *rows]]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
