"""What the forward reads, and when a program of it is captured again."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import fxpar
from fxpar import InputError
from fxpar.model.reads import recorded
from fxpar.run import programs
from tests.harness import RANDOM
from tests.processes import launch

FACTOR = 2.0


class Config:
    def __init__(self, temperature: float) -> None:
        self.temperature, self.unread, self.inner = temperature, 0, SimpleNamespace(depth=1)


class Part(nn.Module):
    factor = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear, self.config, self.shift, self.steps = nn.Linear(4, 4), config, torch.ones(4), 0
        self.scales, self.act = [1.0, {"inner": 2.0}], F.gelu

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.linear(x)) * self.factor * self.scales[0] * self.scales[1]["inner"] + self.shift
        return x / self.temperature * FACTOR * (3.0 if getattr(self, "extra", False) else 1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(2.0)
        self.parts, self.drop = nn.ModuleList(Part(self.config) for _ in range(2)), nn.Dropout(0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.config.inner.depth):
            for part in self.parts:
                x = part(x)
        return self.head(self.drop(x)).square().mean()


def made() -> tuple[Net, fxpar.ParallelModule, Tensor]:
    torch.manual_seed(0)
    x, plain = torch.randn(4, 4), Net()
    torch.manual_seed(0)
    torch.randn(4, 4)
    return plain, fxpar.parallelize(Net(), "dp=1", (x,)), x


def scaled(factor: float) -> Any:
    def forward(self: Part, x: Tensor) -> Tensor:
        return self.linear(x) * factor

    return forward


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


CHANGES = {
    "a value of a config": lambda m, v: setattr(m.config, "temperature", v),
    "a value inside of it": lambda m, v: setattr(m.config.inner, "depth", int(v)),
    "another config": lambda m, v: setattr(m.parts[0], "config", SimpleNamespace(temperature=v)),
    "an attribute that was not there": lambda m, v: setattr(m.parts[0], "extra", v > 2),
    "an attribute of the class, hidden": lambda m, v: setattr(m.parts[1], "factor", v),
    "an element of a list": lambda m, v: m.parts[1].scales.__setitem__(0, v),
    "an element inside of it": lambda m, v: m.parts[1].scales[1].__setitem__("inner", v),
    "another tensor": lambda m, v: setattr(m.parts[0], "shift", torch.full((4,), v)),
    "a tensor, in place": lambda m, v: m.parts[0].shift.fill_(v),
    "a function": lambda m, v: setattr(m.parts[0], "act", torch.tanh if v > 2 else F.relu),
    "a probability": lambda m, v: setattr(m.drop, "p", 1.0 if v > 2 else 0.0),
    "a forward": lambda m, v: setattr(m.parts[0], "forward", scaled(v).__get__(m.parts[0])),
    "a hook": lambda m, v: m.parts[0].register_forward_hook(double),
    "no hooks": lambda m, v: m.parts[0]._forward_hooks.clear(),
    "another order": lambda m, v: m.parts._modules.update({"0": m.parts[1], "1": m.parts[0]}),
    "an identity": lambda m, v: setattr(m, "drop", nn.Identity()),
    "a part removed": lambda m, v: m.parts.__delitem__(0) if len(m.parts) > 1 and v > 2 else None,
    "a part shared": lambda m, v: m.parts._modules.update({"1": m.parts[0]}),
    "a mode": lambda m, v: m.drop.train(v > 2),
    "a frozen parameter": lambda m, v: m.head.bias.requires_grad_(v > 2),
}


def compare(plain: nn.Module, module: nn.Module, x: Tensor) -> None:
    results = []
    for model in (plain, module):
        model.zero_grad()
        loss = model(x)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    (want, gradients), (have, found) = results
    assert have == pytest.approx(want, rel=1e-4)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_the_plain_models(name):
    plain, module, x = made()
    for value in (3.0, 1.5):
        for model in (plain, module):
            if name in ("no hooks",) and value == 3.0:
                CHANGES["a hook"](model, value)
            CHANGES[name](model, value)
        compare(plain, module, x)


@settings(max_examples=4)
@given(RANDOM)
def test_changes_in_any_order_are_the_plain_models(r):
    plain, module, x = made()
    for _ in range(5):
        chosen = [(r.choice([n for n in CHANGES if n != "a part shared"]), r.choice([1.5, 2.5, 3.0])) for _ in range(2)]
        for model in (plain, module):
            for name, value in chosen:
                if len(model.parts) > 1:
                    CHANGES[name](model, value)
        compare(plain, module, x)


def test_class_attributes_and_global_values_are_compared(monkeypatch):
    plain, module, x = made()
    monkeypatch.setattr(Part, "factor", 1.5)
    compare(plain, module, x)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    compare(plain, module, x)
    monkeypatch.setattr(Part, "forward", scaled(0.5))
    compare(plain, module, x)


def test_what_the_forward_does_not_read_costs_nothing():
    _, module, x = made()
    for value in range(3):
        module.steps = module.parts[0].steps = module.config.unread = value
        module(x)
    assert len(module._engine.programs) == 1
    for temperature in (3.0, 2.0, 3.0, 2.0):
        module.config.temperature = temperature
        module(x)
    assert len(module._engine.programs) == 2


def test_attributes_that_are_set_on_the_parallel_module_are_the_models():
    plain, module, x = made()
    for model in (plain, module):
        model.drop = nn.Identity()
        model.config = SimpleNamespace(inner=SimpleNamespace(depth=2))
    compare(plain, module, x)
    del module.config
    with pytest.raises(AttributeError):
        _ = module._model.config


@pytest.mark.parametrize("change", [
    lambda m: m.parts.__setitem__(1, Part(m.config)),
    lambda m: setattr(m.parts[1], "linear", nn.Linear(4, 4)),
    lambda m: setattr(m.parts[1].linear, "weight", nn.Parameter(torch.zeros(4, 4))),
])  # fmt: skip
def test_new_parameters_are_refused_by_name(change):
    _, module, x = made()
    change(module)
    for _ in range(2):
        with pytest.raises(InputError, match=r"'parts\.1\.linear\.weight' was put into the model .* call fxpar.parallelize"):
            module(x)


def test_programs_are_bounded_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(programs, "MANY", 2)
    monkeypatch.setattr(programs, "MOST", 4)
    torch.manual_seed(0)
    plain, x = nn.Linear(4, 4), torch.randn(2, 4)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = plain

        def forward(self, x: Tensor, by: int) -> Tensor:
            return self.linear(x) * by

    want = plain(x).detach()
    module = fxpar.parallelize(Scaled(), "dp=1", {"x": x, "by": 1})
    with caplog.at_level(logging.WARNING, "fxpar"):
        for by in (1, 2, 3, 1, 4, 5, 6, 1):
            torch.testing.assert_close(module(x, by), want * by)
            module(x, 1)
            assert len(module._engine.programs) <= 4 and len(module._engine.compiled) <= 4
    said = [r.getMessage() for r in caplog.records if "programs of this model" in r.getMessage()]
    assert len(said) == 2 and "input 'by' (2, then 3)" in said[0] and "The 4 used last are kept" in said[1]
    kept = {key[0][1][1] for key in module._engine.programs}
    assert kept == {1, 4, 5, 6}


def of_a_rank(rank: int, alike: bool) -> str:
    _, module, x = made_on("dp=2")
    if alike or rank:
        module.config.temperature = 3.0
    if alike:
        plain = Net()
        plain.load_state_dict({n: t.full_tensor() for n, t in module.state_dict().items()})
        plain.config.temperature = 3.0
        compare(plain, module, x)
        return "right"
    with pytest.raises(fxpar.MismatchError) as error:
        module(x)
    return str(error.value)


def made_on(plan: str) -> tuple[None, fxpar.ParallelModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    return None, fxpar.parallelize(Net(), plan, (x,)), x


@pytest.mark.multiproc
def test_ranks_agree_on_attributes():
    assert launch(2, of_a_rank, True) == ["right"] * 2
    for text in launch(2, of_a_rank, False):
        assert "attributes that the forward reads (Config.temperature: 2.0, then 3.0)" in text


def test_classes_are_as_they_were_after_recording():
    net = Net()
    with recorded() as reads:
        net(torch.ones(4, 4))
    assert not any("__getattribute__" in vars(kind) for kind in (nn.Module, Net, Config))
    assert {"p", "temperature", "act"} <= {name for _, name in reads.found.values()}


def test_simulations_see_changes():
    plain, _, x = made()
    ranks = fxpar.simulate(plain, "dp=2", (x,))
    for change in ("a value of a config", "a hook", "a mode", "a part removed", "a frozen parameter"):
        CHANGES[change](plain, 3.0)
        assert ranks.step(x).loss.item() == pytest.approx(plain(x).item(), rel=1e-4), change


class Chooses(nn.Module):
    """What torch.cond runs is traced by Dynamo."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.factor, self.config = nn.Linear(4, 4), nn.Linear(4, 4), 1.0, Config(2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: self.a(x) * self.factor, lambda x: self.b(x), (x,))
        return (y * self.config.temperature).sum()


def test_attributes_that_dynamo_reads_are_compared():
    torch.manual_seed(0)
    plain, x = Chooses(), torch.ones(2, 4)
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (x,))
    for factor, temperature in ((1.0, 2.0), (3.0, 2.0), (3.0, 1.0)):
        plain.factor = module.factor = factor
        plain.config.temperature = module.config.temperature = temperature
        torch.testing.assert_close(module(x), plain(x))


class Tied(nn.Module):
    """A table that is also the head, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) * self.scale).square().mean()


def test_a_buffer_of_another_dtype_in_a_model_with_tied_weights():
    torch.manual_seed(0)
    plain, x = Tied(), torch.arange(4).view(2, 2)
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (x,))
    for model in (plain, module.get_submodule("")):
        model.scale = torch.full((1,), 3.0, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), plain(x))
