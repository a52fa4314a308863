"""Gathers and scatters by copies: on CPUs, through memory that processes share."""

from __future__ import annotations

import copy
import ctypes
import os
import tempfile
from collections import deque
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpar
from fxpar import compat
from fxpar.backends.inductor import casts
from fxpar.backends.transport import addresses, copies
from fxpar.backends.transport.addresses import ALIGNED, rounds
from fxpar.backends.transport.base import BUCKET_BYTES, REDUCTION_BYTES
from fxpar.backends.transport.copies import SCATTERS, CopyGroup, slot_sizes
from fxpar.ops import table
from fxpar.ops.elementwise import Launch
from fxpar.ops.parts import GATHER_PARTS, arrivals, shift_splits
from tests.processes import launch
from tests.slots import Alone, SharedSlots, use_files

c10d = torch.ops._c10d_functional


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


SHAPES: list[tuple[int, ...]] = [(6, 5), (300,), (1, 1), (40, 33), (2, 3, 4)]


def tensor_at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


class Interpreted(Launch):
    """A kernel over a table, done on the CPU: by the addresses that a GPU would be told."""

    started = 0

    def __call__(self) -> None:
        read, written = self.dtypes * (2 if self.kind == "add" else 1)
        Interpreted.started += 1
        for count, first, *others in self.rows.tolist():
            if self.kind == "spread":
                for place in others:
                    tensor_at(place, count, written).copy_(tensor_at(first, count, read))
            else:
                torch.add(*(tensor_at(place, count, read) for place in others), out=tensor_at(first, count, read))


def launch_as_on_gpu() -> None:
    """Have this process go by tables and kernels as on GPUs."""

    def table_at(columns: list[list[table.Place]], device: torch.device) -> Tensor | None:
        fit = all(len({place[2] for place in column}) == 1 and all(map(table._fits, column)) for column in columns)
        return table.rows(columns, device) if fit else None

    addresses.Launch, addresses.table_at = Interpreted, table_at


def exchange(rank: int, folder: str, nbytes: int, as_on_gpu: bool) -> int:
    """Several operations after one another, each checked; how many rounds they took."""
    if as_on_gpu:
        launch_as_on_gpu()
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
        full = every[0][0].new_empty(n, *SHAPES[3])
        works = group.gather_parts(full.unbind(), every[rank][3])
        for peer, work in zip(arrivals(rank, n), works, strict=True):
            work.wait()
            assert torch.equal(full[peer], every[peer][3]) and torch.equal(full[rank], every[rank][3])
        for distance in range(1, n):
            received, sent = shift_splits(rank, n, distance, SHAPES[3][0])
            made = c10d.all_to_all_single(every[rank][3], received, sent, "copies")
            assert torch.equal(c10d.wait_tensor(made), every[(rank + distance) % n][3])
        with pytest.raises(ValueError, match="from one rank to one other"):
            group.alltoall_base(made, made, [1] * n, [1] * n)
        turned, full = every[rank][3].t(), torch.cat([x[3].t() for x in every])
        made = torch.empty_like(full)
        group.allgather_into_tensor_coalesced([made], [turned]).wait()
        assert torch.equal(made, full)
        turns += len(rounds(tuple((x.numel(), x.dtype) for x in every[rank]), nbytes))
    assert (Interpreted.started > 0) == as_on_gpu or turns > 4
    return turns


@pytest.mark.multiproc
@pytest.mark.parametrize("world, nbytes, as_on_gpu", [(2, 4096, False), (3, 4608, True), (2, 2**20, False), (3, 2**20, True)])
def test_results_are_those_of_the_collectives(world: int, nbytes: int, as_on_gpu: bool):
    with tempfile.TemporaryDirectory() as folder:
        turns = launch(world, exchange, folder, nbytes, as_on_gpu)
        assert os.listdir(folder)
    assert len(set(turns)) == 1 and (turns[0] > 4) == (nbytes < 2**20)


class _All:
    """Several things to wait for."""

    def __init__(self, works: list[dist.Work]):
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def in_any_order(rank: int, folder: str, nbytes: int, seeds: list[int]) -> list[tuple[int, int]]:
    """Programs of random operations, some waited for late and in another order; how many operations and barriers each had. Every
    other one goes by tables and kernels as on GPUs."""
    n, counts = dist.get_world_size(), []
    as_it_is = addresses.Launch, addresses.table_at
    for seed in seeds:
        addresses.Launch, addresses.table_at = as_it_is
        if seed % 2:
            launch_as_on_gpu()
        place = Path(folder) / f"{nbytes}-{seed}"
        place.mkdir(exist_ok=True)
        slots = SharedSlots(str(place), nbytes)
        group, random, open_, operations = CopyGroup(slots), Random(seed), [], 0
        for turn in range(30):
            if open_ and random.random() < 0.5:
                work, got, want = open_.pop(random.randrange(len(open_)))
                work.wait()
                for y, z in zip(got, want, strict=True):
                    torch.testing.assert_close(y, z)
                continue
            shapes = random.sample(SHAPES, random.randint(1, 4))
            every = [[value(r, s, torch.float32, 1000 * seed + turn) for s in shapes] for r in range(n)]
            operations += 1
            kind, to = random.random(), (rank + 1) % n
            if kind < 0.2:
                x = every[rank][0]
                got, want = [torch.empty_like(x)], [every[(rank - 1) % n][0]]
                rows = x.shape[0]
                sizes = [[rows * (r == peer) for r in range(n)] for peer in ((rank - 1) % n, to)]
                work = group.alltoall_base(got[0], x, *sizes)
            elif kind < 0.4:
                full = torch.empty(n, *shapes[0])
                got, want = [full], [torch.stack([x[0] for x in every])]
                work = _All(group.gather_parts(full.unbind(), every[rank][0]))
            elif kind < 0.7:
                dtype = random.choice([torch.float32, torch.bfloat16])
                got = [torch.empty(n * s[0], *s[1:], dtype=dtype) for s in shapes]
                want = [torch.cat([x[i] for x in every]).to(dtype) for i in range(len(shapes))]
                work = group.allgather_into_tensor_coalesced(got, every[rank])
            else:
                got = [torch.empty(s) for s in shapes]
                want = [sum(x[i] * (r + rank) for r, x in enumerate(every)) for i in range(len(shapes))]
                mine = [torch.cat([x * (rank + to) for to in range(n)]) for x in every[rank]]
                work = group.reduce_scatter_tensor_coalesced(got, mine)
            open_.append((work, got, want))
        for work, *_ in open_:
            work.wait()
        counts.append((operations, slots.barriers))
    return counts


@pytest.mark.multiproc
@pytest.mark.parametrize("world", [2, 3])
def test_slots_are_not_written_before_they_were_read(world: int):
    """The operands are one after the other; the ranks' files are the slots: what is read too late is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = list(range(12))
        large, small = (launch(world, in_any_order, folder, nbytes, seeds) for nbytes in (2**16, 4096))
    assert all(counts == large[0] for counts in large) and all(counts == small[0] for counts in small)
    assert any(barriers > operations for operations, barriers in large[0])  # late ones were finished, with a barrier more
    assert sum(b for _, b in small[0]) > sum(b for _, b in large[0])


def in_turn(rank: int, folder: str) -> int:
    """Barriers of the order of a training step: what was gathered is used at once, sums are waited for two operations later."""
    slots = SharedSlots(folder, 2**16)
    group, open_ = CopyGroup(slots), deque()
    for _ in range(20):
        group.allgather_into_tensor_coalesced([torch.empty(dist.get_world_size() * 9)], [torch.ones(9)]).wait()
        if len(open_) == 2:
            open_.popleft().wait()
        open_.append(group.reduce_scatter_tensor_coalesced([torch.empty(3)], [torch.ones(3 * dist.get_world_size())]))
    return slots.barriers


@pytest.mark.multiproc
def test_an_operation_takes_one_barrier():
    with tempfile.TemporaryDirectory() as folder:
        assert launch(2, in_turn, folder) == [40, 40]


def test_parts_are_gathered_by_what_copies():
    """The operator finds the group by its name, and has it gather in its own way."""
    group, x = CopyGroup(Alone()), torch.randn(3, 4)
    compat.register_group(group, "in parts")
    try:
        assert torch.equal(GATHER_PARTS(x, 1, "in parts"), x) and group._seen
    finally:
        compat.unregister_group("in parts")


def test_a_gather_casts_and_concatenates():
    group = CopyGroup(Alone())
    compat.register_group(group, "casting")
    x = torch.randn(5, 3)
    one, both = casts.GATHER_CASTS([x, x, 2 * x], torch.bfloat16, 1, "casting", [1, 2])
    assert torch.equal(c10d.wait_tensor(one), x.bfloat16())
    assert torch.equal(c10d.wait_tensor(both), torch.cat([x, 2 * x]).bfloat16())


def test_what_is_recorded_shares_no_table(monkeypatch):
    """Nothing but the recording keeps its tables, and it keeps no other."""
    group, x, made = CopyGroup(Alone()), torch.randn(8), []
    monkeypatch.setattr(addresses, "Launch", Interpreted)
    monkeypatch.setattr(addresses, "table_at", lambda columns, device: made.append(table.rows(columns, device)) or made[-1])
    full = torch.empty(8)

    def operate() -> int:
        group.allgather_into_tensor_coalesced([full], [x]).wait()
        group._turn = dict.fromkeys(group._turn, 0)
        assert torch.equal(full, x)
        return len(made)

    assert [operate(), operate()] == [1, 1]
    monkeypatch.setattr(copies, "are_for_a_recording", lambda: True)
    assert [operate(), operate()] == [2, 3]
    monkeypatch.setattr(copies, "are_for_a_recording", lambda: False)
    assert operate() == 3


def anew(rank: int, folder: str) -> tuple[list[Tensor], int]:
    """What is gathered and summed where copies begin anew in between, once without what was started before; and how many barriers
    that takes."""
    slots = SharedSlots(folder, 4096)
    group = CopyGroup(slots)
    found = []
    for step in range(4):
        full, part = torch.empty(6), torch.empty(3)
        gathered = group.allgather_into_tensor_coalesced([full], [torch.full((3,), 10.0 * step + rank)])
        scattered = group.reduce_scatter_tensor_coalesced([part], [torch.arange(6.0) * (rank + 1)])
        if step != 1:
            gathered.wait()
            scattered.wait()
            found += [full, part]
        before = slots.barriers
        group.anew(broken=step == 1)
    return found, slots.barriers - before


@pytest.mark.multiproc
def test_copies_begin_anew():
    with tempfile.TemporaryDirectory() as folder:
        made = launch(2, anew, folder)
    for rank, (found, barriers) in enumerate(made):
        want = [x for s in (0, 2, 3) for x in (torch.tensor([10.0 * s] * 3 + [10.0 * s + 1] * 3),
                                               3 * torch.arange(6.0)[3 * rank :][:3])]
        assert barriers == 1 and len(found) == len(want) and all(map(torch.equal, found, want))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_bucket_fits_into_a_slot(ranks: int):
    """Of parameters and gradients that all ranks share evenly, 40 in a bucket."""
    parameters = tuple((BUCKET_BYTES // 40 // ranks // 2, torch.bfloat16) for _ in range(40))
    gradients = tuple((REDUCTION_BYTES // 40 // ranks // 4, torch.float32) for _ in range(40))
    sizes = slot_sizes(ranks)
    large = slot_sizes(ranks, 2 * BUCKET_BYTES, 3 * REDUCTION_BYTES)
    assert len(rounds(((2 * BUCKET_BYTES // ranks // 2, torch.bfloat16),), large[0])) == 1
    assert len(rounds(((3 * REDUCTION_BYTES // ranks // 4, torch.float32),), large[SCATTERS[0]] // (ranks - 1))) == 1
    assert len(rounds(parameters, sizes[0])) == 1
    assert len(rounds(gradients, sizes[SCATTERS[0]] // (ranks - 1) // ALIGNED * ALIGNED)) == 1


class Net(nn.Module):
    """Nine classes: two ranks cannot share the last bias, so its gradient is summed without scattering, over the same group."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 9)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.down(F.gelu(self.up(x))), target)


def one_after_another(rank: int, folder: str, plans: list[str]) -> list[tuple[list[str], list[float]]]:
    """A step under each plan: what moves parameters and gradients, and how far loss and gradients are from eager's."""
    found, asked = [], use_files(folder)
    torch.manual_seed(0)
    model, batch = Net(), {"x": torch.randn(4, 8), "target": torch.randint(9, (4,))}
    want = model(**batch)
    want.backward()
    for plan in plans:
        example = {k: v.chunk(fxpar.Plan.parse(plan).dp)[0] for k, v in batch.items()}
        module = fxpar.parallelize(copy.deepcopy(model), plan, example, backend="inductor")
        mine = {k: v.chunk(module.plan.dp)[module.replica] for k, v in batch.items()}
        loss = module(**mine)
        loss.backward()
        grads = {n: p.grad.full_tensor() for n, p in module.named_parameters()}
        far = [abs(loss.item() - want.item()), *((grads[n] - p.grad).norm().item() for n, p in model.named_parameters())]
        found.append((list(module.parameter_store.runtime.transport.copy_groups.values()), far))
    assert all(group._seen for _, group, _ in copies._made.values())  # they were used
    assert len(asked) == len(copies._made) and all(gradient >= 4 * 32 * 8 // 2 for _, gradient in asked)
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize("world, plans, made", [
    pytest.param(2, ["dp=2,zero=3", "dp=2", "dp=2,zero=2"], 1, marks=pytest.mark.slow),
    pytest.param(4, ["dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=3", "dp=4,zero=1"], 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_modules_on_one_group_share_what_copies(world, plans, made):
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(world, one_after_another, folder, plans, timeout=500):
            assert [len(names) for names, _ in found] == ["zero" in plan for plan in plans]
            assert len({name for names, _ in found for name in names}) == made
            assert max(max(far) for _, far in found) < 1e-6


class Attention(nn.Module):
    """With enough rows that the gradients of the projections are joined, and what is gathered for them concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, n, bias=False) for n in (32, 16, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.o(x))
        q, k, v = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q.sin(), k.cos(), v, is_causal=True, enable_gqa=True)
        return (x + y.transpose(1, 2).flatten(2)).square().mean()


def with_and_without(rank: int, folder: str) -> tuple[list[list[Tensor]], list[int]]:
    """Gradients of a step in bfloat16 by collectives, and by copies; how many results each gather of the latter has."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 64, 32)
    found, counts, gathered = [], [], casts._gathered

    def seen(tensors: list[Tensor], dtype: torch.dtype, size: int, count: list[int]) -> list[Tensor]:
        counts.append(len(count))
        return gathered(tensors, dtype, size, count)

    for by_copies in (False, True):
        if by_copies:
            asked, casts._gathered = use_files(folder), seen
        plan = "dp=2,zero=3,param_dtype=bf16,reduce_dtype=fp32"
        module = fxpar.parallelize(copy.deepcopy(model), plan, {"x": x[:2]}, backend="inductor")
        module(x=x[2 * rank : 2 * rank + 2]).backward()
        found.append([p.grad.full_tensor() for p in module.parameters()])
    assert asked == [(2 * 32 * 32, 4 * 32 * 32)]  # the largest parameter, unsharded
    return found, counts


@pytest.mark.multiproc
def test_copies_compute_what_collectives_do():
    with tempfile.TemporaryDirectory() as folder:
        for (by_collectives, by_copies), counts in launch(2, with_and_without, folder, timeout=300):
            for a, b in zip(by_collectives, by_copies, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * a.abs().max().item())
            assert counts[-1] < 4 == counts[0]  # of four parameters, three into one in the backward pass


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
