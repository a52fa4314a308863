"""windowed_attention against scaled_dot_product_attention with the mask written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxpar.ops.attention import windowed_attention


def written_out(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None,
                enable_gqa: bool = False) -> Tensor:  # fmt: skip
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    mask = (j <= i) & (i - j < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def operands(b: int, kv: int, groups: int, length: int, d: int, e: int, dtype=torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (b, kv * groups, length, d), (b, kv, length, d), (b, kv, length, e)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


class Largest(TorchDispatchMode):
    """The most elements that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = [t.untyped_storage().nbytes() // t.element_size() for t in tensors]
        self.numel = max([self.numel, *made])
        return out


small = st.integers(1, 3)


@settings(deadline=None, max_examples=60)
@given(b=small, kv=small, groups=small, length=st.integers(1, 20), window=st.integers(1, 24), d=small,
       e=small, scale=st.sampled_from([None, 0.3]))  # fmt: skip
def test_equals_the_mask_written_out(b, kv, groups, length, window, d, e, scale):
    ours, theirs = operands(b, kv, groups, length, d, e), operands(b, kv, groups, length, d, e)
    options = dict(window=window, scale=scale, enable_gqa=groups > 1)
    out, expected = windowed_attention(*ours, **options), written_out(*theirs, **options)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((o * weight).sum(), x) for o, x in ((out, ours), (expected, theirs))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("groups", [1, 2])
def test_makes_nothing_quadratic(groups):
    length, window = 512, 16
    q, k, v = operands(1, 1, groups, length, 4, 4, torch.float32)
    with Largest() as seen:
        windowed_attention(q, k, v, window=window, enable_gqa=True).sum().backward()
    assert seen.numel <= 2 * groups * length * window < length * length // 2


def test_traces_forward_and_backward():
    def step(q, k, v):
        out = windowed_attention(q, k, v, window=4, enable_gqa=True)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    args = operands(2, 2, 2, 10, 4, 4)
    traced = make_fx(step, tracing_mode="fake")(*args)
    other = [torch.randn_like(a).requires_grad_() for a in args]
    torch.testing.assert_close(traced(*other), step(*other))


def test_no_window_beyond_the_sequence():
    q, k, v = operands(1, 2, 1, 6, 4, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(windowed_attention(q, k, v, window=6), expected)
    assert torch.equal(windowed_attention(q, k, v, window=1000), expected)


def test_refuses():
    q, k, v = operands(1, 2, 2, 6, 4, 4)
    with pytest.raises(ValueError, match="window=0"):
        windowed_attention(q, k, v, window=0, enable_gqa=True)
    with pytest.raises(ValueError, match="do not agree"):
        windowed_attention(q, k, v, window=2)
    with pytest.raises(ValueError, match="do not agree"):
        windowed_attention(q, k[:, :, :5], v[:, :, :5], window=2, enable_gqa=True)
    with pytest.raises(ValueError, match="do not agree"):
        windowed_attention(q[0], k[0], v[0], window=2, enable_gqa=True)
    with pytest.raises(ValueError, match="do not agree"):
        windowed_attention(torch.cat([q, q[:, :1]], dim=1), k, v, window=2, enable_gqa=True)
