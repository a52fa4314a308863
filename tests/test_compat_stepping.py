"""compat/stepping.py: what optimizers of torch.optim hand over, and which of it goes together."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from fxpar import compat
from fxpar.compat import stepping

OPTIMIZERS = {
    "adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad, "adam": torch.optim.AdamW, "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD, "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop, "sgd": torch.optim.SGD,
}  # fmt: skip


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def handed(monkeypatch):
    """What is handed over from now on, as (function, lists, options); its parts are stepped."""
    for name in stepping.NAMES:
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, name, getattr(module, name))  # restored behind the test
    found: list[tuple] = []

    def stepper(function, lists, options):
        found.append((function, [[*x] for x in lists], options))
        function(*map(compat.local_parts, lists), **options)

    compat.step_elements_by(stepper)
    return found


def parameter(x: Tensor, gradient: Tensor) -> torch.nn.Parameter:
    p = torch.nn.Parameter(x)
    p.grad = gradient
    return p


@pytest.mark.parametrize("name", stepping.NAMES)
def test_every_optimizer_hands_over(name, mesh, handed):
    x, grad = (DTensor.from_local(torch.full((4,), value), mesh, [Replicate()]) for value in (1.0, 0.5))
    p, plain = parameter(x, grad), parameter(torch.ones(4), torch.ones(4))
    for _ in range(2):
        OPTIMIZERS[name]([plain], lr=0.1).step()
    assert not handed, "of DTensors alone"
    optimizer = OPTIMIZERS[name]([p], lr=0.1)
    before = x.to_local().clone()
    optimizer.step()
    function, lists, options = handed[-1]
    assert function.__name__ == name and lists[0][0] is p and lists[1][0] is p.grad
    assert "lr" in options or name == "rprop"
    assert ("capturable" in options) == (name not in ("sgd", "adagrad"))
    assert not torch.equal(p.to_local(), before)


def test_what_autograd_or_a_compiler_looks_into_is_not_handed_over(mesh, handed, monkeypatch):
    p = parameter(DTensor.from_local(torch.ones(4), mesh, [Shard(0)]), DTensor.from_local(torch.ones(4), mesh, [Shard(0)]))
    torch.optim.SGD([p], lr=0.1, differentiable=False).step()
    assert len(handed) == 1
    optimizer = torch.optim.AdamW([p], lr=0.1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    assert len(handed) == 1
    function = stepping._handing_over(lambda *lists, differentiable: None, lambda *_: 1 / 0)
    function([p], [p.grad], differentiable=True)


def test_parts(mesh):
    x = torch.ones(4)
    whole, part, term = (DTensor.from_local(x, mesh, [place]) for place in (Replicate(), Shard(0), Partial()))
    parts = compat.local_parts([part, x])
    assert parts[0] is part._local_tensor and parts[1] is x
    assert compat.splits([part]) == compat.splits([DTensor.from_local(x.clone(), mesh, [Shard(0)])]) != compat.splits([whole])
    assert compat.splits([x, None]) == [Tensor, type(None)]
    assert compat.has_parts(whole) and compat.has_parts(part) and not compat.has_parts(term) and not compat.has_parts(x)
    assert compat.goes_with([part, torch.ones(())], [part, part]) and not compat.goes_with([whole], [part])
    assert not compat.goes_with([x], [part]) and not compat.goes_with([part], [part, part])
    assert compat.goes_with([None], [part])
