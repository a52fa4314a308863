"""`Part`: one tensor of a checkpoint, and what this rank holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxpar.sharding import chunks
from fxpar.sharding.chunks import Chunk, Runs
from fxpar.sharding.layout import Sharding
from fxpar.sharding.mesh import Mesh


@dataclass
class Part:
    """shape: of the full tensor. local: this rank's part. sharding: how the tensor lies on the ranks of `mesh`."""

    shape: torch.Size
    local: Tensor
    sharding: Sharding
    mesh: Mesh
    rank: int
    runs: Runs = field(init=False)

    def __post_init__(self) -> None:
        self.runs = chunks.runs_of(self.sharding, self.shape, self.mesh, self.rank)
        if chunks.part_shape(self.runs) != tuple(self.local.shape):
            raise RuntimeError(f"rank {self.rank} has {tuple(self.local.shape)} of a tensor of shape {tuple(self.shape)}, "
                               f"of which it should have {chunks.part_shape(self.runs)}")

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """The rectangles that this rank holds, with the view of each."""
        for chunk in chunks.chunks(self.runs):
            yield chunk, chunk.of_part(self.local)


class Shares:
    """Who writes what: of the ranks that hold the same part of a tensor, the one with the least to write so far.

    Every rank must ask about the same tensors in the same order: nothing is communicated.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[str, ...], list[int]] = {}

    def mine(self, part: Part) -> bool:
        axes = chunks.replicas(part.sharding, part.mesh)
        loads = self._loads.setdefault(axes, [0] * part.mesh.size(*axes))
        writer = loads.index(min(loads))
        loads[writer] += part.local.nbytes
        return part.mesh.index(part.rank, axes) == writer
