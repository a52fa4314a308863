"""How parameters are stored: DTensors on the one mesh, made from shardings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fxpar import compat
from fxpar.ops.runtime import Runtime
from fxpar.sharding import chunks
from fxpar.sharding.layout import Sharding, take
from fxpar.sharding.mesh import BoundMesh, Mesh


def placements(sharding: Sharding, mesh: Mesh) -> list[Placement]:
    """The DTensor placement per mesh axis, each splitting what the axes before it left.

    A factor inside a dim (heads within a fused qkv) is a strided shard: of each of the runs before it.
    """
    out: list[Placement] = [Replicate()] * len(mesh.names)
    for i, dim in enumerate(sharding):
        for k, piece in enumerate(dim):
            for axis in piece.axes:
                earlier = mesh.names[: mesh.names.index(axis)]
                before = math.prod(p.size // mesh.size(*(a for a in p.axes if a in earlier)) for p in dim[:k])
                out[mesh.names.index(axis)] = Shard(i) if before == 1 else compat.strided_shard(i, before)
    return out


def distribute(full: Tensor, sharding: Sharding, mesh: BoundMesh, device: torch.device) -> DTensor:
    """This rank's part of a tensor that it has in full (or on meta: then unfilled), as a DTensor."""
    part = take(full.detach(), sharding, mesh.mesh, mesh.rank)
    local = _unfilled(part, device) if part.is_meta else part.to(device).clone()
    return wrap(local, full.shape, sharding, mesh)


def _unfilled(like: Tensor, device: torch.device) -> Tensor:
    """Room for values, of which `is_unfilled` tells that there are none yet; where a dtype can say so: not of integers."""
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    return made.fill_(torch.nan) if made.is_floating_point() or made.is_complex() else made


def is_unfilled(local: Tensor) -> bool:
    return local.numel() > 0 and (local.is_floating_point() or local.is_complex()) and bool(local.isnan().all())


def wrap(local: Tensor, shape: torch.Size, sharding: Sharding, mesh: BoundMesh) -> DTensor:
    """A local part as the DTensor of the given global shape."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(local.contiguous(), mesh.device_mesh, placements(sharding, mesh.mesh), run_check=False,
                              shape=torch.Size(shape), stride=tuple(stride))


def parameter(full: Tensor, sharding: Sharding, mesh: BoundMesh, device: torch.device) -> nn.Parameter:
    return nn.Parameter(distribute(full, sharding, mesh, device), requires_grad=full.requires_grad)


def unshard(local: Tensor, sharding: Sharding, shape: torch.Size, mesh: BoundMesh, runtime: Runtime) -> Tensor:
    """The full tensor on every rank, from the parts that they hold. A collective; replicas send nothing twice.

    Bytes are gathered, so that every dtype can be.
    """
    axes = mesh.ordered(tuple(chunks.split_axes(sharding)))
    if mesh.mesh.size(*axes) == 1:
        return local
    flat = local.detach().contiguous().reshape(-1).view(torch.uint8)
    parts = runtime.all_gather(flat, axes).view(local.dtype).view(mesh.mesh.size(*axes), *local.shape)
    out = torch.empty(shape, dtype=local.dtype, device=local.device)
    ranks = next(group for group in mesh.mesh.groups(axes) if mesh.rank in group)
    for part, rank in zip(parts, ranks, strict=True):
        for chunk in chunks.chunks(chunks.runs_of(sharding, tuple(shape), mesh.mesh, rank)):
            chunk.of_full(out).copy_(chunk.of_part(part))
    return out
