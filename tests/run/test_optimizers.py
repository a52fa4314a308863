"""Optimizers step the parts of parameters, and compute what they compute of DTensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from fxpar.run import optimizers
from tests.processes import launch

OPTIMIZERS = {
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "AdamW, foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "Adam, fused": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.1), fused=True, amsgrad=True),
    "SGD, fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=True),
    "Adagrad, fused": lambda ps: torch.optim.Adagrad(ps, lr=0.1, fused=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=0.1),
}
PLACES = [[Shard(0)], [Replicate()], [Shard(1)]]
"""The first one's parts are not of one size."""


def values() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4), torch.randn(3), torch.randn(4, 2, 2)]


def stepped(name: str, split: bool) -> list[Tensor]:
    """Whole parameters after three steps, of DTensors or of plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(x: Tensor, place: list) -> Tensor:
        return distribute_tensor(x, mesh, place) if split else x

    ps = [torch.nn.Parameter(placed(x, place)) for x, place in zip(values(), PLACES, strict=True)]
    opt = OPTIMIZERS[name](ps)
    for step in range(3):
        for p, place in zip(ps, PLACES, strict=True):
            p.grad = placed(torch.sin((p.full_tensor() if split else p).detach() * (step + 1)), place)
        opt.step()
    return [(p.full_tensor() if split else p).detach() for p in ps]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each step of the parts, from now on."""
    steps: list[int] = []
    work = optimizers._work
    monkeypatch.setattr(optimizers, "_work", lambda *given: (steps.append(1), work(*given))[1])
    return steps


def every_optimizer(rank: int) -> list[str]:
    """Those whose steps went to the parts, and are right."""
    optimizers.watch()
    right = []
    for name in OPTIMIZERS:
        with pytest.MonkeyPatch.context() as patch:
            steps = noted(patch)
            for mine, want in zip(stepped(name, True), stepped(name, False), strict=True):
                torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-6)
            if len(steps) == 3:
                right.append(name)
    return right


@pytest.mark.multiproc
def test_parts_are_stepped_as_dtensors_are():
    assert launch(2, every_optimizer) == [list(OPTIMIZERS)] * 2


def test_what_is_split_otherwise_goes_the_way_of_dtensor(monkeypatch):
    """A gradient that is a term of a sum: DTensor adds the terms up, or refuses. So is what gets another gradient later."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizers.watch()
        steps, mesh = noted(monkeypatch), init_device_mesh("cpu", (1,))
        whole, part, term = (DTensor.from_local(torch.ones(4), mesh, [place]) for place in (Replicate(), Shard(0), Partial()))
        p = torch.nn.Parameter(part)
        optimizer = torch.optim.AdamW([p], lr=0.5, weight_decay=0)
        for grad, many in ((part.clone(), 1), (whole, 1), (part.clone(), 2), (term, 2), (part.clone(), 3)):
            p.grad = grad
            optimizer.step()
            assert len(steps) == many
        torch.testing.assert_close(p.full_tensor(), torch.full((4,), -1.5))
        optimizer.param_groups[0]["lr"] = DTensor.from_local(torch.tensor(0.5), mesh, [Partial()])
        optimizer.step()
        assert len(steps) == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}])
def test_a_backward_over_a_step_is_an_error_as_of_plain_tensors(one_rank, options):
    """A penalty that a program computes of its parameters, whose backward it calls behind the step."""
    optimizers.watch()
    for value in (torch.ones(4), DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])):
        p = torch.nn.Parameter(value)
        penalty, p.grad = (p**3).sum(), value.clone()
        torch.optim.AdamW([p], 0.1, **options).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


def test_an_optimizer_without_a_hash_steps(one_rank):
    class Equal(torch.optim.SGD):
        def __eq__(self, other: object) -> bool:
            return self is other

    optimizers.watch()
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    p.grad = p.detach().clone()
    Equal([p], 0.5).step()
    torch.testing.assert_close(p.full_tensor(), torch.full((4,), 0.5))
