"""`compat.step_parts_directly`: fused steps of DTensors are those of the ranks' parts, where these are split alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from fxpar import compat
from fxpar.compat import fused
from tests.processes import launch

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.1), fused=True, amsgrad=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, fused=True),
}


def values() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4), torch.randn(3), torch.randn(4, 2, 2)]


PLACES = [[Shard(0)], [Replicate()], [Shard(1)]]
"""The first one's parts are not of one size."""


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


def every_optimizer(rank: int) -> list[str]:
    """Those whose steps went to the parts, and are right."""
    ways: list[str] = []
    parts = fused._parts

    def noted(given):
        ways.append(name)
        return parts(given)

    fused._parts = noted
    compat.step_parts_directly()
    for name in OPTIMIZERS:
        for mine, want in zip(stepped(name, True), stepped(name, False), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-6)
    return list(dict.fromkeys(ways))


@pytest.mark.multiproc
def test_parts_are_stepped_as_dtensors_are():
    assert launch(2, every_optimizer) == [list(OPTIMIZERS)] * 2


def test_what_is_split_otherwise_goes_the_way_of_dtensor(monkeypatch):
    """A gradient that is a term of a sum: DTensor adds the terms up, or refuses."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compat.step_parts_directly()
        mesh, x = init_device_mesh("cpu", (1,)), torch.ones(4)
        whole, part, term = (DTensor.from_local(x.clone(), mesh, [place]) for place in (Replicate(), Shard(0), Partial()))
        assert fused._goes_with([part, torch.ones(())], [part, part]) and not fused._goes_with([whole], [part])
        assert not fused._goes_with([x], [part]) and not fused._goes_with([part], [part, part])
        assert fused._is_split(whole) and not fused._is_split(term) and not fused._is_split(x)
        kinds = []

        def operator(params: list[Tensor], scale: Tensor) -> None:
            kinds.append((type(params[0]), type(scale)))

        scale, total = (DTensor.from_local(torch.ones(()), mesh, [place]) for place in (Replicate(), Partial()))
        monkeypatch.setattr(fused, "_handlers", lambda made={operator: fused._on_parts}: made)
        for number in (scale, total):
            fused._on_parts(operator, ([part],), {"scale": number})
        assert kinds == [(Tensor, Tensor), (DTensor, DTensor)]
        monkeypatch.undo()
        monkeypatch.setattr(fused, "_parts", lambda given: 1 / 0)
        before = dict(fused._handlers())
        p = torch.nn.Parameter(part)
        p.grad = whole
        torch.optim.AdamW([p], lr=0.5, fused=True, weight_decay=0).step()
        torch.testing.assert_close(p.full_tensor(), torch.full((4,), 0.5))
        assert fused._handlers() == before
    finally:
        dist.destroy_process_group()
