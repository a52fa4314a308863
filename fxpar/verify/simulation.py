"""`fxpar.simulate`: prove, on one machine and without processes, what a plan computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxpar import compat
from fxpar.backends import simulate as simulate_backend
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.transport.base import TRANSPORTS
from fxpar.compiler import Captured, capture, compile_program
from fxpar.errors import PlanError
from fxpar.model.inputs import Call, canonical, leaves, signature
from fxpar.model.state import State
from fxpar.passes.pipeline import Observer
from fxpar.passes.strategies.stages import cut_stages
from fxpar.pipeline.schedules import schedule
from fxpar.plan import Plan, require_one_of
from fxpar.program import Program
from fxpar.progress import stage
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.layout import Sharding
from fxpar.verify.pipelined import SimulatedPipelinedStep
from fxpar.verify.step import SimulatedRanks, SimulatedStep, StepResult

BACKENDS = ("eager", "inductor")


class Simulation:
    """A model under a plan, all ranks in this process. Made by `fxpar.simulate`."""

    def __init__(self, model: nn.Module | Captured, plan: Plan | str, example: Any = None, observe: Observer | None = None, *,
                 lowered: bool = False, backend: str = "eager", transport: str = "auto", passes: int | None = None):
        self.plan = Plan.of(plan)
        self.plan.require_supported()
        require_one_of("backend", backend, BACKENDS)
        require_one_of("transport", transport, TRANSPORTS)
        self.captured = model if isinstance(model, Captured) else capture(model, example)
        model = self.captured.model
        if any(getattr(model, name) for name in compat.HOOKS):
            raise PlanError("model", type(model).__name__, "has forward hooks of its own, which run around a parallel module's "
                            "program and not in a simulation", "the model without them")
        self.model, self.observe = model, observe
        self.lowered = lowered or backend == "inductor" or self.plan.pp > 1
        self.backend, self.transport, self.passes = backend, transport, passes
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.watch: simulate_backend.Watch | None = None
        self._depends = State(model)
        self._programs: dict[tuple, Program] = {}
        self._stored: dict[str, Sharding] = {}  # the parameters' storage, which the first program decides
        self._ranks: dict[int, SimulatedRanks] = {}
        self.program = self._compile(self.captured.call)

    def _compile(self, call: Call) -> Program:
        device = self.device.type
        auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (signature(leaves(call)), *self._depends.key(), auto)
        if key not in self._programs:
            if call is self.captured.call and not self._stored:
                program = self.captured.partition(self.plan, observe=self.observe)
            else:
                args, kwargs = call
                program = compile_program(self.model, self.plan, kwargs or args, device=self.device, observe=self.observe,
                                          pinned=self._stored)
            self._programs[key] = program
            self._depends.add(self._programs[key].reads)
            for node, source in self._programs[key].source_of().items():
                if source.kind == "param":
                    self._stored.setdefault(source.name, sharding_at(node))
        return self._programs[key]

    def _ranks_of(self, program: Program) -> SimulatedRanks:
        if id(program) not in self._ranks:
            self._ranks[id(program)] = Lowered(
                program.mesh, self.plan, self.backend == "inductor", self.transport, self.passes
            ) if self.lowered else simulate_backend.Lockstep(program.mesh)
        return self._ranks[id(program)]

    def step(self, *args: Any, seed: int = 0, **kwargs: Any) -> StepResult:
        """Forward and backward on the *global* batch, over all microbatches of the plan.

        seed: what dropout draws from (same seed, same masks, whatever the microbatches).
        """
        call = canonical(self.model, args, kwargs)
        program = self.program = self._compile(call)
        with stage(f"running {self.plan.world_size} ranks in this process"):
            return self._step(program, call, seed)

    def _step(self, program: Program, call: Call, seed: int) -> StepResult:
        ranks, named = self._ranks_of(program), leaves(call)
        if self.plan.pp == 1:
            return SimulatedStep(self.model, program, ranks, named, seed, self.watch).run()
        assert isinstance(ranks, Lowered)
        plan = self.plan
        order = schedule(plan.schedule, ranks=plan.pp, virtual_stages=plan.virtual_stages, microbatches=plan.microbatches)
        stages = cut_stages(program, order.stages)
        return SimulatedPipelinedStep(self.model, program, ranks, named, seed, stages, order).run()


def simulate(model: nn.Module | Captured, plan: Plan | str, example_inputs: Any = None, *, lowered: bool = False,
             backend: str = "eager", transport: str = "auto") -> Simulation:
    """Every rank of `plan` in this process. `example_inputs`: the global batch, a dict of keyword arguments or a tuple.
    model: may be what `fxpar.capture` made of one and of its inputs.

    The simulation's ``step(**global_batch)`` gives the loss, the outputs and the full gradients, by the same local
    programs and collectives that real ranks would run. lowered: through the forward and backward graphs as the inductor
    backend hands them over (see `fxpar.backends.inductor.lowered`), as stages of a pipeline always go. backend: "eager", or
    "inductor", which compiles those graphs. transport, of lowered graphs: "auto" has parameters and gradients go by copy engines,
    as on GPUs of one host, where the plan stores parameters in parts; "nccl" as between hosts.
    Raises: as `fxpar.parallelize`; `EquivalenceError` where ranks would hang.
    """
    return Simulation(model, plan, example_inputs, lowered=lowered, backend=backend, transport=transport)
