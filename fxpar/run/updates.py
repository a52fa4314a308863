"""updates: what optimizers did to a model, so that ranks can compare it.

A step that one rank leaves out, or takes with another learning rate, has its weights part from those of the others.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxpar.backends.transport.watch import NoWatch, Watch

PLAIN = (bool, int, float, str, tuple, type(None))
MOST = 64
"""Steps that are remembered one by one until a call compares them."""


class OptimizerSteps:
    """The steps since the last call that compared them, of optimizers that hold a DTensor; of all parallel modules alike."""

    def __init__(self, watch: Watch | NoWatch):
        self._steps: list[Any] = []
        if isinstance(watch, NoWatch):
            return
        mine = weakref.ref(self)

        def note(optimizer: Any, *_: Any) -> None:
            steps = mine()
            if steps is not None and len(steps._steps) < MOST:
                steps.add(optimizer)

        weakref.finalize(self, register_optimizer_step_post_hook(note).remove)

    def add(self, optimizer: Any) -> None:
        groups = [g for g in optimizer.param_groups if g["params"]]
        if any(isinstance(g["params"][0], DTensor) for g in groups):
            self._steps.append((type(optimizer).__name__, [
                [(k, v) for k, v in g.items() if isinstance(v, PLAIN)] for g in groups]))

    def taken(self) -> list[Any]:
        """What was done, to be compared now."""
        steps, self._steps = self._steps, []
        return steps
