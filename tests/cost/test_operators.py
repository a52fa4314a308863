"""What operators cost: shapes, floating-point operations and bytes, without running anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.backends import simulate
from fxpar.compiler import compile_program
from fxpar.cost import operators
from fxpar.cost.operators import Cost, TensorSpec, measure
from fxpar.model.inputs import leaves
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.layout import take
from tests import zoo


class Called(nn.Module):
    """A function of inputs and of one parameter."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def cost_of(function: Callable[..., Tensor], x: Tensor, *shape: int) -> Cost:
    """Of the one operator of a function that counts."""
    program = compile_program(Called(function, *shape), "dp=1", (x,))
    (found,) = (c for c in measure(program).costs.values() if c.forward)
    return found


X = torch.randn(4, 8, 16)
WANTED = torch.randn(4, 8, 16, requires_grad=True)


@pytest.mark.parametrize("function, x, shape, forward, backward", [
    (F.linear, X, (32, 16), 2 * 32 * 16 * 32, 1),
    (F.linear, WANTED, (32, 16), 2 * 32 * 16 * 32, 2),
    (torch.matmul, WANTED, (16, 5), 2 * 32 * 16 * 5, 2),
    (lambda x, w: torch.einsum("bsd,hd->bhs", x, w), WANTED, (3, 16), 2 * 32 * 16 * 3, 2),
    (lambda x, w: F.conv1d(x, w, padding=1), WANTED, (6, 8, 3), 2 * 4 * 16 * 6 * 8 * 3, 2),
    (lambda x, w: F.conv1d(x, w, padding=1, groups=8), WANTED, (8, 1, 3), 2 * 4 * 16 * 8 * 3, 2),
    (lambda x, w: F.scaled_dot_product_attention(x, w, w), WANTED, (4, 8, 16), 2 * 2 * 4 * 8 * 8 * 16, 2.5),
    (lambda x, w: F.scaled_dot_product_attention(x, w, w, is_causal=True), WANTED, (4, 8, 16), 2 * 4 * 8 * 8 * 16, 2.5),
])  # fmt: skip
def test_products(function, x, shape, forward, backward):
    found = cost_of(function, x, *shape)
    assert (found.forward, found.backward) == (forward, backward * forward)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout(causal):
    """An operator that PyTorch's counter does not see into."""
    found = cost_of(lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None], dropout_p=0.1, is_causal=causal),
                    WANTED, 4, 8, 16)
    forward = 2 * 2 * 4 * 8 * 8 * 16 // (2 if causal else 1)
    assert (found.forward, found.backward) == (forward, 2.5 * forward)


def test_bytes():
    found = cost_of(F.linear, X, 32, 16)
    assert (found.read, found.written) == (4 * (4 * 8 * 16 + 32 * 16), 4 * 4 * 8 * 32)
    program = compile_program(Called(lambda x, w: (x.view(8, 64) * w).sum(), 64), "dp=1", (X,))
    costs = {n.target: c for n, c in measure(program).costs.items()}
    assert costs[torch.ops.aten.reshape.default] == Cost()
    assert costs[torch.ops.aten.mul.Tensor] == Cost(read=4 * (512 + 64), written=4 * 512)


def test_experts_count_the_rows_that_they_see():
    ends = torch.tensor([1, 4, 6])
    found = cost_of(lambda x, w: grouped_mm(x, w, ends), torch.randn(6, 16, requires_grad=True), 3, 16, 5)
    assert (found.forward, found.backward) == (2 * 6 * 16 * 5, 2 * 2 * 6 * 16 * 5)


@pytest.mark.parametrize("name, plan", [("nanogpt", "dp=2,tp=2,zero=3"), ("resnet", "dp=2")])
def test_values_are_those_of_a_run(name, plan):
    """Shape, dtype and whether a gradient flows, of every value of every rank."""
    model, inputs = zoo.build(name)
    captured = fxpar.capture(model, inputs)
    program = captured.partition(plan)
    values, known = measure(program).values, {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers()),
                                              "input": leaves(captured.call)}
    feeds: list[list[Any]] = [[] for _ in range(program.mesh.world_size)]
    for node, source in program.source_of().items():
        value: Any = torch.tensor(0) if source.kind == "seed" else known.get(source.kind, {}).get(source.name, source.value)
        for rank, feed in enumerate(feeds):
            feed.append(take(value.detach(), sharding_at(node), program.mesh, rank).contiguous().requires_grad_(
                source.requires_grad) if isinstance(value, Tensor) else value)

    def check(have: Any, want: Any) -> None:
        if isinstance(have, list | tuple):
            assert len(have) == len(want)
            for pair in zip(have, want, strict=True):
                check(*pair)
        elif isinstance(have, Tensor):
            assert (tuple(have.shape), have.dtype, have.requires_grad) == (want.shape, want.dtype, want.requires_grad)
            assert math.prod(want.shape) * have.element_size() == want.bytes
        else:
            assert isinstance(have, int) and isinstance(want, int)  # where a rank's part begins

    simulate.run(program.module, program.mesh, feeds, lambda node, made: [check(v, values[node]) for v in made])


def test_equal_operators_are_looked_at_once(monkeypatch):
    looked: list[int] = []
    look = operators._look
    monkeypatch.setattr(operators, "_look", lambda *given: looked.append(1) or look(*given))
    counts = []
    for layers in (2, 4):
        found = measure(compile_program(zoo.NanoGPT(layers=layers, dropout=0.0), "tp=2", (zoo.ids(), zoo.labels())))
        counts.append(len(looked))
        looked.clear()
        assert len(found.costs) > 30 * layers
    assert counts[0] == counts[1]


def test_a_value_makes_a_tensor_like_it():
    tensor = torch.randn(3, 4, dtype=torch.float64, requires_grad=True).t()
    assert TensorSpec.of(TensorSpec.of(tensor).empty()) == TensorSpec.of(tensor) and TensorSpec.of(tensor).empty().is_meta
