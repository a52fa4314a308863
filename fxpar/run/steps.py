"""steps: which graph of a program's phases (see `fxpar.passes.partition.phases`) runs when, over the microbatches of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxpar import compat
from fxpar.passes.partition.phases import Boundary, Compute, Phases, split_phases
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.run.after_steps import after_steps
from fxpar.run.gradients import Receipt, UnreducedGradients
from fxpar.run.recording import RecordedProgram
from fxpar.sharding.mesh import Mesh

Lower = Callable[..., Callable[..., Any]]
"""(graph, example inputs, and by its name a recorder) -> what runs it."""
Recorded = Callable[[Program, str, frozenset[int]], RecordedProgram | None]
"""(program, which of its microbatches, which inputs stay where they are besides the program's own) -> what records it."""
BEFORE, LAST = "microbatches before the last", "the last microbatch"


@dataclass
class Microbatch:
    """How one microbatch runs: `run` takes the program's inputs, then `detached` (values whose gradients `receipt` is told of),
    then `inputs`."""

    run: Callable[..., Any]
    detached: list[Tensor]
    inputs: list[Tensor]
    receipt: Receipt


@dataclass
class _InPlace:
    """Values at boundaries that stay where they are, from step to step, for recordings that read them there.

    state: of the parameters that they were made of; None if an optimizer has stepped since. is_new: they were made in this step.
    """

    state: Any
    values: list[Tensor]
    is_new: bool = True

    def renewed(self, values: list[Tensor], local: list[Tensor], state: Any) -> list[Tensor]:
        """These values, where those of before are. local: parts of parameters, some of which may be such values themselves.
        Autograd is told that memory which it may have saved was written to, if parameters have changed since."""
        own = {compat.storage_of(x) for x in local}
        before = self.values if state != self.state else [x.data for x in self.values]
        for to, made in zip(before, values, strict=True):
            if compat.storage_of(made) not in own:
                to.copy_(made)
        return [made if compat.storage_of(made) in own else to for to, made in zip(self.values, values, strict=True)]


class Steps:
    """Runs the phases of steps: unsharded parameters are kept while parameters do not change, gradients may stay unreduced until
    the last microbatch.

    lower: compiles a graph. parameter: name -> the parameter as the module has it now (a DTensor). recorded: makes what records
    forward and backward of microbatches.
    """

    def __init__(self, plan: Plan, mesh: Mesh, lower: Lower, parameter: Callable[[str], Tensor], recorded: Recorded):
        self.plan, self.lower, self.parameter, self.recorded = plan, lower, parameter, recorded
        self.gradients = UnreducedGradients(self.reduce)
        self.shares_parameters = mesh.size(*mesh.data) > 1
        self._phases: dict[int, tuple[Program, Phases]] = {}
        self._boundaries: dict[str, tuple[Program, Phases]] = {}
        self._lowered: dict[int, Callable[..., Any]] = {}
        self._recorders: dict[int, dict[str, RecordedProgram | None]] = {}
        self._kept: dict[int, _InPlace] = {}
        self._unsharded: tuple[Any, list[Tensor]] | None = None
        if self.shares_parameters and not plan.gathers_each_use:
            after_steps(self, lambda steps, _: steps.forget())  # some write where no version of a tensor tells

    def microbatch(self, program: Program, last: bool, example: Callable[[], list[Any]]) -> Microbatch | None:
        """How the next microbatch runs; None: as the program stands. last: it is the last one of its step."""
        stay = not self.plan.reduces_each_backward
        pending = self.gradients.pending
        if not self.shares_parameters or self.plan.gathers_each_use or (last and not (pending if stay else self._unsharded)):
            return None
        phases = self._of(program)
        if not phases.boundaries:
            return None
        if compat.are_hooked([self.parameter(s.name) for s in program.sources if s.kind == "param"]):
            self.forget()
            return None  # hooks see each microbatch's gradient, as on one device
        name, compute = (BEFORE, phases.compute) if stay and not last else (LAST, phases.compute_and_reduce)
        recorder = self._recorder(program, name, compute)
        values = dict(zip(phases.boundaries, self.unshard(program), strict=True))
        if last:
            self._unsharded = None
            for kept in self._kept.values():
                kept.is_new = False
        detached = [values[b].detach().requires_grad_() for b in compute.boundaries("detached")]
        inputs = [self._unreduced(b, values[b]) if kind == "unreduced" else values[b]
                  for kind, b in compute.extra if kind != "detached"]
        along = [(b, pending[b.key]) for b in compute.boundaries("unreduced") if b.key in pending]
        run = self._run(compute, compute.module, lambda: [*example(), *detached, *inputs], recorder)
        return Microbatch(run, detached, inputs, Receipt(self.gradients, compute.boundaries("detached"), along))

    @torch.no_grad()
    def unshard(self, program: Program) -> list[Tensor]:
        """The values at the boundaries: kept ones, as long as no parameter has changed."""
        phases = self._of(program)
        names = [s.name for s in program.sources if s.kind == "param"]
        local = [compat.local_part(self.parameter(n)) for n in names]
        state = (id(phases), [(id(self.parameter(n)), compat.version(self.parameter(n))) for n in names])
        if self._unsharded is None or self._unsharded[0] != state:
            kept = self._kept.pop(id(program), None)
            if kept is None or kept.state != state or not kept.is_new:
                values = list(self._run(phases.unshard, phases.unshard, lambda: local)(*local))
                kept = _InPlace(state, values if kept is None else kept.renewed(values, local, state))
            if any(r is not None and r.off is None for r in self._recorders.get(id(program), {}).values()):
                self._kept[id(program)] = kept
            self._unsharded = state, kept.values
        return self._unsharded[1]

    def _recorder(self, program: Program, name: str, compute: Compute) -> RecordedProgram | None:
        """What records one kind of a program's microbatches. What they take unsharded stays where it is, from step to step."""
        made = self._recorders.setdefault(id(program), {})
        if name not in made:
            kinds = ["detached"] * len(compute.boundaries("detached")) + [k for k, _ in compute.extra if k != "detached"]
            stay = frozenset(i for i, kind in enumerate(kinds, len(program.sources)) if kind != "unreduced")
            made[name] = self.recorded(program, name, stay)
        return made[name]

    def reduce(self, grads: dict[str, Tensor]) -> None:
        """Take unreduced gradients, by the keys of their boundaries, to those of the parameters, which they are added to."""
        for program, phases in {id(v): (p, v) for p, v in self._boundaries.values()}.values():
            mine = {b: grads[b.key] for b in phases.boundaries if b.key in grads}
            if not mine:
                continue
            grads = {key: grad for key, grad in grads.items() if key not in {b.key for b in mine}}
            names = [s.name for s in program.sources if s.kind == "param"]
            parameters = [self.parameter(name) for name in names]
            local, theirs = [compat.local_part(p).requires_grad_() for p in parameters], {b.source.name for b in mine}
            with torch.enable_grad():
                values = self._run(phases.reduce, phases.reduce, functools.partial(list, local))(*local)
                outs = dict(zip(phases.boundaries, values, strict=True))
                found = torch.autograd.grad([outs[b] for b in mine], local, list(mine.values()), allow_unused=True)
            for name, p, grad in zip(names, parameters, found, strict=True):
                if grad is not None and name in theirs:  # a backward that was traced gives zeros to the others
                    late = compat.like_dtensor(grad, p)
                    p.grad = late if p.grad is None else p.grad + late

    def forget(self) -> None:
        """Parameters have changed: unshard them again."""
        self._unsharded = None
        for kept in self._kept.values():
            kept.state = None

    def drop(self, program: Program) -> None:
        """`program` is not run any more: keep nothing that was made of it, but what unreduced gradients still need."""
        if id(program) not in self._phases or any(
                key in self.gradients.pending and owner is program for key, (owner, _) in self._boundaries.items()):
            return
        _, phases = self._phases.pop(id(program))
        self._recorders.pop(id(program), None)
        self._kept.pop(id(program), None)
        self._boundaries = {b.key: pair for pair in self._phases.values() for b in pair[1].boundaries}
        for made in (phases.unshard, phases.compute, phases.compute_and_reduce, phases.reduce):
            self._lowered.pop(id(made), None)
        self.forget()

    def _of(self, program: Program) -> Phases:
        if id(program) not in self._phases:
            pair = self._phases[id(program)] = program, split_phases(program)
            self._boundaries.update({b.key: pair for b in pair[1].boundaries})
        return self._phases[id(program)][1]

    def _run(self, of: Any, graph: Any, example: Callable[[], list[Any]], recorder: RecordedProgram | None = None
             ) -> Callable[..., Any]:
        """What runs a graph, compiled once. of: what it is remembered by."""
        if id(of) not in self._lowered:
            self._lowered[id(of)] = self.lower(graph, example(), recorder=recorder)
        return self._lowered[id(of)]

    def _unreduced(self, boundary: Boundary, value: Tensor) -> Tensor:
        pending = self.gradients.pending.get(boundary.key)
        return torch.zeros_like(value, dtype=boundary.dtype) if pending is None else pending
