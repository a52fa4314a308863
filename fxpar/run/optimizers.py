"""optimizers: those that would compute something else of parts of parameters are refused; fused ones step the parts at once."""

from __future__ import annotations

import functools
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adafactor, Rprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxpar import compat
from fxpar.errors import InputError

NEEDS = {Adafactor: "norms of whole rows and columns", LBFGS: "all gradients in one vector",
         Rprop: "to choose elements by their signs"}
"""What optimizers need that the parts of a parameter do not give."""


@functools.cache
def watch() -> None:
    """From now on, the optimizers of this process refuse parameters that they cannot step, and fused ones step parts at once.
    Once is enough."""
    register_optimizer_step_pre_hook(_check)
    compat.step_parts_directly()


def _check(optimizer: Any, *_: Any) -> None:
    """Raises: `InputError` for an optimizer of `NEEDS` with parameters of which ranks hold parts; for another library's
    Adafactor, whose state are plain tensors."""
    needs = next((what for kind, what in NEEDS.items() if isinstance(optimizer, kind)), None)
    foreign = needs is None and type(optimizer).__name__ == "Adafactor"
    if needs is None and not foreign:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    if parameters and foreign:
        raise InputError(f"{type(optimizer).__module__}.Adafactor mixes plain tensors with parameters, which are DTensors here: "
                         "use another optimizer (AdamW), or torch.optim.Adafactor where the plan stores parameters whole (dp)")
    if any(not place.is_replicate() for p in parameters for place in p.placements):
        raise InputError(f"torch.optim.{type(optimizer).__name__} cannot step parameters of which each rank has a part (tp, "
                         f"zero): it needs {needs}; use another optimizer (AdamW), or a plan that stores parameters whole (dp)")
