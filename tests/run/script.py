"""A training script, step by step, of which tests replace some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(16, 8), nn.LayerNorm(8), nn.Dropout(0.25)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.register_buffer("scale", torch.ones(8))
        self.temperature, self.depth = 1.0, 1

    def forward(self, ids: Tensor, labels: Tensor | None = None, weight: float = 1.0) -> Any:
        h = self.embed(ids) * self.scale
        for _ in range(self.depth):
            h = h + self.drop(self.down(F.gelu(self.up(self.norm(h)))))
        logits = self.head(h) / self.temperature
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * weight


class Program:
    """What a training script does; a mistake replaces some of its steps. kept: of earlier steps."""

    def __init__(self, rank: int, plan: str, folder: str, timeout: float):
        self.rank, self.plan, self.folder = rank, plan, folder
        self.parallel_plan: Any = plan
        self.options: dict[str, Any] = {"timeout": timeout, "backend": "eager"}
        self.steps, self.seed, self.losses = 3, 0, list[float]()

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return Net()

    def changed(self, model: nn.Module) -> nn.Module:
        return model

    def rows(self, step: int, replica: int) -> dict[str, Any]:
        ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(10 * step + replica))
        return {"ids": ids, "labels": ids}

    def example(self) -> Any:
        return self.rows(0, 0)

    def parallelize(self) -> Any:
        return fxpar.parallelize(self.changed(self.build()), self.parallel_plan, self.example(), **self.options)

    def optimizer(self) -> Any:
        return torch.optim.SGD(self.module.parameters(), 0.1, momentum=0.9)

    def before(self) -> None:
        pass

    def batch(self, step: int) -> dict[str, Any]:
        return self.rows(step, self.module.replica)

    def begin(self, step: int) -> None:
        pass

    def forward(self, step: int) -> Any:
        return self.module(**self.batch(step))

    def backward(self, step: int, loss: Any) -> None:
        loss.backward()

    def clip(self, step: int) -> None:
        self.module.clip_grad_norm_(1.0)

    def update(self, step: int) -> None:
        self.opt.step()

    def zero(self, step: int) -> None:
        self.opt.zero_grad()

    def evaluate(self, step: int) -> None:
        pass

    def save(self) -> None:
        fxpar.save_checkpoint(Path(self.folder) / "checkpoint", self.module, self.opt)

    def load(self) -> None:
        fxpar.load_checkpoint(Path(self.folder) / "checkpoint", self.module, self.opt)

    def step(self, step: int) -> None:
        self.begin(step)
        loss = self.forward(step)
        self.backward(step, loss)
        self.clip(step)
        self.update(step)
        self.zero(step)
        self.evaluate(step)
        self.losses.append(float(loss.detach()))

    def run(self) -> None:
        self.module = self.parallelize()
        self.opt = self.optimizer()
        self.before()
        for step in range(self.steps):
            self.step(step)
        self.save()
        self.load()
        self.step(self.steps)
