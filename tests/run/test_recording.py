"""Recordings of forward and backward change no number, whatever a training loop does between them.

What they are played back on is a device that overwrites the whole pool, but for what was just written (tests/recorder.py).
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpar
from fxpar.run import engine, recording
from tests.recorder import Pretended

ACTIONS = ("forward", "other shape", "backward", "backward", "backward of the first", "backward twice", "forget", "step", "zero", "set none",
           "hold outputs", "hold gradients", "hold parts", "let go", "evaluate", "slower", "load", "move", "freeze", "look for anomalies",
           "hooks", "loop", "loop", "no_sync")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.silu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks, self.out = nn.Embedding(11, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 11, bias=False)
        self.scale = nn.BatchNorm1d(8)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        x = self.scale(x.transpose(1, 2)).transpose(1, 2)
        logits = self.out(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tokens(seed: int, length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(0, 11, (3, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids.roll(1, 1)}


class Loop:
    """A training loop that does as it is told. seen: what its user looks at; pending: losses that wait for their backward."""

    def __init__(self, cuda_graphs: bool | str, device: Any = None):
        engine.device_of, original = (lambda _: device), engine.device_of
        torch.manual_seed(0)
        try:
            self.module = fxpar.parallelize(Net(), fxpar.Plan(recompute="full"), tokens(0), backend="eager", cuda_graphs=cuda_graphs)
        finally:
            engine.device_of = original
        self.module.seed = 5
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1, momentum=0.9)
        self.count = 0
        self.outputs: dict[str, Tensor] = {}
        self.pending: list[Tensor] = []
        self.held: list[Tensor] = []

    def forward(self, length: int = 5, around: Any = None) -> None:
        self.count += 1
        with around or contextlib.nullcontext():
            self.outputs = self.module(**tokens(self.count, length))
        self.pending.append(self.outputs["loss"])

    def backward(self, which: int = -1, times: int = 1) -> None:
        if self.pending:
            loss = self.pending.pop(which)
            for left in reversed(range(times)):
                loss.backward(retain_graph=left > 0)

    def do(self, action: str) -> None:
        module, parameters = self.module, list(self.module.parameters())
        first = parameters[3]
        match action:
            case "forward": self.forward()
            case "other shape": self.forward(4)
            case "backward": self.backward()
            case "backward of the first": self.backward(0)
            case "backward twice": self.backward(times=2)
            case "forget": self.pending.clear()
            case "step": self.optimizer.step()
            case "zero": self.optimizer.zero_grad(set_to_none=False)
            case "set none": self.optimizer.zero_grad()
            case "hold outputs": self.held += self.outputs.values()
            case "hold gradients": self.held += [p.grad for p in parameters if p.grad is not None]
            case "hold parts": self.held += [p.grad.to_local() for p in parameters if p.grad is not None]
            case "let go": self.held.clear()
            case "evaluate":
                module.eval()
                self.outputs = module.eval_step(**tokens(self.count))
                module.train()
            case "slower":
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.7
            case "load": module.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in module.state_dict().items()})
            case "move": first._local_tensor = first._local_tensor.clone()
            case "freeze": first.requires_grad_(not first.requires_grad)
            case "look for anomalies": self.forward(around=torch.autograd.detect_anomaly(check_nan=False))
            case "hooks":
                self.forward(around=torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x))
            case "no_sync":
                with module.no_sync():
                    self.forward()
                    self.backward()
            case "loop":
                self.optimizer.zero_grad()
                self.forward()
                self.backward()
                self.optimizer.step()

    def seen(self) -> list[Tensor | None]:
        parameters, buffers = list(self.module.parameters()), list(self.module.buffers())
        values = [*parameters, *(p.grad for p in parameters), *buffers, *self.outputs.values(), *self.held]
        return [None if x is None else getattr(x, "_local_tensor", x).detach().clone() for x in values]


def alike(one: Loop, other: Loop, where: object) -> None:
    for mine, theirs in zip(one.seen(), other.seen(), strict=True):
        assert (mine is None) == (theirs is None), where
        assert mine is None or torch.equal(mine, theirs), where


def compare(actions: list[str]) -> Pretended:
    device = Pretended()
    recorded, plain = Loop("auto", device), Loop(False)
    for number, action in enumerate(["loop"] * 4 + actions):
        recorded.do(action)
        plain.do(action)
        alike(recorded, plain, (number, action, recorded.module._engine.recordings.told(recorded.module.newest_program())))
    return device


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(recording, "WARM", 1)
    monkeypatch.setattr(recording, "TRIED", 1)
    monkeypatch.setattr(recording, "EVERY", 3)


def test_a_loop_is_recorded_and_played_back():
    device = compare(["loop"] * 6)
    assert (device.records, device.plays) == (2, 2 * 9)


@settings(max_examples=6)
@given(st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=12))
def test_no_number_changes(actions):
    compare(actions)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=40))
def test_no_number_changes_in_long_runs(actions):
    compare(actions)
