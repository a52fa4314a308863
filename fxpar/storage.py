"""How parameters are stored: DTensors on the one mesh, made from tilings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fxpar import compat
from fxpar.mesh import BoundMesh, Mesh
from fxpar.passes.layout import Tiling, take


def placements(tiles: Tiling, mesh: Mesh) -> list[Placement]:
    """The DTensor placement per mesh axis. A factor inside a dim (heads within a fused qkv) is a strided shard."""
    out: list[Placement] = [Replicate()] * len(mesh.names)
    for i, dim in enumerate(tiles):
        before = 1
        for piece in dim:
            for axis in piece.axes:
                out[mesh.names.index(axis)] = Shard(i) if before == 1 else compat.strided_shard(i, before)
            before *= piece.size // mesh.size(*piece.axes)
    return out


def distribute(full: Tensor, tiles: Tiling, mesh: BoundMesh, device: torch.device, dtype: torch.dtype | None = None) -> DTensor:
    """This rank's part of a tensor that it has whole (or on meta: then uninitialised), as a DTensor."""
    part = take(full.detach(), tiles, mesh.mesh, mesh.rank)
    local = torch.empty(part.shape, dtype=part.dtype, device=device) if part.is_meta else part.to(device).clone()
    return wrap(local, full.shape, tiles, mesh)


def wrap(local: Tensor, shape: torch.Size, tiles: Tiling, mesh: BoundMesh) -> DTensor:
    """A local part as the DTensor of the given global shape."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(local.contiguous(), mesh.device_mesh, placements(tiles, mesh.mesh), run_check=False,
                              shape=torch.Size(shape), stride=tuple(stride))


def parameter(full: Tensor, tiles: Tiling, mesh: BoundMesh, device: torch.device) -> nn.Parameter:
    return nn.Parameter(distribute(full, tiles, mesh, device), requires_grad=full.requires_grad)
