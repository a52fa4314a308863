"""Random small models under random plans, and under random layouts, against the plain model."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from fxpar.passes.capture.capture import capture
from fxpar.passes.pipeline import passes
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from tests.harness import MESHES, RANDOM, check_program

BATCH, LENGTH = 8, 8


class Residual(nn.Module):
    def __init__(self, inner, norm):
        super().__init__()
        self.inner, self.norm = inner, norm

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Scale(nn.Module):
    """RMSNorm as models write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Gated(nn.Module):
    def __init__(self, width, ffn, fused, act):
        super().__init__()
        self.up = nn.Linear(width, 2 * ffn, bias=fused)
        self.down = nn.Linear(ffn, width)
        self.fused, self.act = fused, act

    def forward(self, x):
        if self.fused:
            a, b = self.up(x).chunk(2, dim=-1)
        else:
            a, b = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(self.act(a) * b)


class Attention(nn.Module):
    def __init__(self, width, heads, kv, how, causal, bias):
        super().__init__()
        self.heads, self.kv, self.d, self.how, self.causal = heads, kv, width // heads, how, causal
        sizes = [heads * self.d, kv * self.d, kv * self.d]
        if how == "separate":
            self.q, self.k, self.v = (nn.Linear(width, n, bias=bias) for n in sizes)
        else:
            self.qkv = nn.Linear(width, sum(sizes), bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        b, s, _ = x.shape
        if self.how == "separate":
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.how == "interleaved" and self.heads == self.kv:
            q, k, v = (t.flatten(2) for t in self.qkv(x).view(b, s, self.heads, 3, self.d).unbind(3))
        else:
            q, k, v = self.qkv(x).split([self.heads * self.d, self.kv * self.d, self.kv * self.d], dim=-1)
        q, k, v = (t.view(b, s, -1, self.d).transpose(1, 2) for t in (q, k, v))
        if self.kv != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
        if self.how == "written out":
            scores = q @ k.transpose(-1, -2) / self.d**0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class Mixer(nn.Module):
    """A convolution over the sequence."""

    def __init__(self, width, groups):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=groups)

    def forward(self, x):
        return F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Grouped(nn.Module):
    """Normalised in groups of channels, by hand."""

    def __init__(self, width, groups):
        super().__init__()
        self.groups, self.linear = groups, nn.Linear(width, width)

    def forward(self, x):
        y = x.reshape(*x.shape[:-1], self.groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self.linear(y.flatten(-2))


class Pooled(nn.Module):
    """Adds a summary of the sequence to each of its positions."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        weights = self.linear(x).softmax(1)
        return x + (weights * x).sum(1, keepdim=True).expand_as(x)


def norm(r, width):
    return r.choice(
        [
            nn.LayerNorm,
            nn.RMSNorm,
            Scale,
            lambda n: nn.LayerNorm(n, elementwise_affine=False),
            lambda n: nn.Identity(),
        ]
    )(width)


def block(r, width):
    heads = r.choice([2, 4, 8])
    kv = r.choice([k for k in (1, 2, 4, 8) if heads % k == 0])
    ffn = r.choice([8, 16, 24, 48])
    act = r.choice([nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Tanh()])
    inner = r.choice(
        [
            lambda: Attention(
                width,
                heads,
                kv,
                r.choice(["separate", "fused", "interleaved", "written out"]),
                r.random() < 0.5,
                r.random() < 0.5,
            ),
            lambda: Attention(width, heads, heads, "separate", True, False),
            lambda: nn.Sequential(nn.Linear(width, ffn, bias=r.random() < 0.5), act, nn.Linear(ffn, width)),
            lambda: Gated(width, ffn, r.random() < 0.5, act),
            lambda: Mixer(width, r.choice([1, 2, width])),
            lambda: Grouped(width, r.choice([2, 4])),
            lambda: Pooled(width),
            lambda: nn.Linear(width, width),
        ]
    )()
    if r.random() < 0.3:
        inner = nn.Sequential(inner, nn.Dropout(0.25))
    return Residual(inner, norm(r, width)) if r.random() < 0.8 else inner


class Model(nn.Module):
    def __init__(self, r: Random):
        super().__init__()
        width = r.choice([16, 16, 24, 32])
        self.tokens = r.random() < 0.7
        self.vocab = r.choice([32, 48, 50, 64])
        if self.tokens:
            self.embed = nn.Embedding(self.vocab, width, padding_idx=r.choice([None, 0, 3]))
        else:
            self.embed = nn.Linear(6, width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.1) if r.random() < 0.5 else None
        width = width // 8 * 8
        self.blocks = nn.ModuleList(block(r, width) for _ in range(r.randint(1, 3)))
        self.norm = norm(r, width)
        self.loss = r.choice(["tokens", "tokens", "mean", "none"])
        self.head = nn.Linear(width, self.vocab if self.loss == "tokens" else 5, bias=r.random() < 0.5)
        if self.tokens and self.loss == "tokens" and r.random() < 0.4:
            self.head.weight = self.embed.weight

    def forward(self, x, labels=None):
        y = self.embed(x)
        if self.positions is not None:
            y = y + self.positions
        for layer in self.blocks:
            y = layer(y)
        y = self.head(self.norm(y))
        if self.loss == "tokens":
            return F.cross_entropy(y.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return y.pow(2).mean() if self.loss == "mean" else y


def example(r: Random):
    """A model and a global batch."""
    seed = r.getrandbits(31)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(r)
        for p in model.parameters():  # so that no gradient is zero by symmetry, and none is tiny
            p.data += 0.05 * torch.randn_like(p)
        x = torch.randint(0, model.vocab, (BATCH, LENGTH)) if model.tokens else torch.randn(BATCH, LENGTH, 6)
        inputs = {"x": x}
        if model.loss == "tokens":
            inputs["labels"] = torch.randint(0, model.vocab, (BATCH, LENGTH))
            if r.random() < 0.5:
                inputs["labels"][torch.rand(BATCH, LENGTH) < 0.3] = -100
    return model, inputs


def plan(r: Random) -> Plan:
    dp, tp = r.choice([(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (2, 4), (4, 2), (1, 8), (8, 1)])
    zero = r.choice([0, 0, 1, 2, 3])
    replicas = r.choice([n for n in (1, 1, 2, 4) if dp % n == 0])
    sequence = r.choice([None, False, True]) if tp > 1 else None
    return Plan(dp=dp, tp=tp, zero=zero, dp_replicate=replicas, sequence_parallel=sequence)


def under_a_plan(r: Random) -> None:
    model, inputs = example(r)
    if r.random() < 0.3:
        model.eval()
    assert_equivalent(model, plan(r), inputs, seed=r.getrandbits(16))


def in_any_layout(r: Random) -> None:
    """Not only the layouts that a plan leads to: any that the rules allow, value by value."""
    model, inputs = example(r)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    program = capture(model, Plan(), r.choice(MESHES), (), inputs, torch.device("cpu"))
    for name, apply in passes():
        if name == "infer":
            break
        program = apply(program)
    values = dict(model.named_parameters()) | inputs
    feeds = [
        torch.tensor(7) if s.kind == "seed" else values[s.name].detach() if s.name in values else s.value
        for s in program.sources
    ]
    check_program(program, feeds, r)


@settings(max_examples=30)
@given(RANDOM)
def test_random_models_under_random_plans(r):
    under_a_plan(r)


@settings(max_examples=24)
@given(RANDOM)
def test_random_models_in_random_layouts(r):
    in_any_layout(r)


@pytest.mark.slow
@settings(max_examples=500)
@given(RANDOM)
def test_random_models_in_random_layouts_slow(r):
    in_any_layout(r)


@pytest.mark.slow
@settings(max_examples=500)
@given(RANDOM)
def test_random_models_under_random_plans_slow(r):
    under_a_plan(r)
