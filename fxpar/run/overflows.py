"""overflows: gradients that are not finite, on any rank, have all ranks leave a step out.

A `torch.amp.GradScaler` looks at the gradients that its own rank has: a part of each under ZeRO and tp, those of some stages
under pp. It leaves the step out and takes a smaller scale where one of them is not finite, so all ranks have to find the same.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.run.store import ParameterStore

SEARCH = "the search of a GradScaler for gradients that are not finite"

_stores: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ParameterStore]] = weakref.WeakKeyDictionary()


def watch(store: ParameterStore) -> None:
    """From now on, scalers find on all ranks what they find on one of them, in gradients of this model."""
    _stores[store.model] = weakref.ref(store)
    compat.after_searches_for_inf(_join)


def _join(optimizer: Any, found: dict[torch.device, Tensor]) -> None:
    """Raises: `MismatchError`, on all ranks, if some call something else."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)}
    for model, store in [(model, made()) for model, made in _stores.items()] if stepped else ():
        if store is not None and any(id(p) in stepped for p in model.parameters()):
            _join_over(store, found)


@torch.no_grad()
def _join_over(store: ParameterStore, found: dict[torch.device, Tensor]) -> None:
    """The largest of all ranks of a model; where this one has no gradients, too."""
    mesh, across, control = store.mesh, store.bound.across, store.control
    if mesh.world_size == 1 and across is None:
        return
    device = next((d for d in found if d.type == store.device.type), store.device)
    mine = found.setdefault(device, torch.zeros((), device=device))
    with control.watch.call(SEARCH):
        if mesh.world_size * store.bound.kinds == dist.get_world_size():
            control.agree(SEARCH, {})
        axes = tuple(a for a in mesh.names if mesh.size(a) > 1)
        largest = store.runtime.all_reduce(mine, axes, "max") if axes else mine.clone()
        if across is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=across)
        mine.copy_(largest)
