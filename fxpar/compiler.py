"""compiler: from a user's model and a plan to the program of one rank, by the passes of `fxpar.passes.pipeline`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxpar import compat
from fxpar.errors import CaptureError, PlanError
from fxpar.model.inputs import Call, example_call, globalize, leaves
from fxpar.model.state import State
from fxpar.ops.dropout_attention import uses_kernels
from fxpar.passes.capture.capture import capture as trace
from fxpar.passes.infer.roles import batch_dim_error
from fxpar.passes.pipeline import TRACED_FIELDS, Observer, back, front, passes, run
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.progress import stage
from fxpar.sharding import mesh as meshes
from fxpar.sharding.factors import Factor
from fxpar.sharding.factors import leaves as leaves_of
from fxpar.sharding.facts import dims_of, global_value
from fxpar.sharding.layout import Sharding


def compile_program(model: nn.Module, plan: Plan | str, example_inputs: Any = None, *,
                    device: torch.device | str | None = None, observe: Observer | None = None,
                    pinned: dict[str, Sharding] | None = None) -> Program:
    """Capture `model` on *global* inputs and run the passes: the program of one rank, without processes.

    model: may be on the meta device. example_inputs: the global batch (a dict of keyword arguments or a tuple), of which
    only shapes and dtypes matter; may be left out for Hugging Face models. Under a plan with microbatches the program runs one of
    them (see `fxpar.program.Microbatches`). device: where the program is to run (default: where the parameters are; the CPU for a
    meta model). `observe(name, program)` is called after capture and after
    every pass. pinned: how parameters are stored already, by name: for a model that is called in another way.
    ``program.timings`` has the seconds of each pass. Raises: `PlanError`, `InputError`, `CaptureError`, `UnsupportedOperator`.
    """
    if pinned:
        plan = Plan.of(plan)
        plan.require_supported()
        call = example_call(model, example_inputs)
        return run(_start(model, plan, call, _device(model, device), observe, plan.microbatches), passes(pinned), observe)
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
        program = self._inferred.get(self._key(plan))
        if program is None:
            program = run(_start(self.model, plan, self.call, self.device, observe), front(), observe)
            self._depends.add(program.reads)
            self._inferred[self._key(plan)] = program
        elif observe is not None:
            observe(front()[-1][0], program)
        return run(program.under(plan), back(), observe)

    def _key(self, plan: Plan) -> tuple:
        kind = self.device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (*(getattr(plan, name) for name in TRACED_FIELDS), auto, uses_kernels(), *self._depends.key())


def capture(model: nn.Module, example_inputs: Any = None, *, device: torch.device | str | None = None) -> Captured:
    """`model` on a *global* batch, captured once for many plans: ``captured.partition(plan)``, and the first argument of
    `fxpar.inspect`, `fxpar.simulate` and `fxpar.testing.assert_equivalent`.

    example_inputs, device: as in `compile_program`. The trace is made when the first plan asks for it. Raises: `InputError`.
    """
    return Captured(model, example_inputs, device=device)


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """device, or where the parameters are; the CPU for a meta model."""
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        device = torch.device("cpu") if device.type == "meta" else device
    return torch.device(device)


def compile_replica(model: nn.Module, plan: Plan, device: torch.device, observe: Observer | None, call: Call,
                    pinned: dict[str, Sharding] | None, microbatches: int = 1) -> Program:
    """The same from *one replica's* inputs: the global ones are dp times as many along each input's batch dim.

    microbatches: how many the replica's batch is run in. Which dim the batch's is follows from the model (see roles); it is
    assumed to be dim 0, and the capture is repeated in the rare case that it is not. Where the model does not take inputs that
    are longer in those dims, it is captured with one replica's, which shows what dims are the same.
    Raises: as `compile_program`; a `CaptureError` says what dims were taken for the batch's.
    """
    batch = _assumed(plan, call)
    rest = (device, observe, call, pinned, microbatches)
    try:
        return _of_replicas(model, plan, batch, *rest)
    except CaptureError as error:
        if plan.dp == 1 or not batch:
            raise
        for guess in _seen(model, plan, batch, *rest):
            with contextlib.suppress(CaptureError, PlanError):
                return _of_replicas(model, replace(plan, batch_dims=guess), guess, *rest)
        taken = ", ".join(f"{name}: {dim}" for name, dim in batch.items())
        hint = f"the batch of dp={plan.dp} replicas was taken to lie in these dims of the inputs: {taken}; if it does not, say " \
               "where it does (None: an input has no batch): Plan(batch_dims={\"input\": dim})"
        raise CaptureError(error.what, error.where, f"{error.way_out}. Or: {hint}" if error.way_out else hint) from error


def _of_replicas(model: nn.Module, plan: Plan, batch: Mapping[str, int | None], device: torch.device, observe: Observer | None,
                 call: Call, pinned: dict[str, Sharding] | None, microbatches: int) -> Program:
    """The program for one replica's inputs whose batch dims are assumed to be `batch`, until the model shows others."""
    mesh = meshes.from_plan(plan)
    for _ in range(3):
        program = _start(model, plan, globalize(call, mesh, batch), device, observe, microbatches)
        program = run(program, front(pinned), observe)
        found = {s.name: global_value(n).batch_dim for n, s in program.source_of().items() if s.kind == "input"}
        if plan.dp == 1 or all(found.get(k) == v for k, v in batch.items() if k in found):
            program = run(program, back(pinned), observe)
            if plan.cp == 1:  # otherwise the report reads them
                program.placements = None
            return program
        batch = found
    raise PlanError("batch_dims", dict(plan.batch_dims or ()), "must name the batch dim of each input, which could not be "
                    "inferred", 'batch_dims={"input": 0}')


def _seen(model: nn.Module, plan: Plan, assumed: Mapping[str, int | None], device: torch.device, observe: Observer | None,
          call: Call, pinned: dict[str, Sharding] | None, microbatches: int) -> Iterator[dict[str, int | None]]:
    """What else the batch dims of inputs may be, most likely first: the dims that the model has be the same, as it takes one
    replica's inputs."""
    try:
        program = run(_start(model, plan, call, device, None, microbatches), front(pinned), None)
    except CaptureError:
        return
    found: dict[Factor, dict[str, int | None]] = {}
    for node, source in program.source_of().items():
        if source.name in assumed and source.kind == "input":
            for i, dim in enumerate(dims_of(node)):
                if flat := leaves_of(dim):
                    guess = found.setdefault(flat[0], dict.fromkeys(assumed))
                    guess[source.name] = i if guess[source.name] is None else guess[source.name]
    asked = dict(plan.batch_dims or ())
    guesses = [{**guess, **asked} for guess in found.values()]
    yield from sorted((g for g in guesses if g != assumed), key=lambda g: -sum(dim is not None for dim in g.values()))


def _assumed(plan: Plan, call: Call) -> dict[str, int | None]:
    """Dim 0 of every input as long as the first one's; what the plan says of the others."""
    asked = dict(plan.batch_dims or ())
    tensors = {k: v for k, v in leaves(call).items() if isinstance(v, torch.Tensor) and v.dim()}
    for name, dim in asked.items():
        if dim is not None and name in tensors and dim >= tensors[name].dim():
            raise batch_dim_error(name, dim, tensors[name].dim())
    first = next((int(v.shape[0]) for k, v in tensors.items() if k not in asked), None)
    return {k: asked[k] if k in asked else 0 if int(v.shape[0]) == first else None for k, v in tensors.items()}


def _start(model: nn.Module, plan: Plan, call: Call, device: torch.device, observe: Observer | None,
           microbatches: int = 1) -> Program:
    start = time.perf_counter()
    with stage("capturing the model"), compat.quiet_traces():
        program = trace(model, plan, meshes.in_time(meshes.from_plan(plan), microbatches), *call, device)
    program.timings["capture"] = time.perf_counter() - start
    if observe is not None:
        observe("capture", program)
    return program
