"""Checkpoints of ranks that are damaged, or whose save is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import fxpar
from fxpar.errors import CheckpointError
from tests.checkpoint.test_damage import MUTATIONS, Model, equal, state
from tests.processes import launch


class OnRanks(Model):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def parallel(plan: str, seed: int) -> tuple[fxpar.ParallelModule, torch.optim.Optimizer]:
    module = fxpar.parallelize(OnRanks(seed), plan, (torch.ones(4, 8),))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 + seed)
    module.train_step(torch.ones(4, 8))
    optimizer.step()
    return module, optimizer


def held(module: fxpar.ParallelModule, optimizer: torch.optim.Optimizer, full: bool) -> dict[str, Tensor]:
    """What a load writes to: the parts of this rank, or all of it."""
    return {k: (v.full_tensor() if full else v.to_local()).clone() if isinstance(v, DTensor) else v.clone()
            for k, v in state(module, optimizer).items()}


def mutated_on_ranks(rank: int, where: Path, seeds: range) -> list[str]:
    """How the loads of mutated checkpoints, which two ranks have saved, end here under another plan."""
    for name, seed in (("other", 5), ("good", 0)):
        saved = parallel("dp=2,zero=3", seed)
        fxpar.save_checkpoint(where / name, *saved)
    want, into, ended = held(*saved, True), parallel("tp=2", 9), []
    for seed in seeds:
        path, before = where / f"c{seed}", held(*into, False)
        if rank == 0:
            shutil.copytree(where / "good", path)
            rng = random.Random(seed)
            rng.choice(MUTATIONS)(path, rng)
        torch.distributed.barrier()
        try:
            fxpar.load_checkpoint(path, *into)
        except CheckpointError:
            ended.append("refused" if equal(held(*into, False), before) else "refused and changed")
        else:
            ended.append("right" if equal(held(*into, True), want) else "wrong")
    return ended


@pytest.mark.slow
@pytest.mark.multiproc
def test_mutated_checkpoints_on_ranks_are_right_or_refused_on_all(tmp_path):
    first, second = launch(2, mutated_on_ranks, tmp_path, range(300), timeout=280)
    print({kind: first.count(kind) for kind in sorted(set(first))})
    assert first == second and set(first) == {"refused", "right"} and first.count("refused") > 200


def saving_on_ranks(path: Path) -> None:
    module = fxpar.parallelize(OnRanks(0), "dp=2,zero=3", (torch.ones(4, 8),), timeout=600)
    number = 0.0
    while True:
        number += 1
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(number)
        fxpar.save_checkpoint(path, module)


def killed_on_ranks(rank: int, path: Path) -> None:
    """Saves until both ranks are killed, by one of them, at some moment after the first save."""
    if rank == 0:
        threading.Thread(target=_kill_all, args=(path,), daemon=True).start()
    (path.parent / f"pid{rank}").write_text(str(os.getpid()))
    saving_on_ranks(path)


def _kill_all(path: Path) -> None:
    while not path.exists() or len(list(path.parent.glob("pid*"))) < 2:
        time.sleep(0.01)
    time.sleep(random.Random(path.parent.name).random() * 0.4)
    for name in ("pid1", "pid0"):
        os.kill(int((path.parent / name).read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.multiproc
def test_saves_of_ranks_that_are_killed_leave_a_whole_checkpoint(tmp_path):
    for number in range(20):
        path = tmp_path / str(number) / "c"
        path.parent.mkdir()
        with pytest.raises(AssertionError, match="the process died without a word"):
            launch(2, killed_on_ranks, path, timeout=60)
        model = OnRanks(1)
        fxpar.load_checkpoint(path, model)
        assert len({x for p in model.parameters() for x in p.detach().flatten().tolist()}) == 1, number
