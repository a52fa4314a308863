"""sums: numbers that are read from a sum over parameters (a penalty, a norm), of which every rank has its own part.

A DTensor that is such a sum is PyTorch's `Partial`, and ``item()``, ``float()``, ``bool()`` of one give this rank's part by
themselves. Here they give the number: parts are summed by all ranks of the tensor's mesh, which have to read it all.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control

READ = ("item() of a sum over parameters, of which each rank has a part (where one rank alone reads it, have all ranks make it "
        "whole before: `loss = loss.full_tensor()`)")
"""What the ranks that read a number call, for those that do not."""


def read_whole() -> None:
    """From now on, numbers read from DTensors in this process are whole. Once is enough."""
    compat.read_numbers_of(whole)
    compat.mend_sums_of_norms()


def whole(t: DTensor) -> Tensor:
    """All of a tensor with one element. Where the ranks of the world share it, they compare that all of them are here.

    Raises: `MismatchError`, on all ranks, if some call something else.
    """
    if not any(p.is_partial() for p in t.placements) or t.device_mesh.size() == 1:
        return compat.memory(t)
    control = Control()
    with control.watch.call(READ):
        if t.device_mesh.size() == dist.get_world_size():
            control.agree(READ, {})
        return compat.in_full(t)
