"""Gradient clipping over every rank, each element counted once."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from fxpar import compat
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.elementwise import scale_
from fxpar.run.repeated import RepeatedWork, Runner
from fxpar.sharding.mesh import Axes, BoundMesh


class Clipping:
    """Clips the gradients of one module (see `ParallelModule.clip_grad_norm_`). Gradients sharded over the same axes share one
    all-reduce of a scalar. What comes before the all-reduces and what comes behind them is recorded, each by itself.

    work: what records it.
    """

    def __init__(self, bound: BoundMesh, runtime: GroupRuntime, work: RepeatedWork):
        self._bound, self._runtime, self._work = bound, runtime, work
        self._parameters: dict[nn.Parameter, bool] = {}
        self._splits: list = []
        self._groups: dict[Axes, list[int]] = {}
        self._kept: dict[object, Tensor] = {}

    def __call__(self, parameters: dict[nn.Parameter, bool], max_norm: float, norm_type: float) -> Tensor:
        """The norm before. parameters: this rank's, and whether its kind is the one that counts it, where several hold it."""
        found = compat.gradients(list(parameters))
        self._sort(parameters, found)
        grads = compat.local_parts([g for g in found if g is not None])
        groups = {axes: [grads[i] for i in of] for axes, of in self._groups.items()}
        run = self._runner(grads, max_norm, norm_type) if grads else None
        parts = [_norm(g, norm_type) for g in groups.values()] if run is None else self._norms(run, groups, norm_type)
        device = grads[0].device if grads else torch.device(self._bound.device_mesh.device_type)
        joined = self._joined(parts or [torch.zeros((), device=device)], [*groups], norm_type)
        if run is None:
            return _clip(grads, joined, max_norm, norm_type)
        given, total = self._scalar("joined", device), self._scalar("total", device)
        given.copy_(joined)
        run("scaling", functools.partial(_clip_again, max_norm, norm_type), [given, total, *grads])
        return total.clone()

    def _sort(self, parameters: dict[nn.Parameter, bool], found: list[Tensor | None]) -> None:
        """By the axes that they are split over, in an order that is the same on all ranks, those that count: their numbers,
        among the gradients that there are."""
        splits = compat.splits(found)
        if parameters is self._parameters and splits == self._splits:
            return
        groups, axes_of = defaultdict[Axes, list[int]](list), functools.cache(functools.partial(_split_over, self._bound))
        there = [(g, counts) for g, counts in zip(found, parameters.values(), strict=True) if g is not None]
        for i, (grad, counts) in enumerate(there):
            if counts:
                groups[axes_of(grad.placements) if isinstance(grad, DTensor) else ()].append(i)
        self._parameters, self._splits, self._groups = parameters, splits, {axes: groups[axes] for axes in sorted(groups)}

    def _runner(self, grads: list[Tensor], max_norm: float, norm_type: float) -> Runner | None:
        if not isinstance(max_norm, int | float) or {*map(type, grads)} != {Tensor}:
            return None
        return self._work.now((("max_norm", max_norm), ("norm_type", norm_type)), lambda: [
            [x.data_ptr() for x in grads], [x.stride() for x in grads], [x.dtype for x in grads], self._splits, self._groups])

    def _norms(self, run: Runner, groups: dict[Axes, list[Tensor]], norm_type: float) -> list[Tensor]:
        """What `_norm` is of each group, in memory of this object."""
        parts = [self._scalar(axes, of[0].device) for axes, of in groups.items()]
        sizes = [len(of) for of in groups.values()]
        run("norms", functools.partial(_norms, sizes, norm_type), [*parts, *chain(*groups.values())])
        return parts

    def _scalar(self, name: object, device: torch.device) -> Tensor:
        if name not in self._kept:
            self._kept[name] = torch.zeros((), device=device)
        return self._kept[name]

    def _joined(self, parts: list[Tensor], groups: Sequence[Axes], norm_type: float) -> Tensor:
        """Of the norms of all ranks' parts the largest, or the sum of their powers."""
        largest, mesh = math.isinf(norm_type), self._bound.mesh
        for i, over in enumerate(groups):
            axes = tuple(a for a in over if mesh.size(a) > 1)
            if axes:
                parts[i] = self._runtime.all_reduce(parts[i], axes, "max" if largest else "sum")
        joined = parts[0] if len(parts) == 1 else torch.stack(parts).max() if largest else torch.stack(parts).sum()
        if self._bound.across is not None:
            dist.all_reduce(joined, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._bound.across)
        return joined


def _norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """Their largest norm, or the sum of the powers of their norms."""
    norms = torch.stack([n if n.dtype == torch.float32 else n.to(torch.float32) for n in torch._foreach_norm(grads, norm_type)])
    return norms.max() if math.isinf(norm_type) else (norms**norm_type).sum()


def _norms(sizes: list[int], norm_type: float, tensors: list[Tensor]) -> None:
    """Writes to the first tensors what `_norm` is of the others, of which groups have so many."""
    begin = len(sizes)
    for part, size in zip(tensors, sizes, strict=False):
        part.copy_(_norm(tensors[begin : begin + size], norm_type))
        begin += size


def _clip(grads: list[Tensor], joined: Tensor, max_norm: float, norm_type: float) -> Tensor:
    total = joined if math.isinf(norm_type) else joined ** (1 / norm_type)
    if grads:
        scale_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _clip_again(max_norm: float, norm_type: float, tensors: list[Tensor]) -> None:
    """As `_clip`: of the first tensor, and to the second."""
    joined, total, *grads = tensors
    total.copy_(_clip(grads, joined, max_norm, norm_type))


def _split_over(bound: BoundMesh, placements: tuple[Placement, ...]) -> Axes:
    return tuple(a for a, p in zip(bound.mesh.names, placements, strict=True) if not p.is_replicate())
