"""stage: one stage of a pipeline on one rank: its program, what it keeps of each microbatch, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.stepped import SavedForBackward, SavedForWeightGradients, Stepped
from fxpar.passes.partition.phases import Boundary, Compute, split_phases
from fxpar.passes.strategies.stages import Stage
from fxpar.progress import stage as told
from fxpar.run.store import ParameterStore

InSteps = Callable[..., Stepped]
"""``in_steps(graph, example inputs, early=...)``, see `fxpar.backends.eager.stepped`."""


class StageOfRank:
    """See `fxpar.pipeline.execute.Runner`.

    Parameters are unsharded once a step, and gradients reduced once, where the plan keeps that (see
    `fxpar.passes.partition.phases`); under zero=3 every microbatch gathers and reduces. splits: whether the schedule runs the
    backward in two halves; else it is compiled as one. number: what it is called while it
    is compiled. grads: name -> the gradient of this rank's part of a parameter, of the step so far.
    """

    def __init__(self, stage: Stage, store: ParameterStore, in_steps: InSteps, splits: bool, number: str = ""):
        self.stage, self.program, self.store, self.in_steps, self.number = stage, stage.program, store, in_steps, number
        plan, mesh = self.program.plan, self.program.mesh
        keeps = mesh.size(*mesh.data) > 1 and not plan.gathers_each_use
        self.phases = split_phases(self.program) if keeps else None
        self.compute = Compute(self.program.module, [])
        if self.phases is not None and self.phases.boundaries:
            self.compute = self.phases.compute_and_reduce if plan.reduces_each_backward else self.phases.compute
        self.splits = splits
        self.received = [i for i, s in enumerate(self.program.sources) if s.kind == "received"]
        self.outputs: list[list[Tensor]] = []
        self.grads: dict[str, Tensor] = {}
        self._made: dict[str, Stepped] = {}

    def begin(self, feeds: list[list[Any]], seeds: dict[int, float]) -> None:
        """A step begins. feeds: what each microbatch takes but for what it receives. seeds: number of an output of this stage ->
        the derivative of the loss by it."""
        self.feeds, self.seeds = feeds, seeds
        self.outputs = [[] for _ in feeds]
        self.grads = {}
        self._unsharded: dict[Boundary, Tensor] = {}
        self._unreduced: dict[Boundary, Tensor] = {}
        self._saved: dict[int, SavedForBackward] = {}
        self._left: dict[int, SavedForWeightGradients] = {}

    def end(self) -> None:
        """It has ended: nothing is kept of it."""
        self.begin([], {})

    def unshard(self) -> None:
        if self.compute.extra and self.phases is not None:
            local = self._parameters()
            values, _ = self._run("unshard", self.phases.unshard, lambda: local).forward(*local)
            self._unsharded = dict(zip(self.phases.boundaries, values, strict=True))

    def forward(self, microbatch: int, received: list[Tensor] | None) -> list[Tensor]:
        feed = [*(received or ()), *self.feeds[microbatch], *(self._unsharded[b] for _, b in self.compute.extra)]
        outs, self._saved[microbatch] = self._run("compute", self.compute.module, lambda: self._example(feed)).forward(*feed)
        count = len(self.stage.sends)
        self.outputs[microbatch] = outs[count:]
        self.store.update_buffers(self.program, outs, last=microbatch == len(self.feeds) - 1)
        return outs[:count]

    def backward(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        made = self.input_gradients(microbatch, grads)
        self.weight_gradients(microbatch)
        return made

    def input_gradients(self, microbatch: int, grads: list[Tensor] | None) -> list[Tensor]:
        made, given = self._made["compute"], iter(grads or ())
        seeds: list[Tensor | None] = [next(given) if m.requires_grad else None for m in self.stage.sends]
        count = len(seeds)
        for i, out in enumerate(self.outputs[microbatch]):
            weight = self.seeds.get(i)
            seeds.append(torch.full_like(out, weight) if weight is not None and count + i in made.roots else None)
        early, self._left[microbatch] = made.input_gradients(self._saved.pop(microbatch), seeds)
        self._add_up(made.early, early)
        found = dict(zip(made.early, early, strict=True))
        return [torch.zeros(m.shape, dtype=m.dtype, device=self.store.device) if (grad := found[i]) is None else grad
                for i, m in zip(self.received, self.stage.receives, strict=True) if m.requires_grad]

    def weight_gradients(self, microbatch: int) -> None:
        made = self._made["compute"]
        self._add_up(made.late, made.weight_gradients(self._left.pop(microbatch)))

    def _add_up(self, inputs: Sequence[int], grads: list[Tensor | None]) -> None:
        """Add gradients of a microbatch to those of the step: of parameters, and of what they were unsharded to."""
        sources = self.program.sources
        for i, grad in zip(inputs, grads, strict=True):
            if grad is None:
                continue
            if i < len(sources):
                if sources[i].kind == "param":
                    self._add(sources[i].name, grad)
                continue
            boundary = self.compute.extra[i - len(sources)][1]
            before, grad = self._unreduced.get(boundary), grad.to(boundary.dtype)
            self._unreduced[boundary] = grad if before is None else before + grad

    def reduce(self) -> None:
        if not self._unreduced or self.phases is None:
            return
        local = self._parameters()
        reduce = self._run("reduce", self.phases.reduce, lambda: local)
        found = reduce.pull_back(local, [self._unreduced.get(b) for b in self.phases.boundaries])
        for name, grad in zip(self._names(), found, strict=True):
            if grad is not None:
                self._add(name, grad)
        self._unsharded, self._unreduced = {}, {}

    def _add(self, name: str, grad: Tensor) -> None:
        before = self.grads.get(name)
        self.grads[name] = grad if before is None else before + grad

    def _names(self) -> list[str]:
        return [s.name for s in self.program.sources if s.kind == "param"]

    def _parameters(self) -> list[Tensor]:
        parameters = [self.store.tensor(n) for n in self._names()]
        return [compat.local_part(p).detach().requires_grad_(p.requires_grad) for p in parameters]

    def _example(self, feed: list[Any]) -> list[Any]:
        """The inputs of the stage's program, those that want gradients with that."""
        wants = [*(s.requires_grad for s in self.program.sources), *(kind == "detached" for kind, _ in self.compute.extra)]
        return [x.detach().requires_grad_(grad) if isinstance(x, Tensor) and x.is_floating_point() else x
                for x, grad in zip(feed, wants, strict=True)]

    def _run(self, name: str, graph: fx.GraphModule, inputs: Callable[[], list[Any]]) -> Stepped:
        """The steps of a graph. inputs: its local inputs, to compile it for."""
        if name not in self._made:
            with torch.enable_grad():
                example = inputs()
                early = [] if name != "compute" else self.received if self.splits else range(len(example))
                with told(f"compiling stage {self.number or self.stage.index}: {name}"):
                    self._made[name] = self.in_steps(graph, example, early=early)
        return self._made[name]
