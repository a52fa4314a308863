"""symmetric: buffers that all ranks of one host can access, in PyTorch's symmetric memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch


class SymmetricSlots:
    """`fxpar.backends.copies.Slots` in PyTorch's symmetric memory: GPUs of one host, which can access each other's memory.

    Its barrier takes no multiprocessors either: each rank copies a counter to all others, and the stream waits (in the
    hardware's front end) until theirs have arrived. Making it is collective over the group. Raises: RuntimeError, OSError
    where the GPUs cannot.
    """

    def __init__(self, group: Any, sizes: Sequence[int], device: torch.device):
        from torch.distributed import _symmetric_memory as symmetric

        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and not to be had on every host
        nbytes = sum(sizes)
        memory = symmetric.empty(nbytes + 4 * group.size(), dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(memory, group.group_name)
        self.rank, self.size = handle.rank, handle.world_size
        self._slots = [handle.get_buffer(r, (nbytes,), torch.uint8).split(list(sizes)) for r in range(self.size)]
        flags = [handle.get_buffer(r, (self.size,), torch.int32, nbytes // 4) for r in range(self.size)]
        peers = [r for r in range(self.size) if r != self.rank]
        self._to = [flags[r][self.rank : self.rank + 1] for r in peers]
        self._from = [flags[self.rank].data_ptr() + 4 * r for r in peers]
        self._count, self._counter = 0, torch.zeros(1, dtype=torch.int32, device=device)
        driver = ctypes.CDLL("libcuda.so.1")
        self._keep, self._write, self._wait = (memory, handle), driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for operation in (self._write, self._wait):
            operation.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        handle.barrier()
        torch.cuda.synchronize(device)

    def of(self, rank: int, which: int) -> torch.Tensor:
        return self._slots[rank][which]

    def barrier(self) -> None:
        self._count += 1
        stream = torch.cuda.current_stream().cuda_stream
        codes = [self._write(stream, self._counter.data_ptr(), self._count, 0)]
        for flag in self._to:
            flag.copy_(self._counter)
        codes += [self._wait(stream, flag, self._count, 0) for flag in self._from]  # 0: until it is at least the count
        if any(codes):
            raise RuntimeError(f"memory operations of a stream failed with CUDA error {max(codes)}")
