"""A run with torchdata's loader that is killed and started again goes on exactly: data, generators, scheduler, dropout."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxpar
from tests.integrations.training import BATCH, build, parallel, rows
from tests.processes import launch

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(rows())

    def __getitem__(self, number: int) -> Any:
        return {"number": torch.tensor(number), **rows()[number]}


def train(rank: int, folder: Path, kill_after: int) -> list[tuple]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    data, module = Data(), parallel(build(dropout=0.1), "dp=2,zero=2")
    opt = torch.optim.AdamW(module.parameters(), lr=1e-2)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 16)
    sampler = fxpar.sampler(data, module)
    loader = StatefulDataLoader(data, BATCH // 2, sampler=sampler, generator=torch.Generator())
    manager = fxpar.CheckpointManager(folder, module, opt, scheduler=rates, loader=loader, keep=2)
    restored = manager.restore()
    step, lines = restored.step, []
    for epoch in range(restored.extra.get("epoch", 0), 3):
        sampler.set_epoch(epoch)
        for inputs in loader:
            order = inputs.pop("number").tolist()
            inputs["input_ids"] = torch.where(torch.rand(BATCH // 2, 16) < 0.1, 0, inputs["input_ids"])
            loss = module(**inputs).loss
            loss.backward()
            opt.step()
            rates.step()
            opt.zero_grad()
            step += 1
            lines.append((step, order, loss.item(), rates.get_last_lr(), random.random(), np.random.rand(), torch.rand(1).item()))
            if step == kill_after:
                os._exit(1)
            if step % 4 == 0:
                manager.save(step, epoch=epoch, asynchronous=step == 8)
    return lines


def test_a_killed_run_goes_on_exactly(tmp_path):
    whole = launch(2, train, tmp_path / "whole", -1)
    with pytest.raises(AssertionError, match="the process died without a word"):
        launch(2, train, tmp_path / "killed", 11)
    resumed = launch(2, train, tmp_path / "killed", -1)
    for want, got in zip(whole, resumed):
        assert got == want[8:] and len(want) == 18
