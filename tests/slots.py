"""Slots for tests of copies: on CPUs, in memory that processes share, and of one rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar.backends.transport import copies
from fxpar.backends.transport.copies import GATHERS, SCATTERS, CopyGroup


class SharedSlots:
    """`Slots` in files that every process of a group maps."""

    def __init__(self, folder: str, nbytes: int, group: dist.ProcessGroup | None = None):
        self.group, self.barriers = group, 0
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        names = [str(Path(folder) / f"slot{r}") for r in dist.get_process_group_ranks(group)]
        total = len([*GATHERS, *SCATTERS]) * nbytes
        Path(names[self.rank]).write_bytes(bytes(total))
        dist.barrier(group)
        self.memory = [torch.from_file(name, shared=True, size=total, dtype=torch.uint8).split(nbytes) for name in names]

    def of(self, rank: int, which: int) -> Tensor:
        return self.memory[rank][which]

    def barrier(self) -> None:
        self.barriers += 1
        dist.barrier(self.group)


class Alone:
    """`Slots` of one rank."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.memory = torch.zeros(len([*GATHERS, *SCATTERS]), 4096, dtype=torch.uint8)

    def of(self, rank: int, which: int) -> Tensor:
        return self.memory[which]

    def barrier(self) -> None: ...


def use_files(folder: str) -> list[tuple[int, int]]:
    """Have this process copy through files instead of between GPUs. Returns what was asked to fit into slots, group by group."""
    asked: list[tuple[int, int]] = []

    def in_files(group: dist.ProcessGroup, parameter: int = 0, gradient: int = 0) -> CopyGroup:
        place = Path(folder) / str(len(asked))
        place.mkdir(exist_ok=True)
        asked.append((parameter, gradient))
        return CopyGroup(SharedSlots(str(place), 2**16, group))

    copies.available, copies.on_gpu = (lambda device: True), in_files
    return asked
