"""Python numbers among the arguments of a call: one program for all values, where the forward allows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpar
from tests.processes import launch

VALUES = (0.1, 0.7, 0.1, 2.5, -1.0, 1e-3)


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.how = nn.Linear(8, 16), nn.Linear(16, 8), forward

    def forward(self, x: Tensor, by: float) -> Tensor:
        return self.how(self, x, by)


def scaled(net: Net, x: Tensor, by: float) -> Tensor:
    return (net.down(torch.tanh(net.up(x)) * by) - by**2).square().mean() / (1 - 0.5 * by)


def branches(net: Net, x: Tensor, by: float) -> Tensor:
    return (net.down(net.up(x)) * (3 if by > 0.5 else 1)).square().mean()


def insists(net: Net, x: Tensor, by: float) -> Tensor:
    return torch.nn.functional.leaky_relu(net.down(net.up(x)), by).square().mean()


def of_integers(net: Net, x: Tensor, by: float) -> Tensor:
    return net.down(net.up(x) * (torch.arange(16) * by)).square().mean()


def step(module: nn.Module, x: Tensor, by: float) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    loss = module(x, by)
    loss.backward()
    return loss.detach(), [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]


def differences(how, plan: str, x: Tensor, values=VALUES) -> int:
    """Compares with the plain model, value by value; the number of programs that were made."""
    module, plain = fxpar.parallelize(Net(how), plan, {"x": x, "by": values[0]}), Net(how)
    for by in values:
        loss, grads = step(module, x, by)
        want, wanted = step(plain, x, by)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0, check_dtype=False)
        torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-7)
    return len(module._engine.programs)


@pytest.mark.parametrize("how, programs", [(scaled, 2), (branches, 5), (insists, 5), (of_integers, 5)])
def test_a_number_that_changes_is_an_input_where_it_can_be(one_rank, how, programs):
    assert differences(how, "dp=1", torch.randn(4, 8)) == programs  # of five values


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6, unique=True))
def test_any_values_share_a_program(one_rank, values):
    made = differences(lambda net, x, by: (net.down(net.up(x) * by) + by).square().mean(), "dp=1", torch.randn(4, 8), values)
    assert made == 2


def test_a_number_is_not_rounded_to_the_dtype_of_compute(one_rank):
    x = torch.randn(4, 8)
    module = fxpar.parallelize(Net(scaled), "dp=1,param_dtype=bf16", {"x": x, "by": 0.5})
    narrow = Net(scaled).bfloat16()
    for by in (0.5, 0.1, 0.3):
        want, have = narrow(x.bfloat16(), by), module(x, by)
        assert abs(have.item() - want.item()) <= 0.02 * abs(want.item())
    assert len(module._engine.programs) == 2


def of_a_rank(rank: int, plan: str) -> int:
    torch.manual_seed(1)
    x = torch.randn(4, 8)
    module, plain = fxpar.parallelize(Net(scaled), plan, {"x": x[:2] if "dp" in plan else x, "by": 0.1}), Net(scaled)
    for by in VALUES:
        mine = x.chunk(module.plan.dp)[module.replica]
        (loss, grads), (want, wanted) = step(module, mine, by), step(plain, x, by)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0, check_dtype=False)
        torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-7)
    return len(module._engine.programs)


@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_ranks_share_it(plan):
    assert launch(2, of_a_rank, plan) == [2, 2]
