"""What collectives run on in a real run: process groups over sets of mesh axes."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxpar.backends.transport.base import BLOCKS, NCCL, Transport
from fxpar.backends.transport.control import told
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import exchanged_along
from fxpar.ops.ring.operator import axes_of
from fxpar.plan import Plan
from fxpar.sharding.mesh import Axes, BoundMesh, Mesh

c10d = torch.ops._c10d_functional


class FunctionalRuntime(ABC):
    """A `Runtime` that speaks through functional collectives, which Inductor sees, buckets and overlaps.

    Who makes one says which ranks there are: `size` and `index` along axes, and the `name` of the group over them.
    """

    balanced = False

    @abstractmethod
    def size(self, axes: Axes) -> int: ...

    @abstractmethod
    def index(self, axes: Axes) -> int: ...

    @abstractmethod
    def name(self, axes: Axes) -> str: ...

    def exchange_name(self, axes: Axes) -> str:
        """The name of the group over `axes` by which rows go to their experts."""
        return self.name(axes)

    def has_group(self, axes: Axes) -> bool:
        """Whether there is a group over `axes`, or can be one at any time."""
        return True

    def places(self, axes: Axes) -> dict[str, int]:
        """Name of a group over some of `axes` -> this rank's number in it, for all such groups that there are."""
        some = [part for count in range(1, len(axes) + 1) for part in itertools.combinations(axes, count)]
        return {self.name(part): self.index(part) for part in some if self.has_group(part)}

    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x, op, self.name(axes)))

    def all_gather(self, x: Tensor, axes: Axes) -> Tensor:
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, self.size(axes), self.name(axes)))

    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor:
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", self.size(axes), self.name(axes)))

    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor:
        ones = [1] * self.size(axes)
        return c10d.wait_tensor(c10d.all_to_all_single(x, ones, ones, self.name(axes)))


def beside_products(runtime: FunctionalRuntime, mesh: Mesh, plan: Plan, transport: Transport = NCCL) -> Transport:
    """The `transport` as graph passes are told of it: with this rank's places in the groups over which activations go beside
    products, where the plan has them do so."""
    return replace(transport, places=runtime.places(mesh.axes("tp"))) if plan.overlaps_tp else transport


class GroupRuntime(FunctionalRuntime):
    """The `Runtime` of one rank of a real run: its process groups. Where communication breaks, it says why."""

    def __init__(self, mesh: BoundMesh):
        self.mesh = mesh
        self.transport: Transport = NCCL
        """By which parameters and gradients go, in compiled programs."""
        self.blocks = BLOCKS[0]
        """How equal blocks are compiled, one of `BLOCKS`."""

    def prepare(self, module: fx.GraphModule) -> None:
        """Make every process group that `module` uses, in program order (the same on every rank)."""
        for node in module.graph.nodes:
            made = typed(node)
            rows = exchanged_along(node)
            axes = made.axes if made is not None else axes_of(node)
            if rows is not None:
                self.mesh.exchange_group(rows)
            elif axes is not None:
                self.mesh.group(axes)

    def facts(self) -> object:
        """All that a trace may read of it, as a value whose text is the same in every process for which all of that is the same.
        Of its groups, those that were made: a program's are before it is traced (see `prepare`)."""
        mesh, names = self.mesh.mesh, self.mesh.group_names()
        return (type(self).__name__, self.balanced, mesh.names, mesh.sizes, sorted(mesh.strategies.items()), self.mesh.rank,
                self.mesh.kind, self.mesh.kinds, names, self.transport, self.blocks)

    def has_group(self, axes: Axes) -> bool:
        return any(kind == "group" and made == axes for kind, made, _ in self.mesh.group_names())

    def size(self, axes: Axes) -> int:
        return self.mesh.mesh.size(*axes)

    def index(self, axes: Axes) -> int:
        return self.mesh.index(axes)

    def name(self, axes: Axes) -> str:
        return self.mesh.group(axes).group_name

    def exchange_name(self, axes: Axes) -> str:
        return self.mesh.exchange_group(axes).group_name

    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
        with told:
            return super().all_reduce(x, axes, op)

    def all_gather(self, x: Tensor, axes: Axes) -> Tensor:
        with told:
            return super().all_gather(x, axes)

    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor:
        with told:
            return super().reduce_scatter(x, axes)

    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor:
        with told:
            return super().all_to_all(x, axes)
