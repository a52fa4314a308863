"""Gradient accumulation: what a `ParallelModule` keeps between the microbatches of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxpar import compat
from fxpar.passes.partition.accumulate import Boundary, Variant, Variants, accumulation
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.sharding.mesh import Mesh

Lower = Callable[[Any, list[Any]], Callable[..., Any]]
"""(graph, example inputs) -> what runs it."""


@dataclass
class Step:
    """How one microbatch runs: `run` takes the program's inputs, then `held` (whose gradients go to `Accumulator.hold`), then
    `inputs`. carried: those gradients among its inputs that were kept, by the keys of their boundaries."""

    variant: Variant
    run: Callable[..., Any]
    held: list[Tensor]
    inputs: list[Tensor]
    carried: dict[str, Tensor]


class Accumulator:
    """Values of parameters that are kept while they do not change, and gradients that are not summed over replicas yet.

    lower: compiles a graph. parameter: name -> the parameter as the module has it now (a DTensor).
    """

    def __init__(self, plan: Plan, mesh: Mesh, lower: Lower, parameter: Callable[[str], Tensor]):
        self.plan, self.lower, self.parameter = plan, lower, parameter
        self.spread = mesh.size(*mesh.axes("dp")) > 1
        self.pending: dict[str, Tensor] = {}
        self._boundaries: dict[str, tuple[Program, Variants]] = {}
        self._variants: dict[int, tuple[Program, Variants]] = {}
        self._lowered: dict[int, Callable[..., Any]] = {}
        self._kept: tuple[Any, list[Tensor]] | None = None
        self._synced = False
        self._queued = False
        if self.spread and not plan.gathers_each_use:
            self._forget_after_steps()

    def step(self, program: Program, sync: bool, example: Callable[[], list[Any]]) -> Step | None:
        """How the next microbatch runs; None: as the program stands. sync: it is the last one of its step."""
        unreduced = not self.plan.reduces_each_backward
        if not self.spread or self.plan.gathers_each_use or (sync and not (self.pending if unreduced else self._kept)):
            return None
        variants = self._of(program)
        if not variants.boundaries:
            return None
        if compat.are_hooked([self.parameter(s.name) for s in program.sources if s.kind == "param"]):
            self._kept = None
            return None  # hooks see each microbatch's gradient, as on one device
        values = dict(zip(variants.boundaries, self._values(program, variants), strict=True))
        if sync:
            self._kept = None
        variant = variants.hold if unreduced and not sync else variants.release
        inputs = [self._carried(b, values[b]) if kind == "carried" else values[b] for kind, b in variant.extra]
        held = [t.detach().requires_grad_() for (kind, _), t in zip(variant.extra, inputs, strict=True) if kind == "instead"]
        inputs = inputs[len(held) :]
        if id(variant) not in self._lowered:
            self._lowered[id(variant)] = self.lower(variant.module, [*example(), *held, *inputs])
        carried = {b.key: self.pending[b.key] for kind, b in variant.extra if kind == "carried" and b.key in self.pending}
        return Step(variant, self._lowered[id(variant)], held, inputs, carried)

    def forget(self) -> None:
        """Parameters have changed."""
        self._kept = None

    def _forget_after_steps(self) -> None:
        """As long as this lives, any optimizer's step has it forget: some write where no version of a tensor tells."""
        mine = weakref.ref(self)

        def forget(*_: Any) -> None:
            accumulator = mine()
            if accumulator is not None:
                accumulator.forget()

        weakref.finalize(self, register_optimizer_step_post_hook(forget).remove)

    def drop(self, program: Program) -> None:
        """`program` is not run any more: keep nothing that was made of it, but what gradients that are kept still need."""
        if id(program) not in self._variants or any(
                key in self.pending and owner is program for key, (owner, _) in self._boundaries.items()):
            return
        _, variants = self._variants.pop(id(program))
        self._boundaries = {b.key: pair for pair in self._variants.values() for b in pair[1].boundaries}
        for made in (variants.hold, variants.release, variants.values, variants.wide):
            self._lowered.pop(id(made), None)
        self._kept = None

    def _of(self, program: Program) -> Variants:
        if id(program) not in self._variants:
            pair = self._variants[id(program)] = program, accumulation(program)
            self._boundaries.update({b.key: pair for b in pair[1].boundaries})
        return self._variants[id(program)][1]

    @torch.no_grad()
    def _values(self, program: Program, variants: Variants) -> list[Tensor]:
        """The values at the boundaries: kept ones, as long as no parameter has changed."""
        names = [s.name for s in program.sources if s.kind == "param"]
        local = [compat.local_part(self.parameter(n)) for n in names]
        state = (id(variants), [(id(self.parameter(n)), compat.version(self.parameter(n))) for n in names])
        if self._kept is None or self._kept[0] != state:
            if id(variants) not in self._lowered:
                self._lowered[id(variants)] = self.lower(variants.values, local)
            self._kept = state, list(self._lowered[id(variants)](*local))
        return self._kept[1]

    def _carried(self, boundary: Boundary, value: Tensor) -> Tensor:
        kept = self.pending.get(boundary.key)
        return torch.zeros_like(value, dtype=boundary.dtype) if kept is None else kept

    def hold(self, step: Step, grads: tuple[Tensor | None, ...]) -> None:
        """Keep a microbatch's gradients of `step.held`."""
        boundaries = [b for kind, b in step.variant.extra if kind == "instead"]
        for boundary, grad in zip(boundaries, grads, strict=True):
            if grad is not None:
                grad = grad.to(boundary.dtype)
                before = self.pending.get(boundary.key)
                self.pending[boundary.key] = grad if before is None else before + grad
        self._at_the_end(synced=False)

    def summed(self, step: Step | None) -> None:
        """A backward that sums gradients has been through; what `step` carried has been summed with them.

        Where it had been summed before (the model was called twice since), it is taken back at the end of the backward pass.
        """
        for key, tensor in step.carried.items() if step is not None else ():
            mine = self.pending.get(key)
            if mine is tensor:
                del self.pending[key]
            else:
                self.pending[key] = -tensor if mine is None else mine - tensor
        self._at_the_end(synced=True)

    def _at_the_end(self, synced: bool) -> None:
        self._synced |= synced
        if not self._queued:
            self._queued = True
            compat.after_backward(self._finish)

    def _finish(self) -> None:
        """After a backward pass that summed gradients, none is left unsummed, in whatever order its parts ran."""
        synced, self._synced, self._queued = self._synced, False, False
        if not synced or not self.pending:
            return
        for program, variants in {id(v): (p, v) for p, v in self._boundaries.values()}.values():
            mine = [b for b in variants.boundaries if b.key in self.pending]
            if mine:
                self._add(program, variants, {b: self.pending.pop(b.key) for b in mine})

    def _add(self, program: Program, variants: Variants, grads: dict[Boundary, Tensor]) -> None:
        names = [s.name for s in program.sources if s.kind == "param"]
        parameters = [self.parameter(n) for n in names]
        local = [compat.local_part(p).requires_grad_() for p in parameters]
        if id(variants.wide) not in self._lowered:
            self._lowered[id(variants.wide)] = self.lower(variants.wide, local)
        with torch.enable_grad():
            outs = dict(zip(variants.boundaries, self._lowered[id(variants.wide)](*local), strict=True))
            found = torch.autograd.grad([outs[b] for b in grads], local, list(grads.values()), allow_unused=True)
        for p, grad in zip(parameters, found, strict=True):
            if grad is not None:
                late = compat.like_dtensor(grad, p)
                p.grad = late if p.grad is None else p.grad + late
