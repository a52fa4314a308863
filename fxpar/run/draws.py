"""draws: random numbers that programs draw for parameters of a parallel module: those of one device, on all ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control
from fxpar.errors import InputError

DRAW = ("random numbers for a tensor of which each rank has a part (an initialisation, noise): where ranks seed PyTorch's "
        "generator differently, seed it alike before (torch.manual_seed)")
"""What the ranks that draw call, for those that do not."""


def watch() -> None:
    """From now on, random numbers for DTensors of this process are one device's, and writes to a part of one reach it."""
    compat.write_whole(_before_draws)
    compat.apply_by(_apply)


def _before_draws(t: Any) -> None:
    """Raises: `MismatchError`, on all ranks, if some would draw other numbers for this tensor, or call something else."""
    if t.device_mesh.size() == 1:
        return
    control = Control()
    if t.device_mesh.size() == control.world:
        with control.watch.call(DRAW):
            control.agree(DRAW, {"shape": tuple(t.shape), "state of PyTorch's generator of random numbers": _state(t)})


def _apply(t: Any, *_: Any) -> None:
    """Raises: `InputError`."""
    raise InputError(f"apply_, map_ or map2_ was called on a tensor of {tuple(t.shape)}, of which each rank has a part; write it "
                     "with functions of whole tensors, or change the plain model inside of `with "
                     "module.gathered(write_back=True)`")


def _state(t: DTensor) -> str:
    device = compat.memory(t).device
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return hashlib.sha256(state.numpy().tobytes()).hexdigest()[:8]
