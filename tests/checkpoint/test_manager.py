"""Numbered checkpoints of a run: which stay, what is whole, and that a run goes on as if it had not stopped."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.checkpoint import manager as module_of
from fxpar.errors import CheckpointError
from tests.processes import launch


class Rows:
    """An endless loader that says where it is: batches of a replica's own."""

    generator = torch.Generator()

    def __init__(self, replica: int = 0) -> None:
        self.replica, self.at = replica, 0

    def __next__(self) -> Tensor:
        self.at += 1
        return torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * self.at + self.replica))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "replica": self.replica}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["replica"] == self.replica
        self.at = state["at"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu())).square().mean()


class Run:
    """A training run that draws from every generator in each step."""

    def __init__(self, path: Path, plan: str | None = None, **options: Any):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        self.model: Any = Net() if plan is None else fxpar.parallelize(Net(), plan, (torch.ones(2, 4),))
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.opt, 2, 0.5)
        self.loader = Rows(0 if plan is None else int(self.model.replica))
        self.manager = fxpar.CheckpointManager(path, self.model, self.opt, **{
            "scheduler": self.scheduler, "loader": self.loader, **options})

    def step(self) -> tuple[float, ...]:
        loss = self.model(next(self.loader) + torch.rand(1))
        loss.backward()
        self.opt.step()
        self.scheduler.step()
        self.opt.zero_grad()
        return loss.item(), self.scheduler.get_last_lr()[0], random.random(), np.random.rand()


def test_a_run_goes_on_exactly(tmp_path):
    run = Run(tmp_path / "run")
    assert run.manager.restore().step == 0
    for _ in range(3):
        run.step()
    run.manager.save(3, epoch=1, best=0.5)
    want = [run.step() for _ in range(3)]

    resumed = Run(tmp_path / "run")
    resumed.step()
    restored = resumed.manager.restore()
    assert (restored.step, restored.extra) == (3, {"epoch": 1, "best": 0.5})
    assert [resumed.step() for _ in range(3)] == want


def on_ranks(rank: int, plan: str, path: Path) -> tuple[list, list, list[int]]:
    run = Run(path, plan, keep=2)
    for step in range(1, 4):
        run.step()
        run.manager.save(step, asynchronous=step == 2)
    want = [run.step() for _ in range(3)]
    resumed = Run(path, plan, keep=2)
    resumed.manager.restore()
    return want, [resumed.step() for _ in range(3)], resumed.manager.steps()


@pytest.mark.multiproc
def test_a_run_on_ranks_goes_on_exactly(tmp_path):
    for want, got, steps in launch(2, on_ranks, "dp=2,zero=3", tmp_path / "run"):
        assert got == want and steps == [2, 3]
    alone = Run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="2 replicas saved the states of their loaders, and there are 1"):
        alone.manager.restore()


def test_the_newest_steps_stay(tmp_path):
    run = Run(tmp_path / "run", keep=2)
    for step in (1, 5, 100):
        run.manager.save(step)
    assert run.manager.steps() == [5, 100]
    assert sorted(os.listdir(tmp_path / "run")) == ["step-00000005", "step-00000100"]
    assert run.manager.restore(5).step == 5


def test_a_step_that_was_killed_is_none(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", keep=2)
    run.manager.save(1)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module_of, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run.manager.save(2)
    monkeypatch.undo()
    assert (tmp_path / "run" / "step-00000002" / "rank-0.pt").exists() and run.manager.steps() == [1]
    assert run.manager.restore().step == 1
    run.manager.save(3)
    assert sorted(os.listdir(tmp_path / "run")) == ["step-00000001", "step-00000003"]


def test_the_same_step_is_replaced(tmp_path):
    run = Run(tmp_path / "run")
    run.manager.save(1, epoch=0)
    run.manager.save(1, epoch=7)
    assert run.manager.steps() == [1] and run.manager.restore().extra == {"epoch": 7}


def test_the_same_step_again_in_the_background(tmp_path):
    run = Run(tmp_path / "run", keep=1)
    for number in range(3):
        run.manager.save(1, asynchronous=True, number=number)
    assert run.manager.restore().extra == {"number": 2} and run.manager.folder_of(1).name == "step-00000001.again"
    run.manager.save(2, number=3)
    assert run.manager.steps() == [2] and os.listdir(tmp_path / "run") == ["step-00000002"]


def of_number(path: Path, number: float) -> tuple[nn.Module, fxpar.CheckpointManager]:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, number)
    return model, fxpar.CheckpointManager(path, model, keep=1)


def save_for_ever(path: Path, steps: int) -> None:
    try:
        for number in itertools.count(1):
            manager = of_number(path, float(number))[1]
            manager.save(max(manager.steps()) + (number % steps > 0), number=float(number))
    finally:
        os._exit(1)


def check_kills(path: Path, steps: int, count: int) -> None:
    """Kill processes that save again and again: `steps` steps in turn."""
    of_number(path, 0.0)[1].save(0, number=0.0)
    for seed in range(count):
        pid = os.fork()
        if pid == 0:
            save_for_ever(path, steps)
        time.sleep(0.02 + 0.1 * random.Random(seed).random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        model, manager = of_number(path, -1.0)
        assert manager.steps(), seed
        restored = manager.restore()
        assert set(model.weight.detach().flatten().tolist()) == {restored.extra["number"]}, seed
    last = of_number(path, 7.0)[1]
    last.save(10**6, number=7.0)
    assert last.steps() == [10**6] and os.listdir(path) == ["step-01000000"]


@pytest.mark.parametrize("steps", [1, 3])
def test_at_every_moment_there_is_a_whole_step(tmp_path, steps):
    check_kills(tmp_path / "run", steps, 3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_at_many_moments_there_is_a_whole_step(tmp_path, steps):
    check_kills(tmp_path / "run", steps, 80)


def test_an_older_step_is_not_saved_under_newer_ones(tmp_path):
    run = Run(tmp_path / "run")
    run.manager.save(10)
    with pytest.raises(CheckpointError, match=r"step 10 is there, which restore\(\) would take for newer than step 4"):
        run.manager.save(4)


@pytest.mark.parametrize("name", ["rank-0.pt", "common.pt", "run.json"])
def test_damage_is_seen_before_anything_changes(tmp_path, name):
    run = Run(tmp_path / "run")
    run.manager.save(1)
    file = tmp_path / "run" / "step-00000001" / name
    file.write_bytes(b"}" + file.read_bytes()[1:])
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step()
    after = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(CheckpointError, match="damaged"):
        run.manager.restore()
    assert all(torch.equal(a, b) for a, b in zip(after, run.model.parameters())) and not torch.equal(before[0], after[0])


def test_other_things_by_name(tmp_path):
    Run(tmp_path / "run").manager.save(1)
    other = fxpar.CheckpointManager(tmp_path / "run", Net())
    with pytest.raises(CheckpointError, match=r"it has states of \['loader', 'scheduler'\], and this manager of nothing"):
        other.restore()


def test_files_of_others_are_not_removed(tmp_path):
    run = Run(tmp_path / "run", keep=1)
    run.manager.save(1)
    (tmp_path / "run" / "step-00000001" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="an old step holds what no save wrote"):
        run.manager.save(2)
    assert list((tmp_path / "run").rglob("notes.txt"))


def test_a_state_that_would_run_code_is_refused_when_it_is_saved(tmp_path):
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"where": Path("/")}

        def load_state_dict(self, state: Any) -> None:
            pass

    with pytest.raises(CheckpointError, match="cannot be read back without running code"):
        Run(tmp_path / "run", odd=Odd()).manager.save(1)


@pytest.mark.parametrize("options, error", [
    (dict(keep=0), "at least 1"),
    (dict(scheduler=3), "takes what has state_dict"),
    (dict(loader=torch.utils.data.DataLoader([1])), "StatefulDataLoader has"),
])  # fmt: skip
def test_what_a_manager_takes(tmp_path, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Run(tmp_path, **options)


def test_a_loader_that_draws_from_the_generator_of_all(tmp_path):
    class Shared(Rows):
        generator = None

    with pytest.raises(ValueError, match=r"make the loader with generator=torch\.Generator\(\)"):
        fxpar.CheckpointManager(tmp_path, Net(), loader=Shared())
