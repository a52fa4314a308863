"""A forward and a backward as one function for autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpar.backends.differentiable import differentiable
from fxpar.backends.like import Like
from fxpar.errors import InputError


def forward(given: list[Tensor]) -> list[Tensor]:
    """x * y, how many elements x has, and x + y; keeps both inputs, and a copy of one that the backward overwrites."""
    assert not torch.is_grad_enabled()
    x, y = given
    given.clear()
    return [x * y, torch.tensor(x.numel()), x + y, x, y, x.clone()]


def backward(given: list[Tensor]) -> list[Tensor | None]:
    x, y, free, first, second = given
    given.clear()
    assert torch.equal(free, x)
    free.zero_()
    return [first * y + second, first * x + second]


@pytest.fixture
def function():
    like = Like((2, 3), (3, 1), torch.float32, torch.device("cpu"))
    return differentiable(forward, backward, outputs=3, seeds=[0, 2], like=[like, like], donated=[2])


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_gradients_of_some_outputs(function, weights):
    x, y = inputs()
    product, count, total = function(x, y)
    assert count.item() == 6 and not count.requires_grad
    loss = sum(w * out.sum() for w, out in zip(weights, (product, total), strict=True) if w)
    loss.backward()
    wanted = torch.autograd.grad(weights[0] * (x * y).sum() + weights[1] * (x + y).sum(), (x, y))
    assert torch.equal(x.grad, wanted[0]) and torch.equal(y.grad, wanted[1])


def test_a_backward_comes_again(function):
    """What it overwrites is a copy, as long as another one may come."""
    x, y = inputs()
    loss = function(x, y)[0].sum()
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        assert torch.equal(x.grad, times * y)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_lie_as_they_were_traced(function):
    x, y = inputs()
    product, _, _ = function(x, y)
    product.backward(torch.ones(3, 2).t())
    assert torch.equal(x.grad, y)


def test_a_gradient_of_another_shape_is_refused(function):
    like = Like((2, 3), (3, 1), torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match="the gradient of output 1 is"):
        like.of(torch.ones(3), 1)
    assert like.of(None, 0).tolist() == [[0.0] * 3] * 2


def test_a_gradient_has_no_gradient(function):
    x, y = inputs()
    (grad,) = torch.autograd.grad(function(x, y)[0].sum(), x, create_graph=True)
    assert torch.equal(grad, y)
    if grad.requires_grad:
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()
