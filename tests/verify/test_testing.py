"""`assert_equivalent` itself: what it compares, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxpar.compiler import capture
from fxpar.errors import EquivalenceError
from fxpar.passes.pipeline import front
from fxpar.program import Program
from fxpar.testing import assert_equivalent
from fxpar.verify import equivalence as testing

X = torch.linspace(-1, 1, 24).view(4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.hidden(x)).square().mean()


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.hidden, x, use_reentrant=True)).square().mean()


class Empty(Net):
    """A parameter of no elements, as a convolution of no channels has it."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.cat([self.none, self.hidden(x)]).mean()


@pytest.mark.parametrize("plan", ["dp=2", "tp=2"])
def test_a_parameter_of_no_elements(plan):
    assert_equivalent(Empty(), plan, (X,))


def test_a_model_that_checkpoints_reentrantly():
    assert_equivalent(Checkpointed(), "dp=2,tp=2", (X.clone().requires_grad_(),))


def test_values_that_are_infinite_on_both_sides_do_not_differ():
    infinite = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    assert testing._relative(*testing._finite(infinite, infinite)) == 0
    for i, other in [(1, -torch.inf), (2, 3.0), (3, 0.0), (0, torch.inf)]:
        changed = infinite.clone()
        changed[i] = other
        assert not testing._relative(*testing._finite(changed, infinite)) <= 1e-5


def test_a_loss_that_is_no_number_is_not_right():
    class NotANumber(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log() * torch.nan

    with pytest.raises(EquivalenceError, match="the loss is nan"):
        assert_equivalent(NotANumber(), "dp=2", (X,))


class Cancels(Net):
    """A loss that is all rounding: the distances of values to their mean, added up."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.hidden(x))
        return (y - y.detach().mean()).sum() + 1e-6


def test_a_loss_that_cancels_may_be_off_by_what_roundings_of_parameters_move_it():
    model, call = Cancels(), ((X,), {})
    assert_equivalent(model, "dp=2,tp=2", (X,))
    reference = testing._with_roundings(testing._run_model(model, call), model, call)
    assert 0 < reference.rounding() < 1e-5
    off = replace(reference, loss=reference.loss + 1e-4)
    assert "the loss is" in testing._first_difference(reference, off, loss_tolerance=1e-6, gradient_tolerance=1e-5)


def test_a_distance_in_few_bits_is_taken_over_several_draws_of_roundings():
    assert not testing.too_far([(2.0, 1.0), (0.5, 1.0), (0.5, 1.0)])  # one draw alone would be too far
    assert testing.too_far([(2.0, 1.0), (1.6, 1.0), (1.4, 1.0)])


def test_what_is_farther_in_every_draw_is_wrong(monkeypatch):
    monkeypatch.setattr(testing, "_apart", lambda exact, one, result: (0.2, 0.1))
    with pytest.raises(EquivalenceError, match=r"off by 0\.2 of their norm.*5 draws"):
        assert_equivalent(Net(), "dp=2,param_dtype=bf16", (X,))


def wrong(program: Program) -> Program:
    """A pass that changes what the program computes."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.tanh.default:
            node.target = torch.ops.aten.sin.default
    return program


@pytest.mark.parametrize("before", [False, True])
def test_the_pass_that_makes_the_difference_is_named(monkeypatch, before):
    """Also where the passes have run, for another plan."""
    steps = front()
    monkeypatch.setattr("fxpar.compiler.front", lambda: [steps[0], ("wrong", wrong), *steps[1:]])
    captured = capture(Net(), (X,))
    if before:
        captured.partition("tp=2")
    with pytest.raises(EquivalenceError, match="the program differs from the model after pass 'wrong'"):
        assert_equivalent(captured, "dp=2")


def test_nothing_is_kept_of_passes_where_nothing_differs(monkeypatch):
    kept, frozen = [], testing._frozen
    monkeypatch.setattr(testing, "_frozen", lambda program: kept.append(program) or frozen(program))
    assert_equivalent(Net(), "dp=2", (X,))
    assert len(kept) == 1  # what is inferred


def test_a_draw_moves_parameters_and_puts_them_back():
    model, moved = Net(), []
    before = [p.detach().clone() for p in model.parameters()]
    for draw in (0, 1, 2):
        with testing.moved(model, draw):
            moved.append(model.first.weight.detach().clone())
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(moved[0], before[0]) and not torch.equal(moved[1], moved[2])
    assert ((moved[1] - before[0]).abs() <= before[0].abs() * 0.05).all() and not torch.equal(moved[1], before[0])


class BiasBeforeBatchNorm(nn.Module):
    """A gradient that is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)).sigmoid().mean()


def compared(change: float, name: str) -> str | None:
    """What is said of a step in which a gradient differs by `change` of its norm; rounding counts for nothing otherwise."""
    torch.manual_seed(0)
    model, call = BiasBeforeBatchNorm(), ((torch.randn(64, 4),), {})
    reference = testing._with_roundings(testing._run_model(model, call), model, call)
    other = {**reference.grads, name: reference.grads[name] * (1 + change)}
    result = testing.Reference(reference.loss, other, reference.input_grads, reference.buffers)
    return testing._first_difference(reference, result, loss_tolerance=1e-6, gradient_tolerance=1e-5)


def test_a_gradient_that_is_zero_but_for_rounding_may_round_otherwise(monkeypatch):
    monkeypatch.setattr(testing, "NOISE", 0.0)
    assert compared(2.0, "first.bias") is None
    assert "first.bias is off by 10" in compared(10.0, "first.bias")
    assert "norm.bias is off by 0.01" in compared(0.01, "norm.bias")
