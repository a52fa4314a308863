"""memory: the peak memory of one rank in a training step, predicted from a partitioned program.

The program's forward and backward are traced on fake tensors of local shapes and taken through the same passes as in
`backends.inductor`: nothing is allocated, compiled or communicated, and neither a GPU nor a process group is needed.
`backends.liveness` then says what is held while each kernel runs. The result is what ``torch.cuda.max_memory_allocated``
shows after a few steps: parameters and AdamW's state are there all the time, gradients from the kernel that makes them
to the optimizer step, which (fused, like gradient clipping) takes nothing of its own.

Not counted: what libraries hold outside of a step (some tens of MiB for cuBLAS), and padding of matrices whose sizes are odd.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.inductor import brief
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor.brief import Input
from fxpar.backends.inductor.liveness import Buffer, Kernel, Lowering, size_of, timeline
from fxpar.backends.inductor.sites import sites_as_inputs
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.runtime import FunctionalRuntime, beside_products
from fxpar.ops.runtime import use_runtime
from fxpar.ops.vocabulary import SDPA
from fxpar.passes.partition.phases import split_phases
from fxpar.pipeline.schedules import Kind, Schedule
from fxpar.program import Program, module_path
from fxpar.progress import stage as told
from fxpar.report.alike import likeness, renamed
from fxpar.sharding.facts import full_value, local_value, sharding_at
from fxpar.sharding.layout import shard_shape
from fxpar.sharding.mesh import Axes, Mesh

aten = torch.ops.aten
PARTS = ("parameters", "gradients", "optimizer", "inputs", "activations", "parameter copies", "temporaries")
PIECES = 150
"""Into how many pieces the curve of a pass is cut; of each the moment at which most is held is kept."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Of a step: which pass runs, how far it is (0 to 1, by the number of its kernels), and bytes in the order of `PARTS`."""

    phase: str
    at: float
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Peak:
    """The moment of a training step at which one rank holds most.

    bytes: all together. phase: "forward" or "backward". where: the operator that runs, and its module. parts: bytes by what
    they are for: "parameters", "gradients" (as far as they are made), "optimizer", "inputs" (the batch, buffers, constants),
    "activations" (kept for the backward pass), "parameter copies" (cast or gathered), "temporaries". kept: bytes that the
    forward pass leaves for the backward pass, copies of parameters included. curve: the moments of the step, one after the
    other; of a rank of a pipeline, one for each action of its schedule. of_stages: of each of its stages, what `kept` is for one
    microbatch.
    """

    bytes: int
    phase: str
    where: str
    parts: dict[str, int]
    kept: int
    curve: tuple[Moment, ...] = field(default=(), repr=False, compare=False)
    of_stages: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.3f}" for name, size in self.parts.items() if size)
        return f"{self.bytes / 2**30:.3f} GiB in the {self.phase} pass ({self.where}): {parts}"


def predict(program: Program, briefly: bool = True) -> Peak:
    """The peak of a partitioned program under the Inductor backend; of the forward pass alone if it is not for training.

    Under a plan with microbatches: of the last of them, where the program is that of one. briefly: a few of many equal blocks
    may stand for all in what takes long (see `fxpar.backends.repeats`); the result is the same.
    """
    return _Step(program, *trace(program, briefly)).peak()


def predict_stages(programs: Sequence[Program], schedule: Schedule, briefly: bool = True) -> list[Peak]:
    """The peak of each rank of a pipeline, from the programs of its stages.

    A rank's is the largest of its stages' own, of one microbatch, with what stays of the others meanwhile: their parameters,
    gradients and optimizer state, and what the forwards keep whose backwards are to come (`Schedule.memory`), as many as the
    rank ever holds. `Peak.kept` is of all of these together. Outputs but for the loss are there until the step ends.
    Not counted: messages that have arrived and are not used yet. briefly: as of `predict`; and one of stages that compute the
    same may stand for all.
    """
    steps, peaks = _each(programs, briefly)
    activations, alive = schedule.memory([peak.kept for peak in peaks]), schedule.alive()
    out = []
    for rank in range(schedule.ranks):
        stages = schedule.stages_of(rank)
        outputs = sum((schedule.microbatches - (alive[s] if programs[s].training else 1)) * _output_bytes(programs[s])
                      for s in stages)
        twice = _counted_twice([programs[s] for s in stages])
        together = []
        for s in stages:
            parts = dict(peaks[s].parts)
            for part, size in (item for t in stages if t != s for item in steps[t].between().items()):
                parts[part] += size
            for part, size in twice.items():
                parts[part] -= size
            parts["activations"] += outputs + (int(activations[rank]) - peaks[s].kept if programs[s].training else 0)
            together.append(replace(peaks[s], bytes=sum(parts.values()), parts=parts, kept=int(activations[rank])))
        most = max(together, key=lambda peak: peak.bytes)
        curve = _curve(schedule, rank, steps, peaks, twice)
        out.append(replace(most, curve=curve, of_stages={s: peaks[s].kept for s in stages}))
    return out


def first_alike(programs: Sequence[Program]) -> list[int]:
    """For each program, which is the first that computes the same on equal shapes."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(_likeness(program)[0], i) for i, program in enumerate(programs)]


def _likeness(program: Program) -> tuple[Hashable, list[str]]:
    return likeness(program, {n: None if i is None else i.facts() for n, i in _inputs(program).items()})


def _each(programs: Sequence[Program], briefly: bool) -> tuple[list[_Step], list[Peak]]:
    """Of each program by itself; of those that compute the same, one may stand for all."""
    steps, peaks = [], []
    seen: dict[Hashable, tuple[_Step, Peak, list[str]]] = {}
    for number, program in enumerate(programs, 1):
        key, blocks = _likeness(program)
        if key not in seen or not briefly:
            with told(f"memory of stage {number} of {len(programs)}"):
                made = _Step(program, *trace(program, briefly))
                seen[key] = made, made.peak(), blocks
        step, peak, its = seen[key]
        steps.append(step)
        peaks.append(replace(peak, where=renamed(peak.where, its, blocks)))
    return steps, peaks


def _curve(schedule: Schedule, rank: int, steps: Sequence[_Step], peaks: Sequence[Peak], twice: dict[str, int]
           ) -> tuple[Moment, ...]:
    """What a rank of a pipeline holds at each action of its list: of the stage that computes, the most of that pass;
    of the others, and of microbatches whose backward is to come, what stays."""
    stages, actions = schedule.stages_of(rank), schedule.actions[rank]
    between = {s: steps[s].between() for s in stages}
    most: dict[tuple[int, str], tuple[int, ...]] = {}
    for s in stages:
        for moment in peaks[s].curve:
            if sum(moment.parts) > sum(most.get((s, moment.phase), ())):
                most[s, moment.phase] = moment.parts
    alive, out = dict.fromkeys(stages, 0), []
    for i, action in enumerate(actions):
        s, phase = action.stage, "forward" if action.kind is Kind.F else "backward"
        runs = action.kind in (Kind.F, Kind.B, Kind.I) and (s, phase) in most
        parts = dict(zip(PARTS, most[s, phase], strict=True)) if runs else {**dict.fromkeys(PARTS, 0), **between[s]}
        for part, size in (item for t in stages if t != s for item in between[t].items()):
            parts[part] += size
        for part, size in twice.items():
            parts[part] -= size
        alive[s] -= action.kind in (Kind.B, Kind.I)
        parts["activations"] += sum(count * peaks[t].kept for t, count in alive.items())
        alive[s] += action.kind is Kind.F
        out.append(Moment(phase, (i + 0.5) / len(actions), tuple(parts[part] for part in PARTS)))
    return tuple(out)


def _output_bytes(program: Program) -> int:
    """Bytes of what a stage returns to the user, scalars left out."""
    pairs = zip(program.tensor_sinks(), program.outputs(), strict=True)
    found = [(shard_shape(sharding_at(n), program.mesh), full_value(n).dtype)
             for sink, n in pairs if sink.kind == "output"]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in found if shape)


def _counted_twice(programs: Sequence[Program]) -> dict[str, int]:
    """What was counted too often of parameters that several stages of one rank use."""
    seen: set[str] = set()
    twice = {"parameters": 0, "optimizer": 0}
    for program in programs:
        for node, source in program.source_of().items():
            if source.kind == "param" and source.name in seen:
                size = size_of(torch.empty(shard_shape(sharding_at(node), program.mesh), dtype=full_value(node).dtype,
                                           device="meta"))
                twice["parameters"] += size
                twice["optimizer"] += 2 * size if source.requires_grad and program.training else 0
            elif source.kind == "param":
                seen.add(source.name)
    return twice


# ---- the graphs ----


class _Shapes(FunctionalRuntime):
    """The `Runtime` of a rank that has no other ranks: collectives over made-up groups, for their shapes."""

    balanced = True

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def size(self, axes: Axes) -> int:
        return self.mesh.size(*axes)

    def index(self, axes: Axes) -> int:
        return 0

    def name(self, axes: Axes) -> str:
        return str(axes)


def trace(program: Program, briefly: bool = True) -> tuple[list[fx.Graph], list[Input]]:
    """The forward graph, and the backward graph if there is one, as Inductor lowers them; and what the forward takes.

    briefly: of a long run of equal blocks, few may be traced.
    """
    inputs: list[Input | None] = [*_inputs(program).values()]
    module, plan = program.module, program.plan
    shapes = _Shapes(program.mesh)
    transport = beside_products(shapes, program.mesh, plan)
    with use_runtime(shapes), compat.memory_budget(plan.memory_budget):
        if program.training and plan.microbatches > 1:
            module, more = _last_microbatch(program, [i.value for i in inputs if i is not None and i.part == "parameters"])
            inputs += more
        with torch.set_grad_enabled(program.training):
            settings = inductor.settings(plan, transport, as_on_gpu=True)
            if briefly:
                made = brief.lowered(*_plain(module, inputs), plan, settings)
                if made is not None:
                    return made
            plain, taken = _plain(module, inputs)
            lowered = compat.lowered_graphs(plain, [i.value for i in taken], settings)
    return [m.graph for m in lowered], taken


def _plain(module: fx.GraphModule, inputs: list[Input | None]) -> tuple[fx.GraphModule, list[Input]]:
    """The graph that the backend would compile, and what it takes. inputs: of each placeholder; None for what is no tensor."""
    plain, _ = tensor_inputs_only(module, [None if i is None else i.value for i in inputs], fused=True)
    taken = [i for i in inputs if i is not None]
    taken += [Input(x, "inputs") for x in sites_as_inputs(plain, [i.value for i in taken])]
    _as_on_gpu(plain)
    return plain, taken


def _inputs(program: Program) -> dict[fx.Node, Input | None]:
    """What the program takes for each of its placeholders; None for what is no tensor."""
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    inputs: dict[fx.Node, Input | None] = {}
    for node, source in program.source_of().items():
        part = {"param": "parameters", "received": "activations"}.get(source.kind, "inputs")
        value = _local(mode, node, source.value, program.mesh, source.requires_grad)
        trained = source.kind == "param" and source.requires_grad
        inputs[node] = Input(value, part, trained) if isinstance(value, Tensor) else None
    return inputs


def _local(mode: Any, node: fx.Node, value: Any, mesh: Mesh, requires_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    known = local_value(node)
    full = value if known.full is None else known.full
    shape = tuple(full.shape) if known.sharding is None else shard_shape(known.sharding, mesh)
    with mode:
        return torch.empty(shape, dtype=full.dtype, requires_grad=requires_grad)


def _last_microbatch(program: Program, parameters: list[Tensor]) -> tuple[fx.GraphModule, list[Input]]:
    """The program as the last microbatch of a step runs it (see `fxpar.run.steps`), and what it takes besides."""
    plan, mesh = program.plan, program.mesh
    if plan.gathers_each_use or mesh.size(*mesh.data) == 1:
        return program.module, []
    phases = split_phases(program)
    if not phases.boundaries:
        return program.module, []
    with torch.no_grad(), parameters[0].fake_mode:  # type: ignore[attr-defined]
        values = dict(zip(phases.boundaries, phases.unshard(*parameters), strict=True))
        more = [Input(torch.empty_like(values[b], dtype=b.dtype), "gradients") if kind == "unreduced" else
                Input(values[b], "parameter copies") for kind, b in phases.compute_and_reduce.extra]
    return phases.compute_and_reduce.module, more


def _as_on_gpu(module: fx.GraphModule) -> None:
    """Prepare a program for fake inputs on the CPU, in place, so that the operators are those of a GPU."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: torch.device("cpu") if isinstance(a, torch.device) else a)
        if node.target is SDPA and node.kwargs.get("enable_gqa"):
            node.target = _grouped_attention
    module.recompile()


def _grouped_attention(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """GPUs have no fused kernel for heads that share keys in fp32."""
    if q.dtype in (torch.float16, torch.bfloat16):
        return SDPA(q, *args, **kwargs)
    return aten._scaled_dot_product_attention_math.default(q, *args, **kwargs)[0]


# ---- the step ----


class _Step:
    """The kernels of forward and backward, one after the other, and what is held while each of them runs."""

    def __init__(self, program: Program, graphs: list[fx.Graph], inputs: list[Input]):
        places = graphs[0].find_nodes(op="placeholder")
        self.given = [Buffer(n, i.value.dtype, size_of(i.value), freed=False, reusable=False)
                      for n, i in zip(places, inputs, strict=True)]
        self.part: dict[Buffer, str] = {b: i.part for b, i in zip(self.given, inputs, strict=True)}
        trained = sum(b.bytes for b, i in zip(self.given, inputs, strict=True) if i.trained)
        self.optimizer = 2 * trained if program.training else 0
        earlier = program.plan.microbatches > 1 and "gradients" not in self.part.values()
        self.accumulated = trained if program.training and earlier else 0
        self.saved: list[Buffer] = []
        self.tangents: list[Buffer] = []
        self.forward = Lowering(graphs[0], list(self.given))
        self.backward = self._backward(graphs[1]) if len(graphs) > 1 else None
        self._mark_copies(self.forward)
        if self.backward is not None:
            self._mark_copies(self.backward)

    def _backward(self, graph: fx.Graph) -> Lowering:
        """It takes what the forward pass leaves after the program's own outputs, then the gradients of those."""
        places = graph.find_nodes(op="placeholder")
        count = sum(not n.name.startswith("tangents") for n in places)
        left = self.forward.outputs
        outputs, saved = left[: len(left) - count], left[len(left) - count :]
        self.saved = [b for b in dict.fromkeys(saved) if b is not None and self.part.get(b, "activations") == "activations"]
        for buffer in outputs:
            if buffer is not None:
                buffer.freed = buffer.reusable = False
        self.tangents = [Buffer(n, n.meta["val"].dtype, size_of(n.meta["val"]), reusable=False) for n in places[count:]]
        lowering = Lowering(graph, [*saved, *self.tangents])
        self.part |= {b: "activations" for b in self.saved}
        self.part |= {b: "gradients" for b in lowering.outputs if b is not None and b not in self.part}
        return lowering

    def _mark_copies(self, lowering: Lowering) -> None:
        """What is made of parameters alone."""
        for kernel in lowering.kernels:
            if kernel.reads and all(self.part.get(b) in ("parameters", "parameter copies") for b in kernel.reads):
                self.part |= {b: "parameter copies" for b in kernel.writes if self.part.get(b) != "gradients"}

    def _moments(self) -> Iterator[tuple[str, Kernel, dict[Buffer, None]]]:
        resident = dict.fromkeys(self.given)
        for kernel, live in timeline(self.forward, list(resident)):
            resident = live
            yield "forward", kernel, live
        if self.backward is not None:
            for kernel, live in timeline(self.backward, [*resident, *self.tangents]):
                yield "backward", kernel, live

    def between(self) -> dict[str, int]:
        """What is there between microbatches, by part."""
        parts = {"optimizer": self.optimizer, "gradients": self.accumulated}
        for buffer in self.given:
            part = self.part[buffer]
            if part in ("parameters", "gradients", "parameter copies"):
                parts[part] = parts.get(part, 0) + buffer.bytes
        return parts

    def peak(self) -> Peak:
        phase, where, most, live_then, workspace = "forward", "nothing runs", 0, list(self.given), 0
        counts = {"forward": len(self.forward.kernels), "backward": len(self.backward.kernels) if self.backward else 0}
        largest: dict[tuple[str, int], tuple[int, list[Buffer], int]] = {}
        number = dict.fromkeys(counts, 0)
        for now, kernel, live in self._moments():
            size = sum(b.bytes for b in live) + kernel.workspace
            if size > most:
                phase, where, most, live_then, workspace = now, _where(kernel), size, list(live), kernel.workspace
            piece = now, number[now] * PIECES // counts[now]
            if piece not in largest or size > largest[piece][0]:
                largest[piece] = size, list(live), kernel.workspace
            number[now] += 1
        curve = [Moment(now, (i + 0.5) / PIECES, tuple(self._parts(live, space).values()))
                 for (now, i), (_, live, space) in largest.items()]
        parts = self._parts(live_then, workspace)
        return Peak(sum(parts.values()), phase, where, parts, sum(b.bytes for b in self.saved), tuple(curve))

    def _parts(self, live: list[Buffer], workspace: int) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        parts |= {"optimizer": self.optimizer, "gradients": self.accumulated, "temporaries": workspace}
        for buffer in live:
            parts[self.part.get(buffer, "temporaries")] += buffer.bytes
        return parts


def _where(kernel: Kernel) -> str:
    """What a kernel is there for: its last operator that is stored."""
    node = kernel.writes[-1].node if kernel.writes else kernel.nodes[-1]
    name = getattr(node.target, "overloadpacket", node.target)
    node.meta.setdefault("nn_module_stack", node.meta.get("fwd_nn_module_stack"))
    path = module_path(node)
    return f"{name} of {path}" if path else str(name)
