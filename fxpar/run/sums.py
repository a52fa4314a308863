"""sums: numbers that are read from a sum over parameters (a penalty, a norm), of which every rank has its own part.

A DTensor that is such a sum is PyTorch's `Partial`, and ``item()``, ``float()``, ``bool()`` of one give this rank's part by
themselves. Here they give the number: parts are summed by all ranks of the tensor's mesh, which have to read it all.

The ranks of a pipeline hold other parameters each, and no tensor that is made of them tells which ones it lacks. There
`over_parameters` sums over those of all stages, and what would take one rank's for all of them is refused or warned of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control
from fxpar.errors import InputError
from fxpar.run.store import ParameterStore
from fxpar.sharding.mesh import BoundMesh

READ = ("item() of a sum over parameters, of which each rank has a part (where one rank alone reads it, have all ranks make it "
        "whole before: `loss = loss.full_tensor()`)")
"""What the ranks that read a number call, for those that do not."""
NORM = "torch.nn.utils.clip_grad_norm_ or get_total_norm"
WAY_OUT = ("module.sum_over_parameters(lambda name, p: p.square().sum()) is the number of all stages' parameters, on all ranks "
           "and with gradients")

_of_stages: list[DeviceMesh] = []
"""Meshes on which ranks hold the parameters of some stages of a pipeline."""


def read_whole(bound: BoundMesh) -> None:
    """From now on, numbers read from DTensors in this process, or added to plain tensors, are whole. Those of parameters on
    `bound` are where all its ranks hold the same ones."""
    if bound.kinds > 1 and bound.device_mesh not in _of_stages:
        _of_stages.append(bound.device_mesh)
    compat.read_numbers_of(whole)
    compat.before_norms(_before_norm)
    compat.mend_searches_for_nan()
    compat.mend_sums_of_norms()
    compat.mend_writes_to_plain_tensors()


def whole(t: DTensor) -> Tensor:
    """All of a tensor with one element. Where the ranks of the world share it, they compare that all of them are here.

    Raises: `MismatchError`, on all ranks, if some call something else.
    """
    if t.device_mesh in _of_stages:
        warnings.warn("a number is read from parameters under pp: it is one of those that this rank's stages hold, and another "
                      f"one on other ranks; {WAY_OUT}", stacklevel=3)
    if not any(p.is_partial() for p in t.placements) or t.device_mesh.size() == 1:
        return compat.memory(t)
    control = Control()
    with control.watch.call(READ):
        if t.device_mesh.size() == dist.get_world_size():
            control.agree(READ, {})
        return compat.in_full(t)


def _before_norm(tensors: Iterable[Any]) -> None:
    """Where the ranks of the world share gradients whose norm is about to be taken, they compare that all of them are here.

    Raises: `InputError` for gradients on some stages of a pipeline, which a rank would clip by their norm alone; `MismatchError`,
    on all ranks, if some call something else.
    """
    gradients = [t for t in tensors if isinstance(t, DTensor)]
    if any(t.device_mesh in _of_stages for t in gradients):
        raise InputError("torch.nn.utils takes the norm of the gradients that this rank holds, and under pp that is another one "
                         "on each rank; write module.clip_grad_norm_(max_norm), which has that of all")
    split = any(not p.is_replicate() for t in gradients for p in t.placements)
    if split and 1 < gradients[0].device_mesh.size() == dist.get_world_size():
        control = Control()
        with control.watch.call(NORM):
            control.agree(NORM, {})


def over_parameters(function: Callable[[str, nn.Parameter], Any], store: ParameterStore) -> Tensor:
    """See `ParallelModule.sum_over_parameters`."""
    counted = store.counted()
    total: Any = 0.0
    for name, p in store.model.named_parameters():
        number = function(name, p)
        if counted[p]:
            total = total + number
        elif isinstance(number, Tensor) and number.requires_grad:  # it counts on another stage; its gradient is needed here, too
            total = total + (number - number.detach())
    plain = total.full_tensor() if isinstance(total, DTensor) else total
    if not isinstance(plain, Tensor):
        plain = torch.tensor(float(plain), device=store.device)
    return plain if store.bound.across is None else _Across.apply(plain, store.bound.across)


class _Across(torch.autograd.Function):
    """The sum of what the stages of a pipeline have; its gradient is that of each."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.detach().double()  # stages may have parameters of other dtypes
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
