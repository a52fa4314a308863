"""Microbatches whose parameters stay gathered, and gradients unreduced, are recorded, and no number changes: two ranks over gloo,
on a device that overwrites all memory of recordings."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.run import engine, recording
from tests.processes import launch
from tests.recorder import Pretended

pytestmark = pytest.mark.multiproc

WIDTH, STEPS = 12, 9


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.shared = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.last(torch.tanh(self.drop(self.first(x)) * self.shared)) + x @ self.first.weight
        if self.training:
            self.seen = self.seen * 0.5 + 1
        return {"loss": (y - self.seen).square().mean()}


def trained(plan: str, graphs: bool, backend: str) -> tuple[list[Tensor], int, str | None]:
    """Losses, gradients and parameters of a run, how often something was played back, and what the report says."""
    device = Pretended()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "device_of", lambda _: device if graphs else None)
        torch.manual_seed(0)
        module = fxpar.parallelize(Net(), plan, {"x": torch.ones(4, WIDTH)}, backend=backend, cuda_graphs=graphs)
    module.seed = 5
    numbers = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), 0.05)
    made: list[Tensor] = []
    for step in range(STEPS):
        rows = torch.randn(3, 8, WIDTH, generator=numbers).chunk(2, 1)[module.replica]
        if module.plan.microbatches > 1:
            made.append(module.train_step(x=rows[0]).detach().clone())
        else:
            for i, x in enumerate(rows):
                with module.no_sync() if i < 2 else contextlib.nullcontext():
                    loss = module(x=x)["loss"]
                    loss.backward()
                    made.append(loss.detach().clone())
                if step % 3 == 2 and not i:
                    with torch.no_grad():
                        made.append(module(x=x)["loss"].clone())
        made += [p.grad.full_tensor().clone() for p in module.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    made += [p.full_tensor().detach().clone() for p in module.parameters()] + [module.seen.clone()]
    return made, device.plays, module.report().cuda_graphs


def compared(rank: int, plan: str, backend: str) -> tuple[bool, int, str | None]:
    recording.WARM = recording.TRIED = 1
    want, _, _ = trained(plan, False, backend)
    have, plays, told = trained(plan, True, backend)
    return all(map(torch.equal, want, have)), plays, told


@pytest.mark.parametrize("plan", ["dp=2,recompute=full", "dp=2,zero=2,recompute=full,microbatches=2"])
def test_accumulated_gradients_are_those_without_recordings(plan):
    check(plan, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("plan, backend", [
    ("dp=2", "inductor"), ("dp=2,zero=1,param_dtype=bf16", "inductor"), ("dp=2,zero=2,microbatches=2", "inductor"),
    ("dp=2,microbatches=4,recompute=full", "eager"), ("dp=2,zero=1,recompute=full,microbatches=2", "eager"),
    ("dp=2,zero=1,recompute=full,param_dtype=bf16", "eager"), ("dp=2,zero=2,recompute=full", "eager")])
def test_accumulated_gradients_under_more_plans(plan, backend):
    check(plan, backend)


def check(plan: str, backend: str) -> None:
    for equal, plays, told in launch(2, compared, plan, backend):
        assert equal and plays >= STEPS, (equal, plays, told)
        assert told is not None and "the last microbatch: on" in told


def together(rank: int, plan: str, graphs: bool) -> list[float]:
    """Gradients of forwards of two shapes in turn, and of several behind them, with one backward each."""
    recording.WARM = recording.TRIED = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "device_of", lambda _: Pretended() if graphs else None)
        torch.manual_seed(0)
        module = fxpar.parallelize(Net(), plan, {"x": torch.ones(4, WIDTH)}, cuda_graphs=graphs)
    module.seed = 5
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    found: list[float] = []
    for step in range(5):
        def loss(rows: int, step: int = step) -> Tensor:
            return module(x=torch.ones(rows, WIDTH) * (step + 1))["loss"]

        with module.no_sync():
            (loss(4) + loss(6) + loss(4)).backward()
        (loss(4) + loss(4)).backward()
        found += [p.grad.full_tensor().sum().item() for p in module.parameters()]
        if step % 2:
            optimizer.step()
        else:  # by hand, which changes no version
            for p in module.parameters():
                p.to_local().data.sub_(p.grad.to_local(), alpha=0.01)
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("plan", ["dp=2,zero=1,recompute=full,param_dtype=bf16", "dp=2,zero=2,recompute=full"])
def test_several_forwards_before_a_backward(plan):
    want, have = (launch(2, together, plan, graphs) for graphs in (False, True))
    assert want == have


def stepped_between(rank: int, plan: str, graphs: bool) -> list[str | float]:
    """What becomes of backwards that come when the optimizer has stepped since their forward."""
    recording.WARM = recording.TRIED = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "device_of", lambda _: Pretended() if graphs else None)
        torch.manual_seed(0)
        module = fxpar.parallelize(Net(), plan, {"x": torch.ones(4, WIDTH)}, cuda_graphs=graphs)
    module.seed = 5
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    found: list[str | float] = []
    for step in range(8):
        with module.no_sync():
            early = module(x=torch.ones(4, WIDTH))["loss"]
            module(x=torch.full((4, WIDTH), 2.0))["loss"].backward()
            optimizer.step()
            module(x=torch.ones(4, WIDTH))["loss"].backward()
        try:
            early.backward()
        except RuntimeError as error:
            found.append(str(error))
        loss = module(x=torch.ones(4, WIDTH) * step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("plan", ["dp=2,recompute=full", "dp=2,zero=1,recompute=full,param_dtype=bf16"])
def test_a_backward_behind_a_step_is_no_silent_mistake(plan):
    want, have = (launch(2, stepped_between, plan, graphs)[0] for graphs in (False, True))
    assert want == have or any("modified by an inplace operation" in str(x) for x in have)
