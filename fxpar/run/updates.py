"""updates: what optimizers did to a model, so that ranks can compare it.

A step that one rank leaves out, or takes with another learning rate, has its weights part from those of the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.watch import NoWatch, Watch
from fxpar.run.after_steps import after_steps

PLAIN = (bool, int, float, str, tuple, list, type(None))
MOST = 64
"""Steps that are remembered one by one until a call compares them."""
STEP = "step"
"""Where optimizers keep how often they stepped a parameter."""
GIVEN, FIRST = "parameters and gradients", "group 0"
"""What every step is noted with first."""


def steps_in(noted: list[tuple]) -> int:
    """How many steps there were, of what `OptimizerSteps.taken` returned."""
    return sum(what == GIVEN and group == FIRST for _, group, what, *_ in noted)


class OptimizerSteps:
    """The steps since the last call that compared them, of optimizers that hold a DTensor; of all parallel modules alike."""

    def __init__(self, watch: Watch | NoWatch):
        self._steps: list[Any] = []
        self._count = 0
        if not isinstance(watch, NoWatch):
            after_steps(self, OptimizerSteps.add)

    def add(self, optimizer: Any) -> None:
        """Note a step, if there is room: of each group its options, how many parameters it has, how many of them have gradients,
        and how often the first was stepped."""
        if self._count == MOST:
            return
        groups = [g for g in optimizer.param_groups if g["params"]]
        if not any(isinstance(g["params"][0], DTensor) for g in groups):
            return
        self._count += 1
        name = type(optimizer).__name__
        for number, group in enumerate(groups):
            parameters, where = group["params"], f"{FIRST[:-1]}{number}"
            given = sum(g is not None for g in compat.gradients(parameters))
            self._steps.append((name, where, GIVEN, len(parameters), given))
            stepped = optimizer.state[parameters[0]].get(STEP) if parameters[0] in optimizer.state else None
            for key, value in ((STEP, stepped), *group.items()):
                if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
                    value = value.item()  # on a GPU it would have to be waited for
                if isinstance(value, PLAIN) and key != "params":
                    self._steps.append((name, where, key, value))

    def taken(self) -> list[Any]:
        """What was done, to be compared now."""
        steps, self._steps, self._count = self._steps, [], 0
        return steps
