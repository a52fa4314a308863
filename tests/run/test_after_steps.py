"""What is told of optimizers' steps may go at any time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxpar.run.after_steps import after_steps
from fxpar.run.updates import OptimizerSteps


class Count:
    def __init__(self) -> None:
        self.steps: list[object] = []


def stepped() -> torch.optim.SGD:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.step()
    return optimizer


def test_who_lives_is_told():
    one, other = Count(), Count()
    for each in (one, other):
        after_steps(each, lambda count, optimizer: count.steps.append(optimizer))
    told = [stepped()]
    del other
    told.append(stepped())
    assert one.steps == told


def test_what_is_told_may_be_collected_between_hooks():
    """Garbage is collected whenever Python likes: torch may be in the middle of its hooks."""
    watch: Any = None
    noted: list[OptimizerSteps] = []
    hook = register_optimizer_step_post_hook(lambda *_: noted.clear())
    noted += [OptimizerSteps(watch), OptimizerSteps(watch)]
    try:
        stepped()
        stepped()
    finally:
        hook.remove()
    assert not noted
