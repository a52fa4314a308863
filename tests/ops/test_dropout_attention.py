"""dropout_attention: against its formula, in parts, in programs of models; its kernels: ``pytest -m gpu``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import fxpar
from fxpar.ops.dropout_attention import attend, attend_backward, dropout_attention, refusal
from fxpar.ops.rng import dropout_mask
from fxpar.sharding.deal import deal
from fxpar.testing import assert_equivalent

SEED = torch.tensor(123456789012345)
LOWEST = torch.finfo(torch.float32).min


def formula(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, *, p: float, site: int, attn_mask: Tensor | None = None,
            is_causal: bool = False, window: int | None = None, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    place, key = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    if is_causal or window:
        scores = scores.masked_fill((key > place) | (place - key >= (window or math.inf)), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).nan_to_num()
    return torch.where(dropout_mask(weights, seed, p=p, site=site), weights / (1 - p), 0.0) @ v


def operands(b: int, h: int, kv: int, length: int, keys: int, d: int, e: int, **like: Any) -> list[Tensor]:
    """Queries, keys and values that lie in memory as projections make them."""
    torch.manual_seed(0)
    shapes = (b, length, h, d), (b, keys, kv, d), (b, keys, kv, e)
    return [torch.randn(s, **like).transpose(1, 2).requires_grad_() for s in shapes]


def value_and_gradients(function: Any, args: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    out = function(*args, *rest, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), args)]


def padding(b: int, keys: int) -> Tensor:
    return torch.arange(keys) < torch.tensor([keys - 3 * i for i in range(b)])[:, None, None, None]


MASKS = {
    "none": {}, "causal": {"is_causal": True}, "window": {"window": 3}, "padding": {"attn_mask": padding(2, 9)},
    "added": {"attn_mask": torch.linspace(-1, 1, 4)[:, None, None] * (torch.arange(9)[:, None] - torch.arange(9)).abs().double()},
    "padding and causal": {"attn_mask": padding(2, 9), "is_causal": True},
    "nothing is seen": {"attn_mask": torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 9)},
}  # fmt: skip


def test_a_site_may_be_a_tensor():
    args = operands(2, 4, 2, 9, 9, 8, 5)
    options = dict(p=0.3, enable_gqa=True, is_causal=True)
    for seed in (SEED, torch.tensor(-1), torch.tensor(2**62 + 5)):
        want = value_and_gradients(dropout_attention, args, seed, site=5, **options)
        for a, b in zip(value_and_gradients(dropout_attention, args, seed, site=torch.tensor(5), **options), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mask", MASKS)
def test_equals_its_formula(mask):
    args = operands(2, 4, 2, 9, 9, 8, 5, dtype=torch.float64)
    options = dict(p=0.3, site=5, enable_gqa=True, **MASKS[mask])
    want = value_and_gradients(formula, args, SEED, **options)
    torch.testing.assert_close(value_and_gradients(dropout_attention, args, SEED, **options), want)


def test_what_drops_out_depends_on_the_seed_and_the_site():
    args = operands(1, 2, 2, 9, 9, 8, 8)
    outs = [dropout_attention(*args, torch.tensor(seed), p=0.5, site=site) for seed, site in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_parts_drop_what_the_whole_drops():
    """Rows of the batch, heads and queries of one rank, at their places in the whole."""
    q, k, v = operands(4, 6, 6, 8, 8, 4, 4, dtype=torch.float64)
    whole = dropout_attention(q, k, v, SEED, p=0.4, site=2, is_causal=True)
    grid = (((2, 2, 4),), ((3, 3, 6),), ((4, 4, 8),))
    mine = (slice(2, 4), slice(3, 6))
    part = dropout_attention(q[mine][:, :, 4:], k[mine], v[mine], SEED, p=0.4, site=2, is_causal=True, grid=grid)
    torch.testing.assert_close(part, whole[mine][:, :, 4:])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_dealt_queries_drop_what_the_whole_drops(rank):
    """A rank of three has two chunks of six, of which each query still sees what is before it."""
    q, k, v = operands(1, 2, 2, 12, 12, 4, 4, dtype=torch.float64)
    whole = dropout_attention(q, k, v, SEED, p=0.4, site=2, window=5)
    grid = (((1, 0, 1),), ((2, 0, 2),), ((4, 4 * rank, 12, 3),))
    mine = deal(q, 2, 1, 3)[:, :, 4 * rank : 4 * rank + 4]
    part = dropout_attention(mine, k, v, SEED, p=0.4, site=2, window=5, grid=grid)
    torch.testing.assert_close(part, deal(whole, 2, 1, 3)[:, :, 4 * rank : 4 * rank + 4])


def test_queries_that_do_not_follow_one_another_are_refused():
    args = operands(1, 1, 1, 4, 4, 4, 4)
    grid = (((1, 0, 1),), ((1, 0, 1),), ((2, 0, 2), (2, 0, 4)))
    with pytest.raises(AssertionError, match="follow one another"):
        dropout_attention(*args, SEED, p=0.4, site=2, grid=grid)


def test_the_logarithm_of_the_sum():
    q, k, v = (x.detach() for x in operands(2, 3, 3, 9, 9, 8, 8, dtype=torch.float64))
    mask = torch.where(padding(2, 9), 0.0, LOWEST).double().expand(2, 3, 9, 9).contiguous()
    mask[0, 0] = -math.inf
    heads = torch.arange(6).view(2, 3)
    _, top, rest = attend(q, k, v, mask, SEED, heads, 0.1, 0, 0.5, False, 0, 0, 9, False)
    torch.testing.assert_close(top + rest, torch.logsumexp(q @ k.mT * 0.5 + mask, -1))


def test_traces_forward_and_backward_as_one_operator_each():
    args = operands(1, 2, 2, 9, 9, 8, 8)

    def step(q, k, v):
        out = dropout_attention(q, k, v, SEED, p=0.3, site=1)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    called = [n.target for n in traced.graph.nodes]
    assert called.count(attend) == called.count(attend_backward) == 1
    assert not {torch.ops.aten.bmm.default, torch.ops.aten.mm.default} & set(called)
    torch.testing.assert_close(traced(*args), step(*args))


@pytest.mark.parametrize("q, k, v, options, why", [
    ((2, 9, 8), (2, 9, 8), (2, 9, 8), {}, "are not"),
    ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), {}, "do not share"),
    ((1, 2, 9, 264), (1, 2, 9, 264), (1, 2, 9, 8), {}, "wider than 128"),
    ((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), {"mask": torch.ones(3, 1, 9, 9)}, "does not broadcast"),
    ((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), {"p": 1.0}, "all weights"),
])  # fmt: skip
def test_says_what_it_cannot_compute(q, k, v, options, why):
    given = {"mask": None, "enable_gqa": False, "p": 0.1, **options}
    assert why in refusal(*(torch.empty(s) for s in (q, k, v)), **given)


def test_refuses_nothing_that_it_can_compute():
    q, k, v = (torch.empty(s, dtype=torch.bfloat16) for s in ((2, 4, 7, 256), (2, 2, 9, 256), (2, 2, 9, 64)))
    assert refusal(q, k, v, torch.ones(2, 1, 1, 9, dtype=torch.bool), True, 0.1) == ""


# ---- in models ----


def small(name: str, layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """With the dropout that the model has by default, in its attention too."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 16))
    if name == "gpt2":
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=layers, n_head=4, use_cache=False, bos_token_id=0,
                            eos_token_id=0)
        return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    bert = BertConfig(vocab_size=64, max_position_embeddings=32, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
                      intermediate_size=64)
    mask = (torch.arange(16) < torch.tensor([16, 10, 16, 3])[:, None]).long()
    return BertForMaskedLM(bert), {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_under_plans(name):
    model, inputs = small(name, 1)
    captured = fxpar.capture(model, inputs)
    graph = captured.partition(fxpar.Plan()).graph
    assert [n.target for n in graph.nodes].count(dropout_attention) == 1
    for plan in ("dp=2,tp=2", "dp=2,microbatches=2", "cp=2", "cp=4,cp_comm=a2a+p2p"):
        assert_equivalent(captured, plan, inputs)


@pytest.mark.parametrize("name, comm, how", [
    ("gpt2", "p2p", "keys and values gathered over cp"), ("bert", "a2a", "heads over cp (all-to-all)"),
])  # fmt: skip
def test_the_report_says_how_it_runs_where_a_sequence_is_split(name, comm, how):
    model, inputs = small(name, 1)
    (row,) = fxpar.inspect(model, f"cp=2,cp_comm={comm}", inputs).attention
    assert row.how == how and ("its weights drop out" in row.why) == (comm == "p2p") and min(row.sent) > 0


class Attention(nn.Module):
    """A layer of its own: an attention with dropout behind a padding mask, or a causal one."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], dropout_p=0.3)
        y = y + F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).square().mean()


def layer() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Attention(), {"x": torch.randn(4, 8, 16), "keep": torch.arange(8) < torch.tensor([8, 5, 8, 2])[:, None]}


@pytest.mark.parametrize("plan", [pytest.param("dp=2,tp=2", marks=pytest.mark.slow), "dp=2,zero=3,recompute=selective"])
def test_a_layer_as_it_runs(plan):
    model, inputs = layer()
    assert_equivalent(model, plan, inputs, lowered=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("plan", ["dp=2,tp=2", "dp=2,zero=3,recompute=full", "dp=2,tp=2,microbatches=2", "dp=2,cp=2,zero=3"])
def test_models_as_they_run(name, plan):
    model, inputs = small(name, 2)
    assert_equivalent(model, plan, inputs, lowered=True)


@pytest.mark.slow
def test_a_compiled_layer():
    model, inputs = layer()
    assert_equivalent(model, "dp=2,tp=2", inputs, backend="inductor")


# ---- on a GPU ----


SHAPES = {
    "64": (2, 4, 4, 128, 128, 64, 64), "80": (1, 2, 2, 77, 77, 80, 80), "96": (2, 2, 2, 1000, 1000, 96, 96),
    "128": (1, 2, 2, 200, 200, 128, 128), "shared keys": (2, 6, 2, 77, 77, 64, 64), "cross": (2, 2, 2, 33, 1000, 64, 32),
}  # fmt: skip
GPU_MASKS = ("none", "causal", "window", "padding", "padding and causal", "queries and keys", "added", "lowest")


def gpu_mask(mask: str, lowest: float, b: int, h: int, length: int, keys: int) -> dict[str, Any]:
    keep = torch.arange(keys) < torch.tensor([keys, 5])[:b, None, None, None]
    return {
        "none": {}, "causal": {"is_causal": True}, "window": {"window": 40}, "padding": {"attn_mask": keep},
        "padding and causal": {"attn_mask": keep, "is_causal": True},
        "queries and keys": {"attn_mask": (torch.arange(length)[:, None] * 7 + torch.arange(keys)) % 5 > 1},
        "added": {"attn_mask": torch.linspace(-1, 1, h)[:, None, None] * (torch.arange(keys) % 7)},
        "lowest": {"attn_mask": torch.where(keep & (torch.arange(h) > 0)[:, None, None], 0.0, lowest)},
    }[mask]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", GPU_MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape, mask, dtype):
    """In fp32 equal to the formula; in two bytes as near to it as the formula is in that dtype, by a small factor."""
    b, h, kv, length, keys, d, e = SHAPES[shape]
    args = operands(b, h, kv, length, keys, d, e, device="cuda")
    given = gpu_mask(mask, torch.finfo(dtype).min, b, h, length, keys)
    options = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in given.items()}
    options |= dict(p=0.3, site=5, enable_gqa=True)
    seed = SEED.cuda()
    exact = value_and_gradients(formula, [x.detach().double().requires_grad_() for x in args], seed, **options)
    narrow = [x.detach().to(dtype).requires_grad_() for x in args]
    rounded = value_and_gradients(formula, [x.detach().double().requires_grad_() for x in narrow], seed, **options)
    if isinstance(options.get("attn_mask"), Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    have = value_and_gradients(dropout_attention, narrow, seed, **options)
    again = value_and_gradients(dropout_attention, narrow, seed, **options)
    same = value_and_gradients(formula, narrow, seed, **options)
    for x, y in zip(have, again, strict=True):
        assert torch.equal(x, y)
    for made, want, inputs_rounded, all_rounded in zip(have, exact, rounded, same, strict=True):
        size = want.norm()
        allowed = 2e-5 * size if dtype == torch.float32 else 1.5 * (all_rounded - want).norm() + (inputs_rounded - want).norm()
        assert (made - want).norm() <= allowed
        assert made.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("first_row", [0, 40])
def test_kernels_of_parts(first_row):
    """Beyond 32 bits too: the local heads are the last of many."""
    q, k, v = operands(2, 3, 3, 24, 80, 64, 64, device="cuda")
    grid = (((2, 2**21 - 2, 2**21),), ((3, 3, 6),), ((24, first_row, 80),))
    seed = SEED.cuda()
    options = dict(p=0.3, site=5, is_causal=True, grid=grid)
    want = [x.cuda() for x in value_and_gradients(dropout_attention, [x.detach().cpu().requires_grad_() for x in (q, k, v)], SEED,
                                                  **options)]
    torch.testing.assert_close(value_and_gradients(dropout_attention, [q, k, v], seed, **options), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_write_no_scores(dtype):
    length = 8192
    q, k, v = operands(1, 2, 2, length, length, 64, 64, device="cuda", dtype=dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dropout_attention(q, k, v, SEED.cuda(), p=0.1, site=0, is_causal=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * length * length // 2


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_on_a_gpu(recompute, dtype):
    model, inputs = layer()
    plan = f"recompute={recompute}" + (",param_dtype=bf16" if dtype == "bf16" else "")
    module = fxpar.parallelize(model.cuda(), plan, {n: x.cuda() for n, x in inputs.items()}, backend="inductor")
    loss = module(**{n: x.cuda() for n, x in inputs.items()})
    loss.backward()
    want = fxpar.simulate(layer()[0], "dp=1", inputs).step(**inputs, seed=module.seed * 1_000_003 + 1)
    tolerance = 1e-4 if dtype == "fp32" else 3e-2
    assert abs(loss.item() - want.loss.item()) <= tolerance * abs(want.loss.item())
    for name, p in module.named_parameters():
        found = p.grad.full_tensor().cpu().float()
        assert (found - want.grads[name]).norm() <= tolerance * want.grads[name].norm()
