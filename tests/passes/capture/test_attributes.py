"""What a forward stores in attributes: there after each call as the plain model has it, gradients included, or refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.errors import CaptureError, FxparError
from fxpar.testing import assert_equivalent
from tests.processes import launch

OUTSIDE: dict[str, Any] = {}


class Net(nn.Module):
    """`kind` says what its inner module stores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.inner, self.down = nn.Linear(8, 16), Inner(kind), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(self.up(x))).square().mean()


class Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate = kind, nn.Linear(16, 4)
        self.aux: Any = None
        self.zero = torch.zeros(())
        self.losses: list[Tensor] = []
        self.stats: dict[str, Any] = {}
        self.state = SimpleNamespace(loss=None, inner={"n": 0})
        self.average = torch.zeros(16)
        self.table: Tensor | None = None
        self.longest = 0
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, h: Tensor) -> Tensor:
        balance = (self.gate(h).softmax(-1).mean((0, 1)) ** 2).sum() * 4
        return getattr(self, self.kind)(h, balance)

    def attribute(self, h: Tensor, balance: Tensor) -> Tensor:
        self.aux = balance
        return h

    def tensor_before(self, h: Tensor, balance: Tensor) -> Tensor:
        self.zero = balance
        return h

    def new_list(self, h: Tensor, balance: Tensor) -> Tensor:
        self.losses = []
        self.losses.append(balance)
        self.losses.append(h.mean())
        return h

    def grown_list(self, h: Tensor, balance: Tensor) -> Tensor:
        self.losses.append(balance)
        return h

    def entry(self, h: Tensor, balance: Tensor) -> Tensor:
        self.stats["loss"] = {"balance": balance, "of": ("gate", 4)}
        return h

    def of_object(self, h: Tensor, balance: Tensor) -> Tensor:
        self.state.loss = balance
        self.state.inner["n"] = 3
        return h

    def activation(self, h: Tensor, balance: Tensor) -> Tensor:
        self.aux = h
        return h

    def moving(self, h: Tensor, balance: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * h.detach().mean((0, 1))
        return h + self.average

    def buffer(self, h: Tensor, balance: Tensor) -> Tensor:
        self.seen = self.seen + h.detach().mean((0, 1))
        return h + self.seen

    def data(self, h: Tensor, balance: Tensor) -> Tensor:
        self.seen.data.mul_(0.5).add_(h.detach().mean((0, 1)))
        return h + self.seen

    def cache(self, h: Tensor, balance: Tensor) -> Tensor:
        if self.table is None or len(self.table) < h.shape[1]:
            self.table = torch.arange(h.shape[1]).float().unsqueeze(1).cos()
        return h * self.table[: h.shape[1]]

    def length(self, h: Tensor, balance: Tensor) -> Tensor:
        self.longest = max(self.longest, h.shape[1])
        return h * self.longest

    def counter(self, h: Tensor, balance: Tensor) -> Tensor:
        self.longest += 1
        return h * self.longest

    def previous(self, h: Tensor, balance: Tensor) -> Tensor:
        out = h if self.aux is None else h + self.aux
        self.aux = h.detach()
        return out

    def outside(self, h: Tensor, balance: Tensor) -> Tensor:
        OUTSIDE["h"] = h
        return h

    def thing(self, h: Tensor, balance: Tensor) -> Tensor:
        self.aux = SimpleNamespace(loss=balance)
        return h

    def module(self, h: Tensor, balance: Tensor) -> Tensor:
        self.extra = nn.Linear(2, 2)
        return h

    def parameter(self, h: Tensor, balance: Tensor) -> Tensor:
        self.gate.weight = nn.Parameter(torch.zeros(4, 16))
        return h

    def gone(self, h: Tensor, balance: Tensor) -> Tensor:
        del self.aux
        return h

    def replaced(self, h: Tensor, balance: Tensor) -> Tensor:
        self.losses[:] = [balance]
        return h


LOSSES = {
    "attribute": lambda m: m.aux,
    "tensor_before": lambda m: m.zero,
    "new_list": lambda m: sum(m.losses),
    "grown_list": lambda m: m.losses.pop(),
    "entry": lambda m: m.stats["loss"]["balance"],
    "of_object": lambda m: m.state.loss * m.state.inner["n"],
    "activation": lambda m: (m.aux * m.aux.abs()).mean(),
}
OTHERS = ["moving", "buffer", "data", "cache", "length"]


def net(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind)


def batch(step: int, length: int = 6) -> Tensor:
    return torch.randn(4, length, 8, generator=torch.Generator().manual_seed(step))


def train(module: nn.Module, inner: nn.Module, kind: str, mine: slice) -> list[Tensor]:
    """Losses of some steps, then the weights."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    losses = []
    for step, length in enumerate((6, 6, 4)):
        loss = module(batch(step, length)[mine])
        losses.append(loss.detach())
        if kind in LOSSES:
            loss = loss + 0.5 * LOSSES[kind](inner)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()),
            inner.average, inner.seen]


def on_rank(rank: int, plan: str, kinds: list[str]) -> None:
    for kind in kinds:
        plain = net(kind)
        before = copy.deepcopy(plain.inner.__dict__)
        module = fxpar.parallelize(copy.deepcopy(plain), plan, (batch(0)[:2] if "dp" in plan else batch(0),))
        assert str(module.inner.__dict__["aux"]) == str(before["aux"]) and not module.inner.losses, "capturing left something"
        mine = slice(2 * module.replica, 2 * module.replica + 2) if "dp" in plan else slice(None)
        want, have = train(plain, plain.inner, kind, slice(None)), train(module, module.inner, kind, mine)
        for i, (w, h) in enumerate(zip(want, have, strict=True)):
            torch.testing.assert_close(h, w.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, at=(kind, i): f"{at}: {m}")


@pytest.mark.parametrize("plan, kinds", [
    ("dp=2", [*LOSSES, *OTHERS][::2]),
    pytest.param("dp=2", [*LOSSES, *OTHERS][1::2], marks=pytest.mark.slow),
    pytest.param("dp=2,zero=3", ["attribute", "grown_list"], marks=pytest.mark.slow),
    pytest.param("tp=2", ["attribute", "entry", "buffer", "cache"], marks=pytest.mark.slow),
])  # fmt: skip
def test_attributes_are_as_the_plain_model_has_them(plan, kinds):
    launch(2, on_rank, plan, kinds)


def counted(rank: int) -> None:
    module = fxpar.parallelize(net("counter"), "dp=2", (batch(0)[:2],))
    with pytest.raises(FxparError, match="longest at every call"):
        for step in range(3):
            module(batch(step)[:2])


def test_a_counter_is_refused_on_every_rank():
    launch(2, counted)


def previous(rank: int) -> None:
    module = fxpar.parallelize(net("previous"), "dp=2", (batch(0)[:2],))
    module(batch(0)[:2])
    with pytest.raises(FxparError, match="in previous"):
        module(batch(1)[:2])
    with pytest.raises(FxparError, match=r"average in an earlier call"):
        fxpar.parallelize(net("moving"), "tp=2", (batch(0),))


def test_reading_a_part_that_an_earlier_call_stored_is_refused():
    launch(2, previous)


@pytest.mark.parametrize("kind, says", [("outside", "under 'h'"), ("thing", "SimpleNamespace"), ("module", "submodules"),
                                        ("parameter", "parameters"), ("gone", "aux"), ("replaced", "losses")])  # fmt: skip
def test_what_cannot_be_stored_again_is_refused(kind, says):
    model = net(kind)
    model.inner.losses = [torch.zeros(())]
    with pytest.raises(CaptureError) as error:
        fxpar.simulate(model, "dp=2", (batch(0),))
    assert says in str(error.value) and error.value.way_out
    OUTSIDE.clear()


@pytest.mark.parametrize("kind", ["attribute", "entry", "buffer", "cache"])
def test_simulation_leaves_attributes_alone(kind):
    model = net(kind)
    fxpar.simulate(model, "dp=2,tp=2", (batch(0),)).step(batch(0))
    assert model.inner.aux is None and model.inner.table is None and not model.inner.stats
    assert_equivalent(model, "dp=2,tp=2", (batch(0),), lowered=True)
