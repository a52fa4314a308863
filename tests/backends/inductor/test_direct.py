"""Gathers, scatters and waits that quick bodies call as functions: what they make is what the operators make."""

from __future__ import annotations

import copy
import gc
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar import compat
from fxpar.backends.inductor import buckets, direct, prefetch
from fxpar.backends.inductor.casts import GATHER_CASTS
from fxpar.backends.transport.copies import CopyGroup
from fxpar.compat import quick
from fxpar.compat.pieces import CodeOfPieces
from tests.processes import launch
from tests.slots import Alone, SharedSlots, use_files

c10d = torch.ops._c10d_functional
SHAPES: list[tuple[int, ...]] = [(6, 5), (300,), (2, 3, 4), (40, 33), (0, 5)]


def place(operator: torch._ops.OpOverload):
    """What one place in the code calls instead of an operator."""
    direct.register()
    return quick._direct[direct._name(operator)]()


def value(rank: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank))


def equal_to_operators(rank: int, folder: str) -> int:
    """Every kind of operator at a place of its own, three times; barriers that the last took."""
    slots, n = SharedSlots(folder, 2**16), dist.get_world_size()
    group = CopyGroup(slots)
    compat.register_group(group, "copies")
    wait, casts = place(direct.WAIT), place(GATHER_CASTS)
    several, one = place(c10d.all_gather_into_tensor_coalesced.default), place(direct.GATHER)
    scatters, scatter = place(c10d.reduce_scatter_tensor_coalesced.default), place(direct.SCATTER)
    for seed in range(3):
        every = [[value(r, s, seed) for s in SHAPES[:4]] for r in range(n)]
        mine, joined = every[rank], [torch.cat([x[i] for x in every]) for i in range(4)]
        before = slots.barriers
        first, both = casts([mine[3], mine[0], 2 * mine[0]], torch.bfloat16, n, "copies", [1, 2])
        alone, many = one(mine[1], n, "copies"), several(mine, n, "copies")
        assert len(direct._under_way) == 7
        assert wait(both) is both and torch.equal(both, torch.cat([joined[0], 2 * joined[0]]).bfloat16())
        assert torch.equal(wait(first), joined[3].bfloat16())
        assert torch.equal(wait(alone), joined[1]) and all(torch.equal(wait(y), x) for y, x in zip(many, joined, strict=True))
        wide = [torch.cat([x] * n) * (rank + 1) for x in mine]
        sums, total = scatters(wide, "sum", n, "copies"), scatter(wide[2], "sum", n, "copies")
        want = [sum(x[i] * (r + 1) for r, x in enumerate(every)) for i in range(4)]
        for y, x in zip([*reversed(sums), total], [*reversed(want), want[2]], strict=True):
            torch.testing.assert_close(wait(y), x)
        direct._finished(False)
    return slots.barriers - before


@pytest.mark.multiproc
@pytest.mark.parametrize("world", [2, 3])
def test_what_is_called_directly_is_what_operators_make(world: int):
    with tempfile.TemporaryDirectory() as folder:
        assert launch(world, equal_to_operators, folder) == [5] * world


def by_the_operator(rank: int) -> bool:
    """On a group that copies nothing the operators run, and what they started is waited for."""
    name, x = dist.group.WORLD.group_name, torch.full((3,), float(rank))
    wait = place(direct.WAIT)
    gathered = wait(place(direct.GATHER)(x, 2, name))
    (both,) = place(c10d.all_gather_into_tensor_coalesced.default)([x], 2, name)
    assert not direct._under_way
    return torch.equal(gathered, torch.tensor([0.0, 0, 0, 1, 1, 1])) and torch.equal(wait(both), gathered)


@pytest.mark.multiproc
def test_other_groups_run_the_operators():
    assert launch(2, by_the_operator) == [True, True]


def test_what_is_not_waited_for_is_an_error():
    group = CopyGroup(Alone())
    compat.register_group(group, "unwaited")
    try:
        start = place(direct.GATHER)
        start(torch.ones(3), 1, "unwaited")
        direct._finished(failed=True)  # whatever broke off is told elsewhere
        assert not direct._under_way
        start(torch.ones(3), 1, "unwaited")
        with pytest.raises(AssertionError, match="1 results of gathers or scatters were not waited for"):
            direct._finished(failed=False)
        assert not direct._under_way
    finally:
        compat.unregister_group("unwaited")


class Deep(nn.Module):
    """Equal blocks, as many as are compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.layer_norm(x + block(x), [16])
        return (x * torch.arange(16)).square().mean()


def several_steps(rank: int, folder: str) -> tuple[float, float, int, list[bool]]:
    """How far losses, and gradients, of four steps are from eager's, how many buckets were started directly, and which codes are
    quick in the end. Parameters move to other memory in between."""
    use_files(folder)
    buckets.BLOCK_BYTES, prefetch.FIRST_BYTES, prefetch.SMALL_BYTES = 1024, 1024, 16
    torch.manual_seed(0)
    model, batch = Deep(), torch.randn(8, 16)
    alone, started = copy.deepcopy(model), []
    module = fxpar.parallelize(model, "dp=2,zero=3", {"x": batch[:4]}, backend="inductor")
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, alone)]
    kept = direct.Bucket.__init__

    def counted(self, work) -> None:
        kept(self, work)
        started.append(work)

    direct.Bucket.__init__ = counted
    far: list[float] = []
    apart: list[float] = []
    for step in range(4):
        losses = module(x=batch[4 * rank : 4 * rank + 4]), alone(batch)
        for loss in losses:
            loss.backward()
        grads = [(p.grad.full_tensor(), q.grad) for p, q in zip(module.parameters(), alone.parameters(), strict=True)]
        far.append(abs(losses[0].item() / losses[1].item() - 1))
        apart += [((a - b).norm() / b.norm()).item() for a, b in grads]
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step == 1:
            with torch.no_grad():
                for p in module.parameters():
                    p.data = p.data.clone()
    quickly = [False in code._quick for code in gc.get_objects() if isinstance(code, CodeOfPieces)]
    return max(far), max(apart), len(started), quickly


@pytest.mark.slow
@pytest.mark.multiproc
def test_quick_code_computes_what_one_device_does():
    with tempfile.TemporaryDirectory() as folder:
        for far, apart, started, quickly in launch(2, several_steps, folder, timeout=300):
            assert far < 1e-6 and apart < 1e-5 and quickly == [True, True]
            assert started >= 3 * 3 * 12  # in three steps, for each block two gathers and a scatter
