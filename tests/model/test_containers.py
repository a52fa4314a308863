"""Dataclasses and mappings of any class, as what a model takes and returns."""

import copy
import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BatchEncoding
from transformers.utils import ModelOutput

import fxpar
from fxpar import CaptureError, InputError
from fxpar.testing import assert_equivalent


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    nothing: Tensor | None = None


@dataclasses.dataclass
class Nested:
    loss: Tensor
    parts: dict[str, Any]


class Items(UserDict):
    pass


class Opaque:
    def __init__(self, x, y):
        self.x, self.y = x, y


class Net(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.linear, self.returned = nn.Linear(8, 8), returned

    def forward(self, batch, keep=True):
        x, y = (batch[n] if hasattr(batch, "keys") else getattr(batch, n) for n in "xy")
        logits = self.linear(x) * getattr(batch, "scale", 1.0)
        return self.returned(F.cross_entropy(logits, y), logits)


def nested(loss, logits):
    return Nested(loss, {"inner": Items(logits=logits, flag=True), "count": 3})


class Stack(list):
    """A list of a class of its own."""


X, Y = torch.randn(4, 8), torch.randint(8, (4,))
GIVEN = [Batch(X, Y, 2.0), Slotted(X, Y), Items(x=X, y=Y), BatchEncoding({"x": X, "y": Y})]
RETURNED = [nested, lambda loss, logits: Output(loss, logits), lambda loss, logits: Items(loss=loss, logits=logits),
            lambda loss, logits: BatchEncoding({"loss": loss, "logits": logits})]


def flat(x):
    if isinstance(x, Tensor):
        return [x]
    parts = x.values() if hasattr(x, "values") else vars(x).values() if hasattr(x, "__dict__") else []
    return [t for part in parts for t in flat(part)]


@pytest.mark.parametrize("number", range(len(GIVEN)), ids=[type(b).__name__ for b in GIVEN])
def test_what_a_model_takes_and_returns_is_of_its_own_classes(number):
    batch, plain = GIVEN[number], Net(RETURNED[number % len(RETURNED)])
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (batch,))
    want = plain(batch)
    for have in (module(batch), module(batch=batch, keep=True)):
        assert type(have) is type(want) and list(getattr(have, "keys", list)()) == list(getattr(want, "keys", list)())
        assert all(map(torch.allclose, flat(have), flat(want))) and len(flat(have)) == len(flat(want))
    if isinstance(want, Nested):
        assert type(have.parts["inner"]) is Items and have.parts["inner"]["flag"] is True and have.parts["count"] == 3


def test_a_batch_of_a_class_is_split_over_replicas():
    assert_equivalent(Net(nested), "dp=2,tp=2", {"batch": Batch(X, Y, 2.0)})


def test_an_object_that_nobody_knows_is_refused():
    with pytest.raises(CaptureError, match=r"type that torch\.utils\._pytree does not know: .*Opaque; pass .*dataclasses"):
        fxpar.parallelize(Net(nested), "dp=1", (Opaque(X, Y),))


def test_lists_of_a_class_of_their_own():
    plain = Net(lambda loss, logits: Items(loss=loss, more=Stack([logits, 3])))
    have = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (Batch(X, Y, 2.0),))(Batch(X, Y, 2.0))
    assert type(have["more"]) is Stack and have["more"][1] == 3
    torch.testing.assert_close(have["more"][0], plain(Batch(X, Y, 2.0))["more"][0])


@pytest.mark.parametrize(("given", "says"), [
    (X.to_sparse(), "layout torch.sparse_coo"),
    (torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), "layout torch.jagged"),
    (X.numpy(), "of numpy .ndarray.: pass torch.as_tensor"), (X.numpy()[0, 0], "of numpy .float32.")])
def test_numbers_that_no_program_takes_are_refused(given, says):
    with pytest.raises(InputError, match=f"input 'input' is .*{says}"):
        fxpar.parallelize(torch.nn.Linear(8, 8), "dp=1", (given,))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A part of containers to PyTorch, and no leaf."""

    factor: float


class Looks(nn.Module):
    """Whose result depends on what its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, of: Any = None) -> Tensor:
        factor = of.factor if isinstance(of, Setting) else 7 if isinstance(of, tuple) else 9 if isinstance(of, list) else len(of)
        return self.linear(x) * factor


def test_containers_and_what_is_a_part_of_them_are_compared():
    pytree.register_constant(Setting)
    plain, x = Looks(), torch.ones(2, 2)
    module = fxpar.parallelize(copy.deepcopy(plain), "dp=1", {"x": x, "of": Setting(1.0)})
    for of in (Setting(1.0), Setting(3.0), (x,), [x], {}, {"a": {}}, [], (), Setting(1.0)):
        assert torch.equal(module(x, of), plain(x, of)), of
    assert len(module._engine.programs) == 8
