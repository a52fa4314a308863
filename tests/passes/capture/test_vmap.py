"""`torch.vmap` in a forward: what it maps over is a dim like any other."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpar.testing import assert_equivalent


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 8), nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 3)
        self.function = function

    def row(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x)).square().mean()


def causal(net: Net, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    seen = torch.vmap(torch.vmap(lambda i, j: i >= j, in_dims=(None, 0)), in_dims=(0, None))(places, places)
    return (x @ x.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ net.row(x)


MAPPED = {
    "rows": lambda net, x: torch.vmap(net.row)(x),
    "rows of rows": lambda net, x: torch.vmap(torch.vmap(net.row))(x),
    "two tensors": lambda net, x: torch.vmap(lambda a, b: a * b.sum(), in_dims=(0, None))(net.row(x), x[0]),
    "pairs": lambda net, x: torch.vmap(lambda a: torch.vmap(lambda b: a * b)(net.row(x).mean(1)))(x.mean(1)),
    "parameters": lambda net, x: torch.vmap(lambda w: x @ w)(net.experts).sum(0),
    "attention": lambda net, x: torch.vmap(lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]))(net.row(x)),
    "a mask": causal,
    "dropout": lambda net, x: torch.vmap(lambda a: F.dropout(net.row(a), 0.5), randomness="different")(x),
    "drawn alike": lambda net, x: torch.vmap(lambda a: net.row(a) * torch.rand(8), randomness="same")(x),
    "in place": lambda net, x: torch.vmap(lambda a: net.row(a).mul_(2).add_(a))(x),
}


def check(name, plan, **options):
    torch.manual_seed(0)
    assert_equivalent(Net(MAPPED[name]), plan, (torch.randn(4, 6, 8),), **options)


@pytest.mark.parametrize("name", ["rows", "dropout", "in place"])
def test_what_is_mapped_over_is_split_like_any_dim(name):
    check(name, "dp=2,tp=2")


@pytest.mark.slow
@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,tp=2,zero=3"])
@pytest.mark.parametrize("name", MAPPED)
def test_whatever_is_mapped(name, plan, lowered):
    check(name, plan, lowered=lowered)
