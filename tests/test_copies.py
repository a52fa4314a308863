"""Gathers and scatters by copies: on CPUs, through memory that processes share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpar import compat
from fxpar.backends.copies import ALIGNED, CopyGroup, rounds
from tests.processes import launch

c10d = torch.ops._c10d_functional


class SharedSlots:
    """`Slots` in files that every process maps."""

    def __init__(self, folder: str, nbytes: int):
        self.rank, self.size, self.nbytes = dist.get_rank(), dist.get_world_size(), nbytes
        names = [str(Path(folder) / f"slot{r}") for r in range(self.size)]
        Path(names[self.rank]).write_bytes(bytes(2 * nbytes))
        dist.barrier()
        self.memory = [torch.from_file(name, shared=True, size=2 * nbytes, dtype=torch.uint8) for name in names]

    def of(self, rank: int, which: int) -> Tensor:
        return self.memory[rank][which * self.nbytes : (which + 1) * self.nbytes]

    def barrier(self) -> None:
        dist.barrier()


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


SHAPES: list[tuple[int, ...]] = [(6, 5), (300,), (1, 1), (40, 33), (2, 3, 4)]


def exchange(rank: int, folder: str, nbytes: int) -> int:
    """Several operations after one another, each checked; how many rounds they took."""
    group = CopyGroup(SharedSlots(folder, nbytes))
    compat.register_group(group, "copies")
    n, turns = dist.get_world_size(), 0
    for seed, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.float32]):
        every = [[value(r, s, dtype, seed) for s in SHAPES] for r in range(n)]
        gathered = c10d.all_gather_into_tensor_coalesced(every[rank], n, "copies")
        for i, y in enumerate(gathered):
            assert torch.equal(c10d.wait_tensor(y), torch.cat([x[i] for x in every]))
        wide = [[torch.cat([x] * n) * (r + 1) for x in xs] for r, xs in enumerate(every)]
        scattered = c10d.reduce_scatter_tensor_coalesced(wide[rank], "sum", n, "copies")
        for i, y in enumerate(scattered):
            want = sum(x[i].double().chunk(n)[rank] for x in wide)
            torch.testing.assert_close(c10d.wait_tensor(y).double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6,
                                       atol=1e-6 if dtype != torch.bfloat16 else 1e-1)
        turned = every[rank][3].t()
        assert torch.equal(c10d.wait_tensor(c10d.all_gather_into_tensor(turned, n, "copies")),
                           torch.cat([x[3].t() for x in every]))
        turns += len(rounds(tuple((x.numel(), x.dtype) for x in every[rank]), nbytes))
    return turns


@pytest.mark.multiproc
@pytest.mark.parametrize("world, nbytes", [(2, 4096), (3, 4608), (2, 2**20)])
def test_results_are_those_of_the_collectives(world: int, nbytes: int):
    with tempfile.TemporaryDirectory() as folder:
        turns = launch(world, exchange, folder, nbytes)
        assert os.listdir(folder)
    assert len(set(turns)) == 1 and (turns[0] > 4) == (nbytes < 2**20)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 900), st.sampled_from([1, 2, 4, 8])), max_size=6), st.integers(1, 8))
def test_rounds_cut_every_element_once_and_fit(sizes: list[tuple[int, int]], blocks: int):
    kinds = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    tensors = tuple((n, kinds[w]) for n, w in sizes)
    seen: dict[int, list[int]] = {i: [] for i in range(len(tensors))}
    for parts in rounds(tensors, blocks * ALIGNED):
        end = 0
        for part in parts:
            assert part.at >= end and part.at % ALIGNED == 0 and part.begin < part.stop
            end = part.at + (part.stop - part.begin) * part.dtype.itemsize
            seen[part.tensor] += range(part.begin, part.stop)
        assert 0 < end <= blocks * ALIGNED
    assert all(seen[i] == list(range(n)) for i, (n, _) in enumerate(tensors))
