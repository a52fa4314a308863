"""`Part`: one tensor of a checkpoint, and what this rank holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxpar.sharding import chunks
from fxpar.sharding.chunks import Chunk, Held
from fxpar.sharding.layout import Tiling
from fxpar.sharding.mesh import Mesh


@dataclass
class Part:
    """shape: of the whole tensor. local: this rank's part. tiles: how the tensor lies on the ranks of `mesh`."""

    shape: torch.Size
    local: Tensor
    tiles: Tiling
    mesh: Mesh
    rank: int
    held: Held = field(init=False)

    def __post_init__(self) -> None:
        self.held = chunks.held(self.tiles, self.shape, self.mesh, self.rank)
        if chunks.part_shape(self.held) != tuple(self.local.shape):
            raise RuntimeError(f"rank {self.rank} has {tuple(self.local.shape)} of a tensor of shape {tuple(self.shape)}, "
                               f"of which it should have {chunks.part_shape(self.held)}")

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """The rectangles that this rank holds, with the view of each."""
        for chunk in chunks.chunks(self.held):
            yield chunk, chunk.of_part(self.local)


class Shares:
    """Who writes what: of the ranks that hold the same part of a tensor, the one with the least to write so far.

    Every rank must ask about the same tensors in the same order: nothing is communicated.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[str, ...], list[int]] = {}

    def mine(self, part: Part) -> bool:
        axes = chunks.replicas(part.tiles, part.mesh)
        loads = self._loads.setdefault(axes, [0] * part.mesh.size(*axes))
        writer = loads.index(min(loads))
        loads[writer] += part.local.nbytes
        return part.mesh.index(part.rank, axes) == writer
