"""Attention of some chunks of queries to all keys, against attention with a mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxpar.ops.ring.chunks import attention_of_chunks


def expected(q, k, v, starts, causal, window, ids):
    """With a mask, in float64; 0 for a query that sees no key."""
    length = q.shape[2] // len(starts)
    at = torch.cat([torch.arange(s, s + length) for s in starts])[:, None]
    key = torch.arange(k.shape[2])
    seen = (key <= at) if causal else torch.ones(len(at), k.shape[2], dtype=torch.bool)
    seen = (seen & (key > at - window) if window else seen)[None, None]
    if "q_segments" in ids:
        seen = seen & (ids["q_segments"][:, None, :, None] == ids["kv_segments"][:, None, None])
    if "kv_valid" in ids:
        seen = seen & ids["kv_valid"][:, None, None]
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen, enable_gqa=True)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0)


@given(st.integers(0, 3), st.booleans(), st.sampled_from([None, 1, 3, 7]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_it_is_attention_with_a_mask(rank, causal, window, packed, padded, seed):
    torch.manual_seed(seed)
    window = window if causal else None
    starts = [4 * rank, 4 * (7 - rank)]
    q, k, v = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 32, 8), torch.randn(2, 2, 32, 6)
    ids = {}
    if packed:
        segments = torch.randint(0, 2, (1, 32)).cumsum(1)
        mine = torch.cat([segments[:, s : s + 4] for s in starts], 1)
        ids = {"q_segments": mine, "kv_segments": segments}
    if padded:
        ids["kv_valid"] = torch.rand(2, 32) < 0.8
    given_, plain = ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
    out = attention_of_chunks(*given_, starts, causal=causal, window=window, **ids)
    want = expected(*plain, starts, causal, window, ids)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    cotangent = torch.randn_like(out)
    mine, its = torch.autograd.grad(out, given_, cotangent), torch.autograd.grad(want, plain, cotangent.double())
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("turned", range(3))
def test_operands_may_lie_in_memory_as_they_like(turned):
    """Kernels that are called directly take for granted that the elements of a head lie side by side."""
    torch.manual_seed(0)
    operands = [torch.randn(2, h, n, 8) for h, n in ((4, 8), (2, 32), (2, 32))]
    other = [x.mT.contiguous().mT if i == turned else x for i, x in enumerate(operands)]
    leaves = [[x.detach().requires_grad_() for x in mine] for mine in (operands, other)]
    outs = [attention_of_chunks(*mine, [4, 28], causal=True) for mine in leaves]
    torch.testing.assert_close(outs[0], outs[1])
    cotangent = torch.randn_like(outs[0].mT).mT
    grads = [torch.autograd.grad(o, mine, cotangent) for o, mine in zip(outs, leaves, strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compilers_are_told_its_shapes():
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 8), (2, 32), (2, 32)))
    torch.library.opcheck(torch.ops.fxpar.attention_of_chunks.default, (q, k, v, None, None, None, [0, 28], True, None, None),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


def test_a_gradient_of_a_gradient_is_refused():
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(attention_of_chunks(q, q, q, [0], causal=True).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients of attention of chunks"):
        grad.sum().backward()
