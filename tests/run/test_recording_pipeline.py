"""Recordings of whole steps of a pipeline change no number, on any rank: real ranks, which play back on a device that overwrites
the whole pool (tests/recorder.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpar
from fxpar.run import engine, recording
from tests.processes import launch
from tests.recorder import Pretended
from tests.run.test_pipeline import Net
from tests.run.test_recording import ModuleLoop, done, local

pytestmark = pytest.mark.multiproc


class PipelineLoop(ModuleLoop):
    """A training loop over a module of several stages, whose ranks each do something of their own."""

    def __init__(self, plan: str, device: Pretended | None, backend: str = "eager"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "device_of", lambda _: device)
            torch.manual_seed(0)
            parsed = fxpar.Plan.parse(plan)
            self.rows = parsed.dp * parsed.microbatches
            self.module = fxpar.parallelize(Net(dropout=0.1, norm=True), parsed, self.batch(0, 2, parsed.dp, 0), backend=backend,
                                            cuda_graphs=device is not None)
        self.module.seed = 5
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, 0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.count, self.outputs, self.pending, self.held = 0, [], [], []

    def batch(self, seed: int, rows: int, replicas: int, replica: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 12, (2, rows * self.rows), generator=torch.Generator().manual_seed(seed))
        return {k: v.chunk(replicas)[replica] for k, v in zip(("ids", "target"), ids, strict=True)}

    def mine(self, rows: int) -> dict[str, Tensor]:
        return self.batch(self.count, rows - 1, self.module.plan.dp, self.module.replica)

    def forward(self, rows: int = 3) -> None:
        self.count += 1
        self.outputs = [*self.module(**self.mine(rows)).values()]
        self.pending.append(self.outputs[0])

    def step(self) -> None:
        super().step()
        self.schedule.step()

    def evaluate(self) -> None:
        self.module.eval()
        self.outputs = [*self.module.eval_step(**self.mine(3)).values()]
        self.module.train()

    def backward_scaled(self) -> None:
        self.pending.append(self.pending.pop() * 3)
        self.backward()

    def on_the_first_rank(self, what: str) -> None:
        if torch.distributed.get_rank() == 0:
            getattr(self, what)()

    def hold(self) -> None:
        self.held.extend(self.gradients())

    def seen(self) -> list[Tensor | None]:
        return [*super().seen(), *self.pending]


OF_PIPELINES = {
    "backward, scaled": lambda x: x.backward_scaled(),
    "one rank holds gradients": lambda x: x.on_the_first_rank("hold"),
    "one rank moves a parameter": lambda x: x.on_the_first_rank("move"),
}


def compared(rank: int, plan: str, actions: list[str], backend: str = "eager") -> tuple[list[int], str]:
    """How often something was played back until each action was over, and how it stands: two loops do the same, with recordings
    and without, and see the same, bit by bit."""
    recording.WARM = recording.TRIED = 1
    recording.EVERY = 3
    device = Pretended()
    one, other = PipelineLoop(plan, device, backend), PipelineLoop(plan, None, backend)
    plays = []
    for number, action in enumerate(actions):
        assert done(one, action, OF_PIPELINES) == done(other, action, OF_PIPELINES), (number, action)
        for mine, theirs in zip(one.seen(), other.seen(), strict=True):
            assert (mine is None) == (theirs is None), (number, action)
            assert mine is None or torch.equal(local(mine), local(theirs)), (number, action)
        plays.append(device.plays)
    return plays, one.told()


def plays(plan: str, actions: list[str], world: int = 2, backend: str = "eager") -> list[int]:
    """How often something was played back in each action, on every rank."""
    found = launch(world, compared, plan, actions, backend)
    (one, told), *others = found
    assert all(each == (one, told) for each in others), found
    return [b - a for a, b in zip([0, *one], one)]


LOOPS = ["loop"] * 3
"""After which steps are recorded."""


def check(plan: str, actions: dict[str, int], world: int = 2, backend: str = "eager") -> None:
    """What is played back in each of these actions, after a few steps."""
    found = plays(plan, [*LOOPS, *(name.split(":")[0] for name in actions)], world, backend)
    assert dict(zip(actions, found[len(LOOPS) :], strict=True)) == actions and found[: len(LOOPS)] == [0, 1, 1]


def test_steps_are_played_back_and_no_number_changes():
    check("pp=2,microbatches=2", {
        "loop, other shape": 0, "loop": 1, "loop, other shape:2": 1, "loop:2": 1, "load": 0, "loop:3": 1,
        "evaluate": 0, "evaluate:2": 1, "evaluate:3": 1,
        "zero": 0, "forward": 1, "backward": 0, "forward:2": 1, "backward, scaled": 0, "step": 0, "loop:4": 1,
        "forward:3": 1, "forget": 0, "loop: its loss is held": 0, "forward:4": 1, "backward twice": 0, "loop:5": 1})


def test_what_one_rank_does_has_no_rank_play_back():
    check("pp=2,microbatches=2", {
        "one rank holds gradients": 0, "loop": 0, "loop:2": 0, "let go": 0, "loop:3": 1,
        "one rank moves a parameter": 0, "loop: recorded anew": 1, "loop:4": 1, "move": 0, "loop:5": 0, "loop:6": 1})
