"""Attention on repeated heads: what folds, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxpar.backends.eager import run_flat
from fxpar.passes.canonical.gqa import fold_repeat_kv
from fxpar.passes.capture.capture import capture
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.sharding.mesh import from_plan
from tests import zoo  # noqa: F401  (makes transformers importable without torchvision's operators)

SDPA = torch.ops.aten.scaled_dot_product_attention.default
B, S = 2, 16


def captured(model: nn.Module, **inputs) -> Program:
    return capture(model, Plan(), from_plan(Plan()), (), inputs, torch.device("cpu"))


def grouped(make: Callable, **options) -> list[fx.Node]:
    class Model(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, *make(k, v), **options)

    inputs = dict(q=torch.randn(B, 6, S, 8), k=torch.randn(B, 2, S, 8), v=torch.randn(B, 2, S, 4))
    program = captured(Model(), **inputs)
    values = [inputs.get(s.name, s.value) for s in program.sources]
    (before,) = run_flat(program.module, list(values))
    fold_repeat_kv(program)
    torch.testing.assert_close(run_flat(program.module, list(values))[0], before, rtol=1e-6, atol=1e-6)
    (node,) = [n for n in program.graph.nodes if n.target is SDPA]
    return [node, *node.args[:3]]


def repeat(x: Tensor, times: int = 3) -> Tensor:
    b, heads, s, d = x.shape
    return x[:, :, None].expand(b, heads, times, s, d).reshape(b, heads * times, s, d)


def tiled(x: Tensor) -> Tensor:
    """The heads one after the other, three times: another order."""
    b, heads, s, d = x.shape
    return x[:, None].expand(b, 3, heads, s, d).reshape(b, heads * 3, s, d)


@pytest.mark.parametrize("make", [
    lambda k, v: (repeat(k), repeat(v)),
    lambda k, v: (repeat(k).contiguous(), repeat(v).clone()),
    lambda k, v: (k.repeat_interleave(3, dim=1), v.repeat_interleave(3, -3)),
    lambda k, v: (k.repeat_interleave(3, 1), repeat(v)),
])  # fmt: skip
def test_repeated_heads_fold(make):
    node, _, key, value = grouped(make, is_causal=True)
    assert node.kwargs["enable_gqa"] and key.name == "k" and value.name == "v"


@pytest.mark.parametrize("make", [
    lambda k, v: (tiled(k), tiled(v)),
    lambda k, v: (repeat(k), tiled(v)),
    lambda k, v: (repeat(k), torch.cat([v, v, v], dim=1)),
    lambda k, v: (repeat(k) * 2, repeat(v)),
    lambda k, v: (repeat(k, 6)[:, :6], repeat(v)),
])  # fmt: skip
def test_what_else_gives_as_many_heads_is_left_alone(make):
    assert not grouped(make)[0].kwargs.get("enable_gqa")


def test_repeated_heads_with_a_mask_are_left_alone():
    mask = torch.rand(S, S) < 2
    assert not grouped(lambda k, v: (repeat(k), repeat(v)), attn_mask=mask)[0].kwargs.get("enable_gqa")
