"""The list of passes: what happens between a user's model and a program that a backend can run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxpar import mesh as meshes
from fxpar.errors import PlanError
from fxpar.inputs import Call, example_call, globalize, leaves
from fxpar.passes.axes import refine_axes
from fxpar.passes.capture import capture as trace
from fxpar.passes.dropout import counter_dropout
from fxpar.passes.gqa import fold_repeat_kv
from fxpar.passes.infer import infer
from fxpar.passes.layout import Tiling
from fxpar.passes.losses import expand_losses
from fxpar.passes.masks import fold_masks
from fxpar.passes.outputs import keep_loss
from fxpar.passes.partition import partition
from fxpar.passes.place import place
from fxpar.passes.precision import cast_parameters
from fxpar.passes.replicas import average_replicas
from fxpar.passes.simplify import simplify
from fxpar.passes.zero import shard_storage
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.state import State

TRACED_FIELDS = ("outputs", "param_dtype", "reduce_dtype", "roles", "batch_dims")
"""The fields of a plan that the passes up to `infer` read: plans that agree in them share an inferred program."""
Pass = Callable[[Program], Program]
Observer = Callable[[str, Program], None]


def passes(pinned: dict[str, Tiling] | None = None) -> list[tuple[str, Pass]]:
    """The passes after capture, in order."""
    return [
        ("simplify", simplify),
        ("outputs", keep_loss),
        ("precision", cast_parameters),
        ("masks", fold_masks),
        ("gqa", fold_repeat_kv),
        ("losses", expand_losses),
        ("dropout", counter_dropout),
        ("infer", lambda p: infer(p, pinned)),
        ("axes", refine_axes),
        ("place", lambda p: place(p, pinned)),
        ("zero", lambda p: shard_storage(p, pinned)),
        ("partition", partition),
        ("replicas", average_replicas),
    ]


def compile_program(model: nn.Module, plan: Plan | str, example_inputs: Any = None, *,
                    device: torch.device | str | None = None, observe: Observer | None = None,
                    pinned: dict[str, Tiling] | None = None) -> Program:
    """Capture `model` on *global* inputs and run the passes: the program of one rank, without processes.

    model: may be on the meta device. example_inputs: the global batch (a dict of keyword arguments or a tuple), of which
    only shapes and dtypes matter; may be left out for Hugging Face models. device: where the program is to run (default:
    where the parameters are; the CPU for a meta model). `observe(name, program)` is called after capture and after
    every pass. pinned: how parameters are stored already, by name: for a model that is called in another way.
    ``program.timings`` has the seconds of each pass.
    """
    if pinned:
        plan = Plan.of(plan)
        plan.require_supported()
        call = example_call(model, example_inputs)
        return _run(_start(model, plan, call, _device(model, device), observe), passes(pinned), observe)
    return Captured(model, example_inputs, device=device).partition(plan, observe=observe)


class Captured:
    """A model on a global batch, of which `partition` makes the program of one rank under any plan. Made by `fxpar.capture`.

    It is traced when the first plan asks for it, and again only for a plan that has it traced otherwise (`TRACED_FIELDS`), or
    after the model changed.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None, *, device: torch.device | str | None = None):
        self.model, self.call, self.device = model, example_call(model, example_inputs), _device(model, device)
        self._depends = State(model)
        self._inferred: dict[tuple, Program] = {}

    def partition(self, plan: Plan | str, *, observe: Observer | None = None) -> Program:
        """The program of one rank under `plan`. `observe` as in `compile_program`, of the passes that run.

        Raises: `PlanError`, `CaptureError`, `UnsupportedOperator`.
        """
        plan = Plan.of(plan)
        plan.require_supported()
        front, back = _split(passes())
        program = self._inferred.get(self._key(plan))
        if program is None:
            program = _run(_start(self.model, plan, self.call, self.device, observe), front, observe)
            self._depends.add(program.reads)
            self._inferred[self._key(plan)] = program
        elif observe is not None:
            observe(front[-1][0], program)
        return _run(program.under(plan), back, observe)

    def _key(self, plan: Plan) -> tuple:
        kind = self.device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (*(getattr(plan, name) for name in TRACED_FIELDS), auto, *self._depends.key())


def capture(model: nn.Module, example_inputs: Any = None, *, device: torch.device | str | None = None) -> Captured:
    """`model` on a *global* batch, captured once for many plans: ``captured.partition(plan)``, and the first argument of
    `fxpar.inspect`, `fxpar.simulate` and `fxpar.testing.assert_equivalent`.

    Arguments as in `compile_program`. The trace is made when the first plan asks for it. Raises: `InputError`.
    """
    return Captured(model, example_inputs, device=device)


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """device, or where the parameters are; the CPU for a meta model."""
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        device = torch.device("cpu") if device.type == "meta" else device
    return torch.device(device)


def compile_replica(model: nn.Module, plan: Plan, device: torch.device, observe: Observer | None, call: Call,
                    pinned: dict[str, Tiling] | None) -> Program:
    """The same from *one replica's* inputs: the global ones are dp times as many along each input's batch dim.

    Which dim that is follows from the model (see roles); it is assumed to be dim 0, and the capture is repeated in the
    rare case that it is not.
    """
    mesh = meshes.from_plan(plan)
    front, back = _split(passes(pinned))
    batch = _assumed(plan, call)
    for _ in range(3):
        program = _start(model, plan, globalize(call, plan, mesh, batch), device, observe)
        program = _run(program, front, observe)
        found = {s.name: n.meta.get("batch_dim") for n, s in program.source_of().items() if s.kind == "input"}
        if plan.dp == 1 or all(found.get(k) == v for k, v in batch.items() if k in found):
            return _run(program, back, observe)
        batch = found
    raise PlanError("batch_dims", dict(plan.batch_dims or ()), "must name the batch dim of each input, which could not be "
                    "inferred", 'batch_dims={"input": 0}')


def _assumed(plan: Plan, call: Call) -> dict[str, int | None]:
    """Dim 0 of every input as long as the first one's; what the plan says of the others."""
    asked = dict(plan.batch_dims or ())
    tensors = {k: v for k, v in leaves(call).items() if isinstance(v, torch.Tensor) and v.dim()}
    first = next((int(v.shape[0]) for k, v in tensors.items() if k not in asked), None)
    return {k: asked[k] if k in asked else 0 if int(v.shape[0]) == first else None for k, v in tensors.items()}


def _start(model: nn.Module, plan: Plan, call: Call, device: torch.device, observe: Observer | None) -> Program:
    start = time.perf_counter()
    program = trace(model, plan, meshes.from_plan(plan), *call, device)
    program.timings["capture"] = time.perf_counter() - start
    if observe is not None:
        observe("capture", program)
    return program


def _run(program: Program, steps: list[tuple[str, Pass]], observe: Observer | None) -> Program:
    for name, apply in steps:
        start = time.perf_counter()
        program = apply(program)
        program.timings[name] = time.perf_counter() - start
        if observe is not None:
            observe(name, program)
    return program


def _split(steps: list[tuple[str, Pass]]) -> tuple[list[tuple[str, Pass]], list[tuple[str, Pass]]]:
    """Before and after roles are known."""
    at = [name for name, _ in steps].index("infer") + 1
    return steps[:at], steps[at:]
