"""What a trace of a layer may depend on, as `fxpar.compat` reads it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxpar import compat

with FakeTensorMode():
    LIKE, EQUAL = torch.ones(2, 3), torch.zeros(2, 3)
    OTHERS = {
        "shape": torch.ones(3, 2), "strides": torch.ones(3, 2).mT, "dtype": torch.ones(2, 3).double(),
        "device": torch.ones(2, 3, device="meta"), "gradient": torch.ones(2, 3, requires_grad=True),
        "leaf": torch.ones(2, 3, requires_grad=True) * 1, "offset": torch.ones(3, 3)[1:],
    }  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_facts_of_a_tensor_are_all_but_its_values(name):
    facts = compat.trace_facts(LIKE)
    assert facts is not None and facts == compat.trace_facts(EQUAL)
    assert facts != compat.trace_facts(OTHERS[name])


def test_a_tensor_that_has_values_has_no_facts():
    assert compat.trace_facts(torch.ones(2, 3)) is None


def test_a_tensor_whose_shape_or_values_a_trace_knows_otherwise_has_no_facts():
    mode, real = FakeTensorMode(shape_env=ShapeEnv()), torch.ones(4, 5)
    assert compat.trace_facts(mode.from_tensor(real)) is None  # its sizes are symbols
    with mode:
        assert compat.trace_facts(torch.tensor(3)) is None  # its value is known
        assert compat.trace_facts(torch.empty(3)) is not None


@pytest.mark.parametrize("context", [
    torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    lambda: torch.autocast("cpu", dtype=torch.float16), lambda: torch.device("meta"), lambda: FakeFunctions(),
])
def test_modes_of_pytorch_are_seen(context):
    before = compat.trace_modes()
    with context():
        assert compat.trace_modes() != before
    assert compat.trace_modes() == before


def test_settings_of_pytorch_are_seen():
    before = compat.trace_modes()
    torch.set_default_dtype(torch.float64)
    try:
        assert compat.trace_modes() != before
    finally:
        torch.set_default_dtype(torch.float32)


class FakeFunctions(torch.overrides.TorchFunctionMode):
    """Sees every function, and does what it does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_untraced_functions_are_not_seen():
    x = torch.ones(2)
    with FakeFunctions() as mode:
        with compat.untraced():
            x.stride(), x.add(1)
        assert not mode.seen
        x.add(1)
        assert mode.seen


def test_who_asks_for_seeds_is_told_of_for_a_while():
    told = []

    def asked(name, frame):
        told.append((name, frame.f_code.co_name))

    before = torch.get_rng_state()
    with compat.generators_watched(asked):
        torch.rand(2)
        assert told == []
        torch.set_rng_state(before)
        assert torch.equal(torch.get_rng_state(), before) and torch.initial_seed() == torch._C.default_generator.initial_seed()
        torch.manual_seed(torch.default_generator.initial_seed())
        torch._dynamo.disable(torch.manual_seed)(3)
        with torch.random.fork_rng(devices=[]):
            pass
    here = test_who_asks_for_seeds_is_told_of_for_a_while.__name__
    assert [name for name, caller in told if caller == here] == [
        "set_rng_state", "get_rng_state", "initial_seed", "initial_seed", "manual_seed", "manual_seed"]
    assert {caller for _, caller in told} == {here, "__enter__", "__exit__"}
    assert torch.default_generator is torch.random.default_generator is torch._C.default_generator


def test_what_torch_func_transforms_is_known():
    assert not compat.inside_of_transform()
    assert torch.vmap(lambda x: x * compat.inside_of_transform())(torch.ones(2)).sum() == 2
    assert torch.func.grad(lambda x: x * compat.inside_of_transform())(torch.ones(())) == 1
