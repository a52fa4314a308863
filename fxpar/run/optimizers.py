"""optimizers: those that would compute something else of parts of parameters are refused."""

from __future__ import annotations

import functools
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Adafactor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxpar.errors import InputError


@functools.cache
def watch() -> None:
    """From now on, the optimizers of this process refuse parameters that they cannot step. Once is enough."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Any, *_: Any) -> None:
    """Raises: `InputError` for Adafactor with parameters of which ranks hold parts: it takes norms of rows and columns; for
    another library's Adafactor, whose state are plain tensors."""
    if type(optimizer).__name__ != "Adafactor":
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    if parameters and not isinstance(optimizer, Adafactor):
        raise InputError(f"{type(optimizer).__module__}.Adafactor mixes plain tensors with parameters, which are DTensors here: "
                         "use another optimizer (AdamW), or torch.optim.Adafactor where the plan stores parameters whole (dp)")
    if any(not place.is_replicate() for p in parameters for place in p.placements):
        raise InputError("torch.optim.Adafactor cannot step parameters of which each rank has a part (tp, zero): it needs norms "
                         "of whole rows and columns; use another optimizer (AdamW), or a plan that stores parameters whole (dp)")
