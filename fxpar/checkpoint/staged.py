"""Reading in two phases: all of it into memory of its own, checked, and only then into the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from fxpar.checkpoint.part import Part
from fxpar.checkpoint.source import OpenedFolder
from fxpar.errors import CheckpointError
from fxpar.sharding import chunks
from fxpar.sharding.chunks import Chunk


@dataclasses.dataclass(frozen=True)
class Staged:
    """target: a tensor of the model. part: on the CPU, where what it is to become is read to."""

    target: Tensor
    part: Part

    @classmethod
    def of(cls, part: Part) -> Staged:
        fresh = torch.empty(part.local.shape, dtype=part.local.dtype)
        return cls(part.local, dataclasses.replace(part, local=fresh))


def stage(parts: Mapping[str, Part]) -> dict[str, Staged]:
    """Memory for all parts: this rank's share of the model, once more, on the CPU."""
    return {name: Staged.of(part) for name, part in parts.items()}


@torch.no_grad()
def fill(staged: Iterable[Staged]) -> None:
    """Write to the model what was read."""
    for each in staged:
        each.target.copy_(each.part.local)


@torch.no_grad()
def read(source: OpenedFolder, parts: Mapping[str, Part]) -> None:
    """Fill `parts`, by name in the file: every saved rectangle of which this rank needs something is read once.

    Raises: `CheckpointError` if one is damaged, or its values are not the same in the part's dtype.
    """
    wanted: list[tuple[tuple[str, int], str, ChunkStorageMetadata, list[Chunk]]] = []
    for name, part in parts.items():
        entry = source.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        for saved in entry.chunks:
            needed = list(chunks.chunks(chunks.within(part.runs, tuple(saved.offsets), tuple(saved.sizes))))
            if needed:
                wanted.append((source.place(name, saved), name, saved, needed))
    for _, name, saved, needed in sorted(wanted, key=lambda each: each[0]):
        values, local = source.tensor(name, saved), parts[name].local
        for chunk in needed:
            chunk.of_part(local).copy_(converted(chunk.of_full(values, tuple(saved.offsets)), local.dtype, name, source.folder))


def converted(values: Tensor, dtype: torch.dtype, name: str, where: Path) -> Tensor:
    """The same numbers in another dtype; floating ones may be rounded.

    Raises: `CheckpointError` if one is another number there: an integer that does not fit, a finite number that becomes infinite.
    """
    if values.dtype == dtype:
        return values
    made = values.to(dtype)
    if values.is_floating_point() or values.is_complex():
        bad = values.isfinite() & ~made.to(values.dtype).isfinite()
    else:
        bad = made.to(values.dtype) != values
    if bad.any():
        odd = values[bad].flatten()[0].item()
        raise CheckpointError(f"{name} is {values.dtype} there and {dtype} in the model, which cannot hold its value {odd}",
                              str(where), "build the model with the saved dtype")
    return made
