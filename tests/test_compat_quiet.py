"""compat: what PyTorch does beside what it is asked to do, left out for a while."""

from __future__ import annotations

import contextlib
import importlib
import logging

import pytest
import torch
from torch import nn

from fxpar import compat


def test_classes_derived_from_tensor_do_not_see_functions_for_a_while():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Watching)
    x + x
    count = len(seen)
    with compat.no_torch_function():
        x + x
    assert count > 0 and len(seen) == count


def test_code_of_graphs_is_generated_when_they_are_called(monkeypatch):
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().max()
            return x / scale

    generated = []
    original = torch.fx.Graph.python_code
    monkeypatch.setattr(torch.fx.Graph, "python_code", lambda *args, **more: generated.append(1) or original(*args, **more))
    x, counts = torch.randn(3), []
    for around in (contextlib.nullcontext, compat.code_when_called):
        generated.clear()
        with around():
            exported = torch.export.export(Net(), (x,))
        counts.append(len(generated))
        torch.testing.assert_close(exported.module()(x), Net()(x))
    assert counts[1] < counts[0]


def test_what_fails_on_fake_tensors_is_not_logged_for_a_while(caplog):
    mode = compat.FakeTensorMode()
    x, y = (compat.fake_like(mode, torch.ones(n), torch.device("cpu")) for n in (2, 3))

    def fail():
        with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError), mode:
            torch.add(x, y)
        return [r for r in caplog.records if r.name == "torch._subclasses.fake_tensor"]

    with compat.quiet_traces():
        assert fail() == []
        assert logging.getLogger("torch._subclasses.fake_tensor").disabled
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_modules_that_make_models_parallel_are_where_they_are_said_to_be():
    for name, function in zip(compat.WRAPPERS, ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel",
                                                "fully_shard", "contract", "distribute_module"), strict=True):
        assert hasattr(importlib.import_module(name), function)


def test_distributions_are_unchecked_for_a_while(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for a process

    def make():
        return torch.distributions.Normal(torch.zeros(2), -torch.ones(2))

    with compat.unchecked_distributions():
        assert make().stddev.sum() == -2
    with pytest.raises(ValueError, match="scale"):
        make()
