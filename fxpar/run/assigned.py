"""assigned: what programs put into ``parameter.data`` of a parallel module, and where they put its memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.errors import InputError


def watch() -> None:
    """From now on, ``p.data = value`` writes the value to a DTensor of this process. Once is enough."""
    compat.assign_data_by(_assign)
    compat.share_memory_by(_share)


@torch.no_grad()
def _assign(t: DTensor, value: Any) -> None:
    """Raises: `InputError` for anything but a DTensor of the same shape, dtype and layout, whose parts ranks have already."""
    mine = compat.memory(t)
    alike = isinstance(value, DTensor) and (value.device_mesh, value.placements, value.shape, value.dtype) == (
        t.device_mesh, t.placements, t.shape, t.dtype)
    if not alike or mine.is_meta:
        kind = "a plain tensor" if not isinstance(value, DTensor) else "a DTensor of another shape, dtype or layout"
        raise InputError(f"{kind} was put into `.data` of a parameter of {tuple(t.shape)}, of which each rank has a part; write "
                         "module.load_state_dict({name: tensor, ...}, strict=False), which takes whole tensors, on all ranks, or "
                         "change the plain model inside of `with module.gathered(write_back=True)`")
    mine.copy_(compat.memory(value))


def _share(t: DTensor) -> None:
    """Raises: `InputError`."""
    raise InputError(f"share_memory() was called on a parameter of {tuple(t.shape)}, of which each rank has a part; share a "
                     "plain copy: with module.gathered(rank0_only=True) as model: copy.deepcopy(model).share_memory()")
