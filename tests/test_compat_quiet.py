"""compat: what PyTorch does beside what it is asked to do, left out for a while."""

from __future__ import annotations

import contextlib
import importlib
import logging
import traceback

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_code_of_a_graph_module_is_generated_when_it_is_called(monkeypatch):
    generated = []
    original = torch.fx.Graph.python_code
    graph = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1).graph
    monkeypatch.setattr(torch.fx.Graph, "python_code", lambda *args, **more: generated.append(1) or original(*args, **more))
    module = compat.graph_module(nn.Module(), graph)
    assert isinstance(module, torch.fx.GraphModule) and not generated
    torch.testing.assert_close(module(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))
    assert generated and "relu" in module.code


def test_results_on_fake_tensors_are_forgotten_where_they_are_many():
    mode = compat.FakeTensorMode()
    with mode:
        for n in range(1, 4):
            torch.empty(n) + torch.empty(n)
    count = len(mode.cache)
    assert count > 0
    compat.forget_fake_results(count)
    assert len(mode.cache) == count
    compat.forget_fake_results(count - 1)
    assert len(mode.cache) == 0


def test_lines_that_are_looked_up_once_are_those_that_pytorch_looks_up(monkeypatch):
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            return y * 2 + y

    lines, counts, looked = [], [], []
    original = traceback.linecache.getline
    monkeypatch.setattr(traceback.linecache, "getline", lambda *args: looked.append(args) or original(*args))
    for around in (contextlib.nullcontext, compat.lines_looked_up_once):
        looked.clear()
        with around():
            exported = torch.export.export(Net(), (torch.randn(3),))
        lines.append([n.meta.get("stack_trace") for n in exported.graph.nodes])
        counts.append(len(looked))
    assert lines[0] == lines[1] and "y = torch.relu(x)" in str(lines[1])
    assert counts[1] < counts[0] / 2


def test_lines_of_what_is_called_in_the_place_of_forward_are_known():
    def patched(x: torch.Tensor) -> torch.Tensor:
        return helper(x).sin()  # of patched

    def helper(x: torch.Tensor) -> torch.Tensor:
        return x.exp()  # of the helper

    net = nn.Sequential(nn.Identity())
    net[0].forward = patched
    net[0].register_forward_hook(lambda module, args, out: out.cos())  # of the hook
    with compat.lines_looked_up_once():
        exported = torch.export.export(net, (torch.randn(3),))
    lines = {n.name: n.meta["stack_trace"].splitlines()[-1] for n in exported.graph.nodes if n.op == "call_function"}
    assert "of patched" in lines["exp"] and "of patched" in lines["sin"] and "of the hook" in lines["cos"]


def test_modes_that_see_operators_are_counted():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    before = compat.dispatch_modes()
    with Mode():
        assert compat.dispatch_modes() == before + 1
    assert compat.dispatch_modes() == before


def test_modes_see_functions_in_the_place_they_are_given():
    seen = []

    class Mode(TorchFunctionMode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(self.name)
            return func(*args, **(kwargs or {}))

    def order():
        seen.clear()
        torch.ones(1)
        return "".join(seen)

    depth = compat.function_modes()
    with Mode("a"), Mode("b"), Mode("c"):
        with compat.modes_at(depth + 1, Mode("x"), Mode("y")):
            assert order() == "cbyxa"
            with Mode("d"):
                assert order() == "dcbyxa"
        assert order() == "cba"
        with pytest.raises(ValueError), compat.modes_at(depth, Mode("x")):
            raise ValueError
        assert order() == "cba"
    assert compat.function_modes() == depth


@pytest.mark.parametrize("kind", [TorchDispatchMode, TorchFunctionMode])
def test_modes_of_others_are_known_from_those_of_pytorch_and_fxpar(kind):
    class Mode(kind):
        pass

    with torch.device("cpu"), compat.FakeTensorMode():
        assert not compat.has_foreign_modes()
        with Mode():
            assert compat.has_foreign_modes()
    assert not compat.has_foreign_modes()


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


def test_an_export_that_fails_writes_no_graph_for_a_while(capfd, caplog):
    class Chooses(torch.nn.Module):
        def forward(self, x):
            return x if torch.rand([]) < 0.5 else -x

    def written():
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(Chooses(), (torch.ones(2),), strict=False)
        return capfd.readouterr().err + str([r for r in caplog.records if r.levelno >= logging.WARNING])

    with compat.quiet_traces():
        assert written() == "[]"
    assert "def forward" in written()


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
