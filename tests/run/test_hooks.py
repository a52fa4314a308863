"""Hooks of tensors and modules, and tensors that a trace would take for constants."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.errors import CaptureError, PlanError
from fxpar.testing import assert_equivalent
from tests.processes import launch

PLANS = ["dp=2", "tp=2", "dp=2,zero=3"]


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down, self.act = kind, nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()
        weight = self.down.weight
        self.aliases = [self.up.weight]
        self.project = functools.partial(F.linear, weight=weight)
        self.closure = lambda h: h @ weight.t()
        self.free = [torch.randn(16, requires_grad=True)]
        self.strange = [nn.Linear(16, 16)]

    def forward(self, x: Tensor) -> Tensor:
        h = getattr(self, self.kind, self.plain)(self.up(x))
        return self.down(self.act(h)).square().mean()

    def plain(self, h: Tensor) -> Tensor:
        return h

    def scaled(self, h: Tensor) -> Tensor:
        early = h.sin()
        h.register_hook(lambda g: g * 0.25)
        return h + early

    def twice(self, h: Tensor) -> Tensor:
        h.register_hook(lambda g: g * torch.arange(16))
        h.register_hook(lambda g: g.flip(-1))
        return h

    def masked(self, h: Tensor) -> Tensor:
        h.register_hook(lambda g: g.masked_fill(h.detach() > 0.3, 0))
        return h * 1.5

    def inner(self, h: Tensor) -> Tensor:
        g = h.tanh()
        if g.requires_grad:
            g.register_hook(lambda g: -g)
        return g

    def clipped(self, h: Tensor) -> Tensor:
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return h

    def seen(self, h: Tensor) -> Tensor:
        h.register_hook(print)
        return h

    def kept(self, h: Tensor) -> Tensor:
        h.retain_grad()
        return h

    def node(self, h: Tensor) -> Tensor:
        h.grad_fn.register_hook(lambda *_: None)
        return h

    def from_list(self, h: Tensor) -> Tensor:
        return h + F.linear(self.down(h), self.aliases[0])

    def from_partial(self, h: Tensor) -> Tensor:
        return h + self.up(self.project(h))

    def from_closure(self, h: Tensor) -> Tensor:
        return h + self.up(self.closure(h))

    def wants_gradient(self, h: Tensor) -> Tensor:
        return h * self.free[0]

    def made_outside(self, h: Tensor) -> Tensor:
        return h * self.free[0].exp()

    def unregistered(self, h: Tensor) -> Tensor:
        return self.strange[0](h)

    def gradient(self, h: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
        return g

    def backward_inside(self, h: Tensor) -> Tensor:
        h.sum().backward()
        return h

    def data(self, h: Tensor) -> Tensor:
        h.data = h.data * 2
        return h


def net(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind)


def batch() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["scaled", "twice", "masked", "inner"])
def test_linear_hooks_of_tensors(kind, plan):
    assert_equivalent(net(kind), plan, (batch(),))
    if plan == "dp=2":
        assert_equivalent(net(kind), plan, (batch(),), lowered=True)


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.5,)


def reversed_gradient(module: nn.Module, args: Any, out: Tensor) -> None:
    out.register_hook(lambda g: -g)


@pytest.mark.parametrize("plan", PLANS)
def test_forward_hooks_of_submodules(plan):
    model = net("plain")
    model.up.register_forward_hook(doubled)
    model.down.register_forward_pre_hook(shifted)
    model.act.register_forward_hook(reversed_gradient)
    assert_equivalent(model, plan, (batch(),))


def own_hooks(rank: int) -> None:
    model = net("plain")
    seen: list[Any] = []
    model.register_forward_hook(doubled)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape) or (args[0] + 0.5,))
    plain = copy.deepcopy(model)
    plain(batch()).backward()
    module = fxpar.parallelize(model, "dp=2", (batch()[:2],))
    seen.clear()
    loss = module(batch()[2 * rank : 2 * rank + 2])
    loss.backward()
    assert seen == [(2, 8)]
    torch.testing.assert_close(loss, plain(batch()))
    torch.testing.assert_close(module.up.weight.grad.full_tensor(), plain.up.weight.grad)


def test_the_models_own_hooks_run_around_its_program():
    launch(2, own_hooks)


def test_a_simulation_of_a_model_with_hooks_of_its_own_is_refused():
    model = net("plain")
    model.register_forward_hook(doubled)
    with pytest.raises(PlanError, match="forward hooks"):
        fxpar.simulate(model, "dp=2", (batch(),))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(register):
    model = net("plain")
    getattr(model.up, register)(doubled)
    with pytest.raises(CaptureError, match=r"doubled of up \(Linear\)") as error:
        fxpar.simulate(model, "dp=2", (batch(),))
    assert "test_hooks.py" in error.value.where and error.value.way_out


def test_hooks_of_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        with pytest.raises(CaptureError, match="all modules"):
            fxpar.simulate(net("plain"), "dp=2", (batch(),))
    finally:
        handle.remove()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["from_list", "from_partial", "from_closure"])
def test_parameters_that_come_from_elsewhere_are_the_modules(kind, plan):
    model = net(kind)
    made = fxpar.simulate(model, plan, (batch(),)).step(batch())
    loss = model(batch())
    loss.backward()
    torch.testing.assert_close(made.loss, loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(made.grads[name], p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind, says", [
    ("clipped", "not linear"), ("seen", "returns nothing"), ("kept", "retain_grad"), ("node", "grad_fn"),
    ("wants_gradient", "requires_grad"), ("made_outside", "requires_grad"), ("unregistered", "a parameter of shape"),
    ("gradient", "torch.autograd.grad"), ("backward_inside", "backward inside"), ("data", ".data of a tensor"),
])  # fmt: skip
def test_what_a_trace_cannot_see_is_refused_by_line(kind, says):
    with pytest.raises(CaptureError) as error:
        fxpar.simulate(net(kind), "dp=2", (batch(),))
    assert says in error.value.what and error.value.way_out
    assert "test_hooks.py" in error.value.where or kind == "unregistered"
