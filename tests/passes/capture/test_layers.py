"""Of equal layers one is traced for all: the program is node for node that of a trace of each, and what may differ is traced."""

import contextlib
import contextvars
import functools
import gc
import itertools
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxpar.passes.capture import capture as capturing
from fxpar.passes.capture import layers
from tests.passes.capture.traces import captured, facts, texts

COUNT = 0
STATE = [0.0]
NUMBERS = itertools.count(1)
STEP = itertools.count(1).__next__
DRAWS = random.Random(0)
CONTEXT = contextvars.ContextVar("scale", default=1.0)
TABLE = {}
SETTINGS = SimpleNamespace(scale=1.0)
THIS = sys.modules[__name__]


class Block(nn.Module):
    """A residual layer; what subclasses do is in `twist`."""

    def __init__(self, i=0, shared=None):
        super().__init__()
        self.i, self.shared = i, shared
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def twist(self, h):
        return h

    def forward(self, x):
        return x + self.down(torch.relu(self.twist(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, block, count=4, kind=nn.ModuleList, call=None):
        super().__init__()
        shared = SimpleNamespace(scale=1.0, seen=[])
        self.layers = kind([block(i, shared) for i in range(count)]) if kind is nn.ModuleList else kind(
            *[block(i, shared) for i in range(count)])
        self.first, self.head, self.call, self.shared = nn.Linear(8, 8), nn.Linear(8, 3), call, shared

    def forward(self, x):
        x = self.first(x)
        for i, layer in enumerate(self.layers):
            x = layer(x) if self.call is None else self.call(self, layer, x, i)
        return self.head(x).sum()


@pytest.fixture
def check(monkeypatch):
    """check(make, inputs): how many layers of ``make()`` were not traced. Fails unless the program is that of a trace of all."""

    def check(make, inputs=None):
        count = []
        again = layers._Layers._again
        inputs = (torch.zeros(4, 8),) if inputs is None else inputs
        model = make()
        forwards = [m.__dict__.get("forward") for m in model.modules()]
        with monkeypatch.context() as patch:
            patch.setattr(layers._Layers, "_again", lambda *args: (count.append(1), again(*args))[1])
            once = captured(model, inputs)
        assert [m.__dict__.get("forward") for m in model.modules()] == forwards
        assert sys.getprofile() is None
        mine = facts(once, model)
        reset()
        model = make()
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "traced_once", lambda *_: contextlib.nullcontext())
            each = captured(model, inputs)
        assert texts(once) == texts(each)
        assert mine == facts(each, model)
        return len(count)

    reset()
    yield check
    reset()


def reset():
    global COUNT, NUMBERS, STEP, DRAWS
    STEP, DRAWS = itertools.count(1).__next__, random.Random(0)
    COUNT, STATE[:], NUMBERS, SETTINGS.scale = 0, [0.0], itertools.count(1), 1.0
    TABLE.clear()
    Counted.count = 0


# ---- layers that are equal ----


def params(default, slow):
    return [*default, *(pytest.param(block, marks=pytest.mark.slow) for block in slow)]


class Unread(Block):
    def __init__(self, i, shared):
        super().__init__(i, shared)
        self.name, self.options = f"layer {i}", {"rate": 0.5, "sizes": [1, 2]}

    def twist(self, h):
        return h * self.options["rate"] * self.shared.scale


class Dropped(Block):
    def twist(self, h):
        return nn.functional.dropout(torch.nn.functional.gelu(h), 0.1, self.training)


class Closed(Block):
    """Functions of one code with equal cells."""

    def __init__(self, i, shared):
        super().__init__(i, shared)
        self.function, self.partial, self.method = scaled(2.0), functools.partial(torch.mul, other=3.0), self.half

    def half(self, h):
        return h / 2

    def twist(self, h):
        return self.method(self.partial(self.function(h)))


def scaled(by):
    return lambda h: h * by


class Regions(Block):
    def twist(self, h):
        with torch.no_grad():
            peak = h.amax(-1, keepdim=True)
        with torch.autocast("cpu", torch.bfloat16):
            return h.float() - peak + torch.ones_like(h) @ h.mT @ h


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Custom(Block):
    def twist(self, h):
        return Double.apply(h) + torch.tensor(0.5)


class Rewriting(Block):
    """Writes in place, to what it made itself."""

    def twist(self, h):
        h = h * 2
        h[:, 0] = 0
        return h.add_(1)


class Passing(Block):
    """Returns an input as it is, a number and a dict."""

    def forward(self, x):
        return {"x": super().forward(x), "old": x, "rate": 0.5, "two": (x, None)}


def through_dict(model, layer, x, i):
    out = layer(x)
    return out["x"] * out["rate"] + (0 if out["old"] is x and out["two"][0] is x else 1)


@pytest.mark.parametrize("block", params((Closed, Regions, Rewriting), (Block, Unread, Dropped, Custom)))
def test_equal_layers_are_traced_once(check, block):
    assert check(lambda: Model(block)) == 3


@pytest.mark.parametrize("kind", params([nn.Sequential], [nn.ModuleList]))
def test_kinds_of_lists(check, kind):
    model = Model(Block, 2, kind)
    model.inner = nn.ModuleDict({"a": Model(Block, 3, kind).layers, "b": Model(Block, 3, kind).layers})
    model.call = lambda self, layer, x, i: functools.reduce(lambda x, f: f(x), [*self.inner["a"], *self.inner["b"]], layer(x))
    assert check(lambda: model) == 13  # of 14 calls


def test_what_is_returned_is_found_again(check):
    assert check(lambda: Model(Passing, call=through_dict)) == 3


def test_a_single_layer_is_watched_from_its_second_call_on(check):
    assert check(lambda: Model(Block, 1, call=lambda model, layer, x, i: layer(layer(layer(x))))) == 1


def test_nested_lists(check):
    class Outer(Block):
        def __init__(self, i, shared):
            super().__init__(i, shared)
            self.inner = nn.ModuleList([Block(k, shared) for k in range(2)])

        def twist(self, h):
            return self.inner[1](self.inner[0](h[:, :8])).repeat(1, 2)

    assert check(lambda: Model(Outer)) == 3


COLLECTIONS = 0


def test_what_collects_garbage_is_none_of_the_layers(check):
    def count(phase, _):
        global COLLECTIONS
        COLLECTIONS += 1

    thresholds = gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(1)
    try:
        assert check(lambda: Model(Block, 3)) == 2
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(count)
    assert COLLECTIONS and gc.isenabled()


def test_every_kind_of_difference_has_a_trace_of_its_own(check):
    model = Model(Block, 6)
    model.layers[1].up.weight.requires_grad_(False)
    model.layers[2].eval()
    model.layers[3].norm = nn.LayerNorm(8, elementwise_affine=False)
    model.layers[4].up.register_forward_hook(lambda module, args, out: out * 2)
    assert check(lambda: model) == 1


def test_tied_parameters(check):
    model = Model(Block, 5)
    model.layers[1].up.weight = model.layers[0].up.weight
    model.head.bias = model.layers[2].bias = nn.Parameter(torch.zeros(3))
    assert check(lambda: model) == 2  # the second has the first one's, and the last two are equal


def test_inputs_and_modes_are_compared(check):
    def call(model, layer, x, i):
        if i < 2:
            return layer(x)
        with torch.no_grad() if i < 5 else torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert check(lambda: Model(Block, 8, call=call)) == 3


# ---- layers that are not, or of which it cannot be said ----


class Read(Block):
    def twist(self, h):
        return h * (self.i + 1)


class ReadByName(Block):
    def twist(self, h):
        return h * (vars(self)["i"] + 1)


class Moved(Block):
    """Statistics in a buffer."""

    def __init__(self, i, shared):
        super().__init__(i, shared)
        self.register_buffer("count", torch.zeros(()))

    def twist(self, h):
        self.count += 1
        return h


class Normed(Block):
    def __init__(self, i, shared):
        super().__init__(i, shared)
        self.norm = nn.BatchNorm1d(8)


class Global(Block):
    def twist(self, h):
        return h * next_count()


def next_count():
    global COUNT
    COUNT += 1
    return COUNT


class GlobalList(Block):
    def twist(self, h):
        STATE[0] += 1
        return h * STATE[0]


class ByModule(Block):
    def twist(self, h):
        THIS.SETTINGS.scale += 1
        return h * THIS.SETTINGS.scale


class Iterated(Block):
    def twist(self, h):
        return h * next(NUMBERS)


class Stepped(Block):
    def twist(self, h):
        return h * STEP()


class Drawn(Block):
    """A generator that is written in C."""

    def twist(self, h):
        return h * DRAWS.random()


class Variable(Block):
    def twist(self, h):
        CONTEXT.set(CONTEXT.get() * 1.0)
        return h * CONTEXT.get()


class Cell(Block):
    def __init__(self, i, shared):
        super().__init__(i, shared)
        self.counter = counter() if i == 0 else None
        shared.counter = self.counter or shared.counter

    def twist(self, h):
        return h * self.shared.counter()


def counter():
    count = -1.0

    def up():
        nonlocal count
        count += 1
        return count

    return up


class Default(Block):
    def twist(self, h, kept=[]):  # noqa: B006
        kept.append(len(kept) % 4)
        return h * kept[-1]


class Counted(Block):
    count = 0

    def twist(self, h):
        type(self).count += 1
        return h * type(self).count


class Keyed(Block):
    def twist(self, h):
        return h * TABLE.setdefault(self, len(TABLE) + 1)


class Identity(Block):
    def twist(self, h):
        return h * TABLE.setdefault(id(self), len(TABLE) + 1)


class Shared(Block):
    def twist(self, h):
        self.shared.scale *= 2
        return h * self.shared.scale


class Neighbours(Block):
    """Knows the layers beside it."""

    def __init__(self, i, shared):
        super().__init__(i, shared)
        shared.seen.append(self)

    def twist(self, h):
        return h * 2 if self.shared.seen[0] is self else h


class Hooked(Block):
    def twist(self, h):
        h.register_hook(lambda grad: grad * 2)
        return h


DIFFER = (Read, Moved, Global, Stepped, Cell, Identity, Neighbours, Hooked)
SLOW = (ReadByName, Normed, GlobalList, ByModule, Iterated, Drawn, Variable, Default, Counted, Keyed)


@pytest.mark.parametrize("block", params(DIFFER, SLOW))
def test_layers_that_differ_or_count_are_traced_each(check, block):
    assert check(lambda: Model(block)) == 0


def test_an_attribute_that_a_layer_writes_has_it_traced(check):
    model = Model(Shared)
    assert check(lambda: model) == 0 and model.shared.scale == 1.0


def set_global(model, layer, x, i):
    STATE[0] = i // 2
    return layer(x)


def set_config(model, layer, x, i):
    model.shared.scale = i // 2
    return layer(x)


class ReadsList(Block):
    def twist(self, h):
        return h * helper()


def helper():
    return STATE[0] + 1


@pytest.mark.parametrize("block, call", [(ReadsList, set_global), pytest.param(Unread, set_config, marks=pytest.mark.slow)])
def test_what_changes_between_layers_is_compared_again(check, block, call):
    assert check(lambda: Model(block, call=call)) == 2


class InPlace(Block):
    def forward(self, x):
        return super().forward(x.add_(1.0)) * 2


def once_more(model, layer, x, i):
    return layer(x) + x


class Appends(Block):
    def forward(self, x, seen):
        seen.append(x)
        return super().forward(x)


def appended(model, layer, x, i):
    seen = [x]
    return layer(x, seen) + seen[-1]


class Taken(Block):
    """Reads a value while it is traced."""

    def forward(self, x, scale):
        return super().forward(x) * scale.item()


def known(model, layer, x, i):
    return layer(x, torch.tensor(float(i)))


TENSORS = [torch.tensor(float(i)) for i in range(4)]


def kept(model, layer, x, i):
    return layer(x, TENSORS[i])


@pytest.mark.parametrize("block, call", [(Appends, appended), (Taken, known), (Taken, kept),
                                         pytest.param(InPlace, once_more, marks=pytest.mark.slow)])
def test_a_layer_that_writes_to_inputs_or_reads_their_values_is_traced(check, block, call):
    assert check(lambda: Model(block, call=call)) == 0


def test_a_profiler_has_all_layers_traced():
    model, calls = Model(Block), []

    def profile(frame, event, _):
        if frame.f_code is Block.forward.__code__ and event == "call":
            calls.append(1)

    sys.setprofile(profile)
    try:
        captured(model, (torch.zeros(4, 8),))
    finally:
        sys.setprofile(None)
    assert len(calls) == 4
