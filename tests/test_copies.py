"""Gathers and scatters by copies: on CPUs, through memory that processes share."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpar
from fxpar import compat
from fxpar.backends import copies
from fxpar.backends.copies import ALIGNED, CopyGroup, rounds
from tests.processes import launch

c10d = torch.ops._c10d_functional


class SharedSlots:
    """`Slots` in files that every process of a group maps."""

    def __init__(self, folder: str, nbytes: int, group: dist.ProcessGroup | None = None):
        self.group, self.nbytes = group, nbytes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        names = [str(Path(folder) / f"slot{r}") for r in dist.get_process_group_ranks(group)]
        Path(names[self.rank]).write_bytes(bytes(2 * nbytes))
        dist.barrier(group)
        self.memory = [torch.from_file(name, shared=True, size=2 * nbytes, dtype=torch.uint8) for name in names]

    def of(self, rank: int, which: int) -> Tensor:
        return self.memory[rank][which * self.nbytes : (which + 1) * self.nbytes]

    def barrier(self) -> None:
        dist.barrier(self.group)


class Alone:
    """`Slots` of one rank."""

    rank, size, nbytes = 0, 1, 4096

    def __init__(self) -> None:
        self.memory = torch.zeros(2, self.nbytes, dtype=torch.uint8)

    def of(self, rank: int, which: int) -> Tensor:
        return self.memory[which]

    def barrier(self) -> None: ...


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


class Net(nn.Module):
    """Nine classes: two ranks cannot share the last bias, so its gradient is summed whole, over the same group."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 9)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.down(F.gelu(self.up(x))), target)


def one_after_another(rank: int, folder: str, plans: list[str]) -> list[tuple[list[str], list[float]]]:
    """A step under each plan: what moves parameters and gradients, and how far loss and gradients are from eager's."""
    found = []
    torch.manual_seed(0)
    model, batch = Net(), {"x": torch.randn(4, 8), "target": torch.randint(9, (4,))}
    want = model(**batch)
    want.backward()
    for i, plan in enumerate(plans):
        example = {k: v.chunk(fxpar.Plan.parse(plan).dp)[0] for k, v in batch.items()}
        module = fxpar.parallelize(copy.deepcopy(model), plan, example, backend="inductor")
        mine = {k: v.chunk(module.plan.dp)[module.replica] for k, v in batch.items()}
        slots = Path(folder) / str(i)
        slots.mkdir(exist_ok=True)
        if stored := module._bound.mesh.strategies.get("zero", ()):
            assert module._runtime.copy_engines(
                stored, module._control, lambda group, slots=slots: CopyGroup(SharedSlots(str(slots), 2**16, group)))
        loss = module(**mine)
        loss.backward()
        grads = {n: p.grad.full_tensor() for n, p in module.named_parameters()}
        far = [abs(loss.item() - want.item()), *((grads[n] - p.grad).norm().item() for n, p in model.named_parameters())]
        found.append((list(module._runtime.bulk.values()), far))
    assert all(group._seen for _, group, _ in copies._made.values())  # they were used
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize("world, plans, made", [
    (2, ["dp=2,zero=3", "dp=2", "dp=2,zero=2"], 1),
    pytest.param(4, ["dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=3", "dp=4,zero=1"], 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_modules_on_one_group_share_what_copies(world, plans, made):
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(world, one_after_another, folder, plans, timeout=500):
            assert [len(names) for names, _ in found] == ["zero" in plan for plan in plans]
            assert len({name for names, _ in found for name in names}) == made
            assert max(max(far) for _, far in found) < 1e-6


def test_a_group_that_was_made_again_has_copies_of_its_own(monkeypatch):
    monkeypatch.setattr(copies, "_made", {})
    names = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
        assert copies.known(group) is None
        names.append(copies.register(group, CopyGroup(Alone())))
        assert copies.known(group) == names[-1]
        dist.destroy_process_group()
    assert len(set(names)) == 2


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
