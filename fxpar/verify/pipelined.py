"""pipelined: one step of a simulation under pipeline parallelism: all ranks of all stages, in the order of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.stepped import SavedForBackward, SavedForWeightGradients, Stepped
from fxpar.passes.strategies.stages import Stage
from fxpar.pipeline.execute import Execution, Mailbox, run_together
from fxpar.pipeline.schedules import Schedule
from fxpar.program import Program
from fxpar.verify.step import SimulatedStep

CutValues = list[list[Tensor]]
"""What crosses a cut: rank by rank of a stage's mesh, message by message."""


class SimulatedPipelinedStep(SimulatedStep):
    """One step of a program that is cut into stages. Each stage runs behind AOTAutograd, its backward split where the schedule
    asks for it, with all ranks of its mesh as threads."""

    def __init__(self, model: nn.Module, program: Program, ranks: Lowered, named: dict[str, Any], seed: int, stages: list[Stage],
                 schedule: Schedule):
        super().__init__(model, program, ranks, named, seed)
        self.stages, self.schedule = stages, schedule

    def passes(self, passed: dict[str, list[list[Tensor]]]) -> tuple[list[list[list[Tensor]]], list[dict[int, list[Tensor]]]]:
        cotangents = self._of_a_loss() or self._cotangents(self._forwards(passed))
        runners = [_SimulatedStage(self, stage, passed, cotangents) for stage in self.stages]
        post: Mailbox[CutValues] = Mailbox()
        run_together([Execution(self.schedule, rank, {s: runners[s] for s in self.schedule.stages_of(rank)}, post)
                      for rank in range(self.schedule.ranks)])
        outs: list[list[list[Tensor]]] = [[[torch.empty(0)] * len(self.nodes) for _ in range(self.mesh.world_size)]
                                          for _ in range(self.count)]
        grads: list[dict[int, list[Tensor]]] = [{} for _ in range(self.count)]
        for runner in runners:
            for (i, k), parts in runner.outputs.items():
                for rank, part in enumerate(parts):
                    outs[i][rank][k] = part
            for (i, place), parts in runner.grads.items():
                before = grads[i].get(place)
                grads[i][place] = parts if before is None else [a + b for a, b in zip(before, parts, strict=True)]
        return outs, grads


class _SimulatedStage:
    """A stage on all ranks of its mesh; see `fxpar.pipeline.execute.Runner`.

    outputs: (microbatch, number of the whole program's output) -> rank by rank. grads: (microbatch, number of the whole program's
    source) -> rank by rank.
    """

    def __init__(self, step: SimulatedPipelinedStep, stage: Stage, passed: dict[str, list[list[Tensor]]],
                 cotangents: dict[int, Tensor]):
        assert isinstance(step.ranks, Lowered)
        self.step, self.stage, self.passed, self.cotangents = step, stage, passed, cotangents
        self.lowered, self.threads = step.ranks, step.ranks.threads
        numbers = {id(s): k for k, s in enumerate(step.program.sources)}
        self.places = [numbers.get(id(s)) for s in stage.program.sources]
        self.received = [i for i, s in enumerate(stage.program.sources) if s.kind == "received"]
        self.made: list[Stepped] = []
        self.saved: dict[int, list[SavedForBackward]] = {}
        self.left: dict[int, list[SavedForWeightGradients]] = {}
        self.outputs: dict[tuple[int, int], list[Tensor]] = {}
        self.grads: dict[tuple[int, int], list[Tensor]] = {}

    def unshard(self) -> None: ...

    def reduce(self) -> None: ...

    def forward(self, microbatch: int, received: CutValues | None) -> CutValues:
        n = range(self.step.mesh.world_size)
        messages = received or [[] for _ in n]
        feeds = [[*(t.detach().requires_grad_(m.requires_grad) for t, m in zip(messages[r], self.stage.receives, strict=True)),
                  *(self.step.value(s, r, microbatch, self.passed) for s in self.stage.program.sources if s.kind != "received")]
                 for r in n]
        if not self.made:
            early = self.received if self.step.schedule.splits(self.stage.index) else range(len(self.places))
            self.made = self.lowered.stepped(self.stage.program.module, feeds, early)
        found = self.threads.run(lambda rank: self.made[rank].forward(*feeds[rank]))
        self.saved[microbatch] = [saved for _, saved in found]
        count = len(self.stage.sends)
        for k, output in enumerate(self.stage.outputs):
            self.outputs[microbatch, output] = [outs[count + k].detach() for outs, _ in found]
            self.step.keep_buffer(output, self.outputs[microbatch, output])
        return [outs[:count] for outs, _ in found]

    def backward(self, microbatch: int, grads: CutValues | None) -> CutValues:
        made = self.input_gradients(microbatch, grads)
        self.weight_gradients(microbatch)
        return made

    def input_gradients(self, microbatch: int, grads: CutValues | None) -> CutValues:
        saved = self.saved.pop(microbatch)
        seeds = [self._seeds(rank, microbatch, grads[rank] if grads else []) for rank in range(len(saved))]
        found = self.threads.run(lambda rank: self.made[rank].input_gradients(saved[rank], seeds[rank]))
        self.left[microbatch] = [left for _, left in found]
        made = [early for early, _ in found]
        self._add_up(microbatch, self.made[0].early, made)
        of = [dict(zip(self.made[0].early, early, strict=True)) for early in made]
        return [[torch.zeros(m.shape, dtype=m.dtype) if (g := grads_of[i]) is None else g
                 for i, m in zip(self.received, self.stage.receives, strict=True) if m.requires_grad] for grads_of in of]

    def weight_gradients(self, microbatch: int) -> None:
        left = self.left.pop(microbatch)
        found = self.threads.run(lambda rank: self.made[rank].weight_gradients(left[rank]))
        self._add_up(microbatch, self.made[0].late, found)

    def _add_up(self, microbatch: int, inputs: Sequence[int], found: list[list[Tensor | None]]) -> None:
        """Keep the gradients of parameters and inputs that one microbatch made, rank by rank."""
        for k, i in enumerate(inputs):
            parts, place = [grads[k] for grads in found], self.places[i]
            if place is not None and any(p is not None for p in parts):
                like = next(p for p in parts if p is not None)
                self.grads[microbatch, place] = [torch.zeros_like(like) if p is None else p for p in parts]

    def _seeds(self, rank: int, microbatch: int, grads: list[Tensor]) -> list[Tensor | None]:
        """The derivatives by all outputs of the stage's program."""
        given, roots = iter(grads), self.made[rank].roots
        sent = [next(given) if m.requires_grad else None for m in self.stage.sends]
        count = len(sent)
        return sent + [self.step.cotangent(k, self.cotangents[k], rank, microbatch)
                       if k in self.cotangents and count + i in roots else None for i, k in enumerate(self.stage.outputs)]
