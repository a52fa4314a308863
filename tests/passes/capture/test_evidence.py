"""What code of the user's runs inside of operators is seen while a layer is traced; what PyTorch runs there is not looked at."""

import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxpar.passes.capture import evidence, layers
from fxpar.passes.capture.traced import TraceGuard
from tests.passes.capture.traces import captured

SCALES = [1.0]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return torch.relu(x.view(4, 8) * self.weight)


class Model(nn.Module):
    def __init__(self, layer, count=3):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), nn.ModuleList(layer() for _ in range(count))

    def forward(self, x):
        x = self.first(x)
        for i, layer in enumerate(self.layers):
            SCALES[0] = float(i)
            x = layer(x)
        return x.sum()


@pytest.fixture
def again(monkeypatch):
    """again(layer): how many layers of a model of three were not traced."""

    def count(layer):
        made, original = [], layers._Layers._again
        with monkeypatch.context() as patch:
            patch.setattr(layers._Layers, "_again", lambda *args: (made.append(1), original(*args))[1])
            captured(Model(layer), (torch.zeros(4, 8),))
        assert sys.getprofile() is None
        return len(made)

    return count


class Number:
    """Is asked for its value by the operator that takes it."""

    def __index__(self):
        return 4 + 0 * int(SCALES[0])


class AsksObjects(Layer):
    def forward(self, x):
        return super().forward(x.view(Number(), 8))


class Scaling(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * SCALES[0] if func is torch.ops.aten.relu.default else out


class EntersMode(Layer):
    def forward(self, x):
        with Scaling():
            return super().forward(x)


def packed(x):
    return SCALES[0]


class Saves(Layer):
    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(packed, packed):
            return super().forward(x)


@pytest.mark.parametrize("layer, equal", [(Layer, 2), (AsksObjects, 0), (EntersMode, 0), (Saves, 0)])
def test_code_that_an_operator_calls_is_seen(again, layer, equal):
    assert again(layer) == equal


def test_modes_around_the_model_are_seen(again):
    class Scale(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * SCALES[0] if func is torch.relu else out

    with Scale():
        assert again(Layer) == 0


def test_what_pytorch_runs_for_an_operator_is_not_looked_at(again, monkeypatch):
    calls, original = [], evidence.Evidence._call

    def call(self, frame, event, arg):
        calls.append(frame.f_code.co_filename)
        return original(self, frame, event, arg)

    monkeypatch.setattr(evidence.Evidence, "_call", call)
    assert again(Layer) == 2
    assert sum(path == __file__ for path in calls) > 0
    assert not any("fake_tensor" in path for path in calls)


def test_an_export_does_not_ask_about_what_it_does_around_the_forward(monkeypatch):
    counts, original = [], TraceGuard.__torch_function__
    monkeypatch.setattr(TraceGuard, "__torch_function__", lambda self, *args: counts.append(1) or original(self, *args))
    captured(Model(Layer), (torch.zeros(4, 8),))
    assert 0 < len(counts) < 40
