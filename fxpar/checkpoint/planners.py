"""What `torch.distributed.checkpoint` is told to write and to read: rectangles, not placements."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from fxpar.checkpoint.part import Part, Shares
from fxpar.checkpoint.ranks import to_cpu
from fxpar.sharding import chunks
from fxpar.sharding.chunks import Chunk

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


class LoadPlanner(DefaultLoadPlanner):
    """Reads into `parts`, by name in the file, and into `objects` what is no tensor and named there.

    Every saved rectangle that this rank needs something of is read once, however many pieces of it are needed.
    """

    def __init__(self, parts: dict[str, Part], objects: Iterable[str] = ()):
        super().__init__()
        self.parts = parts
        self.objects: dict[str, Any] = dict.fromkeys(objects)
        self._needed: dict[MetadataIndex, list[Chunk]] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name in self.objects:
            assert isinstance(self.metadata.state_dict_metadata[name], BytesStorageMetadata)
            index, nothing = MetadataIndex(name), torch.Size((0,))
            items.append(ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing))
        for name, part in self.parts.items():
            for saved in self.metadata.state_dict_metadata[name].chunks:
                items += self._reads(name, part, saved)
        return LoadPlan(items)

    def _reads(self, name: str, part: Part, saved: ChunkStorageMetadata) -> list[ReadItem]:
        start, size = tuple(saved.offsets), tuple(saved.sizes)
        needed = list(chunks.chunks(chunks.within(part.runs, start, size)))
        if not needed:
            return []
        index = MetadataIndex(name, saved.offsets)
        self._needed[index] = needed
        target = offset = tuple(0 for _ in size)
        if len(needed) == 1:  # read to where it belongs; else the whole rectangle, to be cut up
            (only,) = needed
            target, size = only.local, only.size
            offset = tuple(s - o for s, o in zip(only.start, start, strict=True))
        return [ReadItem(LoadItemType.TENSOR, index, torch.Size(target), index, torch.Size(offset), torch.Size(size))]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = torch.load(value, weights_only=False)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part, needed = self.parts[read_item.dest_index.fqn], self._needed[read_item.dest_index]
        if len(needed) == 1:
            return needed[0].of_part(part.local)
        return torch.empty(read_item.lengths, dtype=part.local.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        part, needed = self.parts[read_item.dest_index.fqn], self._needed[read_item.dest_index]
        if len(needed) > 1:
            origin = tuple(read_item.storage_index.offset or ())
            for chunk in needed:
                chunk.of_part(part.local).copy_(chunk.of_full(tensor, origin))
