"""What collectives run on in a real run: process groups over sets of mesh axes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fxpar.backends.transport.base import NCCL, Transport
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import exchanged_along
from fxpar.ops.ring.operator import axes_of
from fxpar.sharding.mesh import Axes, BoundMesh

c10d = torch.ops._c10d_functional
LEAST = -(2**63)
"""An int64 that is larger than no other."""


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

    def all_reduce(self, x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x, op, self.name(axes)))

    def all_gather(self, x: Tensor, axes: Axes) -> Tensor:
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, self.size(axes), self.name(axes)))

    def reduce_scatter(self, x: Tensor, axes: Axes) -> Tensor:
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", self.size(axes), self.name(axes)))

    def all_to_all(self, x: Tensor, axes: Axes) -> Tensor:
        ones = [1] * self.size(axes)
        return c10d.wait_tensor(c10d.all_to_all_single(x, ones, ones, self.name(axes)))


class GroupRuntime(FunctionalRuntime):
    """The `Runtime` of one rank of a real run: its process groups."""

    def __init__(self, mesh: BoundMesh):
        self.mesh = mesh
        self.transport: Transport = NCCL
        """By which parameters and gradients go, in compiled programs."""

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

    def size(self, axes: Axes) -> int:
        return self.mesh.mesh.size(*axes)

    def index(self, axes: Axes) -> int:
        return self.mesh.index(axes)

    def name(self, axes: Axes) -> str:
        return self.mesh.group(axes).group_name

    def exchange_name(self, axes: Axes) -> str:
        return self.mesh.exchange_group(axes).group_name


class Control:
    """A gloo side channel on which ranks agree before they communicate, so that a mistake is an error and no hang.

    kinds: of ranks, see `BoundMesh`. kind, rank, world: this rank's kind; its number among all ranks, and how many there are.
    """

    def __init__(self, kinds: int = 1) -> None:
        self.world, self.rank, self.kinds = dist.get_world_size(), dist.get_rank(), kinds
        self.kind = self.kind_of(self.rank)
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self._largest = dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)

    def kind_of(self, rank: int) -> int:
        """The kind of a rank, by its number among all ranks."""
        return rank // (self.world // self.kinds)

    def compare(self, number: int, of_kind: int = 0) -> Callable[[], tuple[int, ...] | None]:
        """Start one small CPU all-reduce. What is returned waits for it: if every rank has the same `number`, and every rank of
        this kind, and of each other, the same `of_kind` (63 bits), those of all kinds in order (of several); else None."""
        if self.group is None:
            return tuple
        pairs = array("q", (number, -number))
        for kind in range(self.kinds if self.kinds > 1 else 0):
            pairs.extend((of_kind, -of_kind) if kind == self.kind else (LEAST, LEAST))
        tensor = torch.frombuffer(pairs, dtype=torch.int64)
        work = self.group.allreduce([tensor], self._largest)  # as dist.all_reduce, without half of the time it takes to start

        def numbers() -> tuple[int, ...] | None:
            work.wait()
            return tuple(pairs[2::2]) if all(pairs[i] == -pairs[i + 1] for i in range(0, len(pairs), 2)) else None

        return numbers

    def exchange(self, thing: object) -> list:
        """Every rank's `thing`, by rank."""
        if self.group is None:
            return [thing]
        out: list = [None] * self.world
        dist.all_gather_object(out, thing, group=self.group)
        return out
