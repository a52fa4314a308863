"""pipeline: a program that is cut into stages, run by ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import InputError, PlanError
from fxpar.passes.strategies.stages import Stage
from fxpar.pipeline.execute import Execution
from fxpar.pipeline.schedules import Kind, Schedule
from fxpar.program import Program
from fxpar.run.loss import loss_among
from fxpar.run.post import GroupPost
from fxpar.run.stage import InSteps, StageOfRank
from fxpar.run.store import ParameterStore

FORWARD = (Kind.UNSHARD, Kind.F, Kind.SEND_F, Kind.RECV_F)
"""The actions of an evaluation."""


class Pipeline:
    """Runs whole steps of a program on this rank of a pipeline.

    stages: of the whole program, in order. schedule: of as many stages, over as many ranks as there are kinds of ranks.
    Raises: `PlanError` for a forward that stores tensors in attributes.
    """

    def __init__(self, program: Program, stages: Sequence[Stage], schedule: Schedule, store: ParameterStore, in_steps: InSteps):
        assert store.bound.across is not None
        stored = [s.name for s in program.sinks if s.kind == "attribute"]
        if stored:
            raise PlanError("pp", program.plan.pp, f"does not go with storing tensors in attributes ({stored[0]!r}): "
                            "the ranks of one stage alone would have them", "a forward that returns them, or pp=1")
        self.program, self.schedule, self.store = program, schedule, store
        self.across, self.rank = store.bound.across, store.bound.kind
        self.stages = {s: stages[s] for s in schedule.held(self.rank)}
        self.runners = {s: StageOfRank(stage, store, in_steps) for s, stage in self.stages.items()}
        self.loss = loss_among(program)
        self.maker = next((stage.index for stage in stages if self.loss in stage.outputs), None)

    def train(self, microbatches: list[dict[str, Any]], seed: int) -> Any:
        """The loss of a step, with all other outputs None. Its backward hands out the gradients, which are made here.

        microbatches: what each takes, by the names of the program's sources.
        Raises: `InputError` for a program without a loss.
        """
        if self.maker is None:
            raise InputError("a pipeline runs forward and backward in one go, so the model has to compute its loss: pass it "
                             "labels, or wrap it in a module that returns the loss; eval_step runs the forward alone")
        assert self.loss is not None
        self._run(microbatches, seed, tuple(Kind))
        grads: dict[str, Tensor] = {}
        for runner in self.runners.values():
            for name, grad in runner.grads.items():
                grads[name] = grads[name] + grad if name in grads else grad
        names = [n for n in self._parameters() if self.store.tensor(n).requires_grad]
        self._sum_shared(names, grads)
        loss = _HandOut.apply(self._loss(), torch.zeros((), requires_grad=True), [grads.get(n) for n in names],
                              *(self.store.tensor(n) for n in names))
        return self._outputs({self.loss: loss})

    @torch.no_grad()
    def evaluate(self, microbatches: list[dict[str, Any]], seed: int) -> Any:
        """The outputs of a forward: the loss on every rank, the others on the ranks whose stages make them, None elsewhere."""
        self._run(microbatches, seed, FORWARD)
        made = {k: torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum(0) for stage, runner in self.runners.items()
                for k, parts in zip(self.stages[stage].outputs, zip(*runner.outputs, strict=True), strict=True)}
        if self.loss is not None:
            made[self.loss] = self._loss()
        return self._outputs(made)

    def _run(self, microbatches: list[dict[str, Any]], seed: int, kinds: tuple[Kind, ...]) -> None:
        for stage, runner in self.runners.items():
            outputs = self.stages[stage].outputs
            runner.begin(microbatches, seed, {outputs.index(self.loss): 1.0} if self.loss in outputs else {})
        post = GroupPost(self.across, self.stages, self.store.device)
        with torch.no_grad():
            for _ in Execution(self.schedule, self.rank, self.runners, post, kinds).run():
                raise AssertionError("a rank of its own waits until messages arrive")
            post.finish()
        for runner in self.runners.values():
            runner.end()

    def _loss(self) -> Tensor:
        assert self.maker is not None and self.loss is not None
        if self.maker in self.runners:
            at = self.stages[self.maker].outputs.index(self.loss)
            loss = torch.stack([outputs[at] for outputs in self.runners[self.maker].outputs]).sum(0)
        else:
            node = self.program.outputs()[self.loss]
            loss = torch.empty((), dtype=node.meta["global"].dtype, device=self.store.device)
        dist.broadcast(loss, group=self.across, group_src=self.schedule.owner[self.maker])
        return loss

    def _parameters(self) -> list[str]:
        return list(dict.fromkeys(s.name for stage in self.stages.values() for s in stage.program.sources if s.kind == "param"))

    def _sum_shared(self, names: list[str], grads: dict[str, Tensor]) -> None:
        """Sum the gradients of parameters that ranks of several kinds hold, over those."""
        for name, group in self.store.shared.items():
            if name in names:
                total = grads[name].contiguous() if name in grads else torch.zeros_like(compat.local_part(self.store.tensor(name)))
                dist.all_reduce(total, group=group)
                grads[name] = total

    def _outputs(self, made: dict[int, Tensor]) -> Any:
        flat: list[Any] = []
        numbers = iter(range(len(self.program.tensor_sinks())))
        for sink in self.program.sinks:
            if sink.kind == "literal":
                flat.append(sink.constant)
                continue
            number = next(numbers)
            if sink.kind == "output":
                flat.append(made.get(number))
        return pytree.tree_unflatten(flat, self.program.out_spec)


class _HandOut(torch.autograd.Function):
    """A loss whose gradients are there already: backward scales them and hands them out."""

    @staticmethod
    def forward(ctx, loss: Tensor, _: Tensor, grads: list[Tensor | None], *parameters: Tensor):
        ctx.grads, ctx.parameters = grads, parameters
        return loss.clone()

    @staticmethod
    def backward(ctx, *scales: Tensor):
        (scale,) = scales
        pairs = zip(ctx.grads, ctx.parameters, strict=True)
        return (None, None, None, *(None if g is None else compat.like_dtensor(g * scale.to(g.dtype), p) for g, p in pairs))
