"""symmetric: buffers that all ranks of one host can access, in PyTorch's symmetric memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch


class SymmetricSlots:
    """The `Slots` of `fxpar.backends.transport.copies` in PyTorch's symmetric memory: GPUs of one host, which can access each
    other's memory.

    Its barrier is a kernel of one block. Making it is collective over the group. Raises: RuntimeError where the GPUs cannot.
    """

    def __init__(self, group: Any, sizes: Sequence[int], device: torch.device):
        from torch.distributed import _symmetric_memory as symmetric

        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and not to be had on every host
        nbytes = sum(sizes)
        memory = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(memory, group.group_name)
        self._memory = memory  # is there as long as this is
        self.rank, self.size = self._handle.rank, self._handle.world_size
        self._slots = [self._handle.get_buffer(r, (nbytes,), torch.uint8).split(list(sizes)) for r in range(self.size)]

    def of(self, rank: int, which: int) -> torch.Tensor:
        return self._slots[rank][which]

    def barrier(self) -> None:
        self._handle.barrier()
