"""Recordings of whole steps of a pipeline change no number, on any rank: real ranks, which play back on a device that overwrites
the whole pool (tests/recorder.py)."""

from __future__ import annotations

import gc
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fxpar
from fxpar.run import engine, recorded_step, recording
from tests.processes import launch
from tests.recorder import Pretended
from tests.run.test_pipeline import Net
from tests.run.test_recording import ACTIONS, ModuleLoop, done, local

pytestmark = pytest.mark.multiproc


class PipelineLoop(ModuleLoop):
    """A training loop over a module of several stages, whose ranks each do something of their own."""

    def __init__(self, plan: str, device: Pretended | None, backend: str = "eager", graphs: bool | str | None = None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "device_of", lambda _: device)
            torch.manual_seed(0)
            parsed = fxpar.Plan.parse(plan)
            count = parsed.pp * parsed.virtual_stages
            parsed = replace(parsed, stage_boundaries=tuple(f"layers.{i * 4 // count}" for i in range(1, count)))
            self.rows = parsed.dp * parsed.microbatches
            self.module = fxpar.parallelize(Net(dropout=0.1, norm=True), parsed, self.batch(0, 2, parsed.dp, 0), backend=backend,
                                            cuda_graphs=device is not None if graphs is None else graphs)
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
        self.pending[-1:] = [loss * 3 for loss in self.pending[-1:]]
        self.backward()

    def backward_again(self) -> None:
        """What was handed out is in ``.grad``, and may be there alone."""
        for loss in self.pending[-1:]:
            self.backward()
            with pytest.raises(RuntimeError, match=r"second backward pass.*retain_graph=True"):
                loss.backward()

    def on_the_first_rank(self, what: str) -> None:
        if dist.get_rank() == 0:
            getattr(self, what)()

    def hold(self) -> None:
        self.held.extend(self.gradients())

    def seen(self) -> list[Tensor | None]:
        return [*super().seen(), *self.pending]


OF_PIPELINES = {
    "backward, scaled": lambda x: x.backward_scaled(),
    "backward, and again": lambda x: x.backward_again(),
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
        "loop": 1, "evaluate": 0, "evaluate:2": 1, "zero": 0, "forward": 1, "backward": 0, "forward:2": 1, "backward, scaled": 0,
        "step": 0, "loop:2": 1, "one rank holds gradients": 0, "loop:3": 0, "let go": 0, "loop:4": 1})


@pytest.mark.slow
def test_what_a_loop_may_do():
    check("pp=2,microbatches=2", {
        "loop, other shape": 0, "loop": 1, "loop, other shape:2": 1, "loop:2": 1, "load": 0, "loop:3": 1,
        "evaluate": 0, "evaluate:2": 1, "evaluate:3": 1,
        "zero": 0, "forward": 1, "backward": 0, "forward:2": 1, "backward, scaled": 0, "step": 0, "loop:4": 1,
        "forward:3": 1, "forget": 0, "loop: its loss is held": 0, "forward:4": 1, "backward twice": 0, "loop:5": 1,
        "forward:5": 1, "backward, and again": 0, "loop:6": 1})


@pytest.mark.slow
def test_what_one_rank_does_has_no_rank_play_back():
    check("pp=2,microbatches=2", {
        "one rank holds gradients": 0, "loop": 0, "loop:2": 0, "let go": 0, "loop:3": 1,
        "one rank moves a parameter": 0, "loop: recorded anew": 1, "loop:4": 1, "move": 0, "loop:5": 0, "loop:6": 1})


def ended(rank: int) -> tuple[list[int], str]:
    """How many recordings were not forgotten: of a module that is trained; is gone; of another; whose group has ended. And how
    that stands."""
    recording.WARM = recording.TRIED = 1
    remembered = []
    for gone in (True, False):
        device = Pretended()
        loop = PipelineLoop("pp=2,microbatches=2", device)
        for _ in range(3):
            loop.loop()
        remembered.append(device.remembered)
        if not gone:
            dist.destroy_process_group(loop.module.parameter_store.bound.across)
            remembered.append(device.remembered)
            return remembered, loop.told()
        del loop
        gc.collect()
        remembered.append(device.remembered)
    raise AssertionError


@pytest.mark.slow
def test_nothing_is_left_of_recorded_steps_when_their_module_or_a_group_is_gone():
    for found in launch(2, ended):
        assert found == ([1, 0, 1, 0], "off: a process group over which it was recorded has ended")


def chosen(rank: int, plan: str) -> str:
    """How recordings stand behind some steps, where nobody asked for them."""
    loop = PipelineLoop(plan, Pretended(), graphs="auto")
    for _ in range(recording.WARM + recording.TRIED + 2):
        loop.loop()
    return loop.told()


@pytest.mark.parametrize("plan, world, told", [
    ("pp=2,microbatches=2", 2, "on"), ("pp=2,dp=2,microbatches=2", 4, f"off: {recorded_step.SEVERAL}")])
def test_steps_are_recorded_by_default_where_stages_do_not_communicate_within(plan, world, told):
    found = launch(world, chosen, plan)
    assert {each[: len(told)] for each in found} == {told}, found


ANY = sorted({*ACTIONS, *OF_PIPELINES} - {"loop, other shape", "forward, other shape"})
"""What is done in any order."""
AS_EVER = ["let go", "forget", "set to none", "loop", "loop", "loop"]
"""After which steps are played back again."""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pp=2,microbatches=2,schedule=zb1p", "pp=2,microbatches=2,schedule=zbv,virtual_stages=2",
                                  "pp=2,microbatches=2,schedule=interleaved1f1b,virtual_stages=2", "pp=2",
                                  "pp=2,microbatches=4,schedule=gpipe",
                                  "pp=2,dp=2,microbatches=2", "pp=2,dp=2,zero=1,microbatches=2",
                                  "pp=2,dp=2,zero=2,microbatches=2", "pp=2,dp=2,zero=3,microbatches=2",
                                  "pp=2,tp=2,microbatches=2", "pp=4,microbatches=4"])
def test_no_number_changes_under_any_plan(plan):
    parsed = fxpar.Plan.parse(plan)
    numbers = random.Random(plan)
    actions = [action for _ in range(8) for action in (*numbers.choices(ANY, k=6), *AS_EVER)]
    assert sum(plays(plan, [*LOOPS, *actions], parsed.pp * parsed.dp * parsed.tp)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("plan, world", [("pp=2,microbatches=2", 2), ("pp=2,dp=2,zero=1,microbatches=2,schedule=zb1p", 4)])
def test_compiled_steps(plan, world):
    check(plan, {"loop": 1, "evaluate": 0, "evaluate:2": 1, "forward": 1, "backward twice": 0, "loop:2": 1}, world, "inductor")
