"""What `torch.distributed.checkpoint` is told to write: rectangles, not placements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from fxpar.checkpoint.part import Part, Shares
from fxpar.checkpoint.ranks import to_cpu

Key = tuple[str, ...]
"""Where an entry stands: ("model", "head.weight"), ("optimizer", "head.weight", "exp_avg"). Joined by dots it is the name in
the file; as it is, where it stands in the nested dict that DCP's tools make of the file."""


def joined(key: Key) -> str:
    return ".".join(key)


@dataclass
class Contents:
    """What this rank writes: rectangles of tensors, and on rank 0 the entries that are no tensors."""

    paths: dict[str, Key] = field(default_factory=dict)
    items: list[WriteItem] = field(default_factory=list)
    data: dict[MetadataIndex, Any] = field(default_factory=dict)

    def add(self, key: Key, part: Part) -> None:
        name = joined(key)
        self.paths[name] = key
        for chunk, local in part.chunks():
            index = MetadataIndex(name, torch.Size(chunk.start))
            where = ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.size))
            described = TensorWriteData(where, TensorProperties(dtype=local.dtype), part.shape)
            self.items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=described))
            self.data[index] = local

    def add_object(self, key: Key, thing: Any) -> None:
        name = joined(key)
        self.paths[name] = key
        self.items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        self.data[MetadataIndex(name)] = thing

    def staged(self) -> Contents:
        """The same with copies of the tensors on the CPU, which training does not change."""
        copies = {i: to_cpu(v) if isinstance(v, Tensor) else v for i, v in self.data.items()}
        return Contents(self.paths, self.items, copies)


def contents(parts: dict[Key, Part], objects: dict[Key, Any], coordinator: bool) -> Contents:
    """This rank's share of a checkpoint: each rectangle is written by one of the ranks that hold it."""
    made, shares = Contents(), Shares()
    for key, part in parts.items():
        if shares.mine(part):
            made.add(key, part)
    for key, thing in objects.items():
        if coordinator:
            made.add_object(key, thing)
    return made


class SavePlanner(DefaultSavePlanner):
    """Writes `Contents`; the state dict that DCP passes is not looked at."""

    def __init__(self, made: Contents):
        super().__init__()
        self.contents = made

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.contents.items, planner_data=self.contents.paths)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.contents.data[index]
