"""pipeline: a program that is cut into stages, run by ranks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.passes.strategies.stages import Stage
from fxpar.pipeline.execute import Execution
from fxpar.pipeline.schedules import Kind, Schedule
from fxpar.program import Program
from fxpar.run.loss import loss_among
from fxpar.run.microbatches import step_output
from fxpar.run.own_memory import apart, scale_in_place
from fxpar.run.post import GroupPost
from fxpar.run.recorded_step import RecordedStep
from fxpar.run.stage import InSteps, StageOfRank
from fxpar.run.step_feed import StepFeed
from fxpar.run.store import ParameterStore
from fxpar.sharding.facts import full_value

FORWARD = (Kind.UNSHARD, Kind.F, Kind.SEND_F, Kind.RECV_F)
"""The actions of an evaluation."""


class Pipeline:
    """Runs whole steps of a program on this rank of a pipeline.

    stages: of the whole program, in order. schedule: of as many stages, over as many ranks as there are kinds of ranks. recorded:
    what records steps and plays them back.
    Raises: `CaptureError` for a program that stores tensors in attributes, or reads a buffer on another stage than the one where
    microbatches update it.
    """

    def __init__(self, program: Program, stages: Sequence[Stage], schedule: Schedule, store: ParameterStore, in_steps: InSteps,
                 recorded: RecordedStep | None = None):
        assert store.bound.across is not None
        _require_apart(program, stages)
        self.program, self.schedule, self.store = program, schedule, store
        self.across, self.rank = store.bound.across, store.bound.kind
        self.stages = {s: stages[s] for s in schedule.stages_of(self.rank)}
        self.runners = {s: StageOfRank(stage, store, in_steps, schedule.splits(s), f"{k} of {len(self.stages)}")
                        for k, (s, stage) in enumerate(self.stages.items(), 1)}
        self.loss = loss_among(program)
        self.makers = {output: stage.index for stage in stages for output in stage.outputs}
        self.feed = StepFeed([stage.program for stage in self.stages.values()], store,
                             [s.name for s in program.sinks if s.kind == "buffer"])
        self._recorded = recorded
        self._graded: dict[str, bool] = {}

    def train(self, microbatches: list[dict[str, Any]], seed: int) -> dict[int, Tensor]:
        """The loss of a step, by its number. Its backward hands out the gradients, which are made here."""
        assert self.loss is not None
        tensors = {name: self.store.tensor(name) for name in self._parameters()}
        wanted = compat.want_gradients([*tensors.values()])
        trained = {name: p for (name, p), wants in zip(tensors.items(), wanted, strict=True) if wants}

        def step(flat: list[Tensor]) -> list[Tensor | None]:
            grads = self._trained(flat, len(microbatches))
            return [self._loss(), *apart([grads.get(name) for name in trained], flat)]

        loss, *grads = self._run(step, microbatches, seed, returned=1)
        compat.attach_hooks([*trained.values()])
        return {self.loss: _HandOut.apply(loss, torch.zeros((), requires_grad=True), grads, *trained.values())}

    def evaluate(self, microbatches: list[dict[str, Any]], seed: int) -> dict[int, Tensor]:
        """The outputs of a forward, by their numbers: the loss on every rank, the others on the ranks whose stages make them."""
        sinks = self.program.tensor_sinks()
        numbers = list(dict.fromkeys(k for s in self.stages.values() for k in s.outputs if sinks[k].kind == "output"))

        def step(flat: list[Tensor]) -> list[Tensor | None]:
            self._do(flat, len(microbatches), FORWARD)
            made = [self._joined(k) for k in numbers]
            self._send_buffers()
            return [*made, self._loss()]

        *made, loss = self._run(step, microbatches, seed, returned=len(numbers) + 1)
        return dict(zip(numbers, made, strict=True)) | ({} if self.loss is None else {self.loss: loss})

    @torch.no_grad()
    def _run(self, step: Callable[[list[Tensor]], list[Tensor | None]], microbatches: list[dict[str, Any]], seed: int,
             returned: int) -> Sequence[Any]:
        """What a step makes of what this rank takes, recorded or as it is. returned: see `RecordedStep.run`."""
        flat = self.feed(microbatches, seed)
        try:
            return step(flat) if self._recorded is None else self._recorded.run(step, self.feed, flat, returned)
        finally:
            for runner in self.runners.values():
                runner.end()

    def _trained(self, flat: list[Tensor], microbatches: int) -> dict[str, Tensor]:
        """The gradients of a step, by the names of parameters."""
        self._do(flat, microbatches, tuple(Kind))
        grads: dict[str, Tensor] = {}
        for runner in self.runners.values():
            for name, grad in runner.grads.items():
                grads[name] = grads[name] + grad if name in grads else grad
        self._sum_shared(grads)
        self._send_buffers()
        return grads

    def _do(self, flat: list[Tensor], microbatches: int, kinds: tuple[Kind, ...]) -> None:
        """All actions of these kinds. flat: what the feed has made."""
        step = self.program.microbatches
        for stage, runner in self.runners.items():
            outputs = self.stages[stage].outputs
            weight = 1.0 if step is None or self.loss is None else step.weight(self.loss)
            runner.begin(self.feed.of_stage(runner.program, flat, microbatches),
                         {outputs.index(self.loss): weight} if self.loss in outputs else {})
        post = GroupPost(self.across, self.stages, self.store.device)
        for _ in Execution(self.schedule, self.rank, self.runners, post, kinds).run():
            raise AssertionError("a rank of its own waits until messages arrive")
        post.finish()

    def _joined(self, output: int) -> Tensor:
        """This rank's part of one of its outputs of the step."""
        stage = self.makers[output]
        at = self.stages[stage].outputs.index(output)
        parts = [outputs[at] for outputs in self.runners[stage].outputs]
        step = self.program.microbatches
        return parts[0] if step is None else step_output(step, output, parts)

    def _loss(self) -> Tensor:
        """The loss, on every rank, and 0 where there is none. It is there once all have done their part of the step."""
        if self.loss is not None and self.makers[self.loss] in self.stages:
            loss = self._joined(self.loss).detach().clone()
        else:
            dtype = torch.float32 if self.loss is None else full_value(self.program.outputs()[self.loss]).dtype
            loss = torch.zeros((), dtype=dtype, device=self.store.device)
        dist.all_reduce(loss, group=self.across)
        return loss

    def _parameters(self) -> list[str]:
        return list(dict.fromkeys(s.name for stage in self.stages.values() for s in stage.program.sources if s.kind == "param"))

    def _sum_shared(self, grads: dict[str, Tensor]) -> None:
        """Sum the gradients of parameters that ranks of several kinds hold, over those, whichever use them here."""
        here = {name: group for name, group in self.store.shared.items() if name not in self.store.elsewhere}
        for name, group in here.items():
            if name not in self._graded:
                flag = torch.tensor(int(name in grads), device=self.store.device)
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
                self._graded[name] = bool(flag)
            if self._graded[name]:
                none = torch.zeros_like(compat.local_part(self.store.tensor(name)))
                total = grads[name].contiguous() if name in grads else none
                dist.all_reduce(total, group=group)
                grads[name] = total

    def _send_buffers(self) -> None:
        """Give all ranks the buffers that a stage has updated: other stages may read them, now or in another mode."""
        for number, sink in enumerate(self.program.tensor_sinks()):
            if sink.kind == "buffer":
                value = self.store.tensor(sink.name).detach()
                flat = value.contiguous().view(-1).view(torch.uint8)
                dist.broadcast(flat, group=self.across, group_src=self.schedule.owner[self.makers[number]])
                value.copy_(flat.view(value.dtype).view(value.shape))


def _require_apart(program: Program, stages: Sequence[Stage]) -> None:
    stored = [s.name for s in program.sinks if s.kind == "attribute"]
    if stored:
        raise CaptureError(f"a forward that stores a tensor in {stored[0]}, under pp={program.plan.pp}: one rank alone would "
                           "have it, without a gradient", None, "return it, add it to the loss, or keep it in a buffer")
    in_order = program.microbatches.in_order if program.microbatches is not None else frozenset()
    for writer in stages:
        for name in {s.name for s in writer.program.sinks if s.kind == "buffer"} & in_order:
            reader = next((s for s in stages if s is not writer and any(
                x.kind == "buffer" and x.name == name and n.users for n, x in s.program.source_of().items())), None)
            if reader is not None:
                raise CaptureError(f"buffer {name}, which stage {writer.index} updates with every microbatch, and stage "
                                   f"{reader.index} reads", None, "name stage_boundaries so that one stage does both")


class _HandOut(torch.autograd.Function):
    """A loss whose gradients are there already, each in memory of its own: backward scales them and hands them out."""

    @staticmethod
    def forward(ctx, loss: Tensor, _: Tensor, grads: list[Tensor | None], *parameters: Tensor):
        ctx.grads, ctx.parameters = grads, parameters
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *scales: Tensor):
        (scale,), grads = scales, ctx.grads
        if grads is None:
            raise RuntimeError("a second backward pass through a step of a pipeline, whose gradients are handed out: give the "
                               "first one retain_graph=True")
        if compat.keeps_graph():
            grads = [None if g is None else g * scale.to(g.dtype) for g in grads]
        else:
            ctx.grads = None
            scale_in_place([g for g in grads if g is not None], scale)
        return (None, None, None, *(None if g is None else compat.like_dtensor(g, p)
                                    for g, p in zip(grads, ctx.parameters, strict=True)))
