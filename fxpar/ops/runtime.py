"""Who runs collectives: what they ask of a runtime, and which one is active."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from fxpar.sharding.mesh import Axes


class Runtime(Protocol):
    """What the collectives need from whoever runs them; all tensors are this rank's.

    balanced: whether as many rows arrive in an exchange with experts as leave, because there are no other ranks whose router
    might say otherwise.
    """

    balanced: bool

    def size(self, axes: Axes) -> int: ...
    def index(self, axes: Axes) -> int: ...
    def name(self, axes: Axes) -> str: ...
    def exchange_name(self, axes: Axes) -> str: ...
    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor: ...
    def all_gather(self, x: Tensor, axes: Axes) -> Tensor: ...
    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor: ...
    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor: ...


LONE = "fxpar-lone"
"""The name of every group of a `LoneRuntime`."""


class LoneRuntime:
    """A runtime of one rank whose partners hold what it holds: what a rank computes has its shapes, and needs no other rank."""

    balanced = True

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes

    def size(self, axes: Axes) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def index(self, axes: Axes) -> int:
        return 0

    def name(self, axes: Axes) -> str:
        return LONE

    def exchange_name(self, axes: Axes) -> str:
        return LONE

    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
        return x * self.size(axes) if op == "sum" else x.clone()

    def all_gather(self, x: Tensor, axes: Axes) -> Tensor:
        return torch.cat([x] * self.size(axes))

    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor:
        return x[: x.shape[0] // self.size(axes)] * self.size(axes)

    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor:
        return x[:1].repeat(self.size(axes), *[1] * (x.dim() - 1))


_active: ContextVar[Runtime] = ContextVar("fxpar_runtime")


@contextlib.contextmanager
def use_runtime(runtime: Runtime) -> Iterator[None]:
    """The collectives called (or traced) inside speak to the ranks of `runtime`."""
    token = _active.set(runtime)
    try:
        yield
    finally:
        _active.reset(token)


def active() -> Runtime:
    """The runtime that collectives speak to now."""
    return _active.get()


def axis_index(axes: Axes) -> int:
    """This rank's index along `axes`."""
    return active().index(axes)


def group_of(axes: Axes) -> tuple[str, int]:
    """The name of this rank's group over `axes`, by which an operator that communicates finds it, and how many ranks it has."""
    run = active()
    return run.name(axes), run.size(axes)
