"""Random operators: as PyTorch's are distributed, and the same numbers under every plan as on one device."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from fxpar.compiler import capture
from fxpar.errors import CaptureError, UnsupportedOperator
from fxpar.plan import Plan
from fxpar.testing import assert_equivalent
from fxpar.verify.simulation import simulate
from tests.harness import RANDOM

N = 20_000


class Of(nn.Module):
    """A module that computes a function of what one linear layer makes."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)

    def forward(self, x):
        return self.function(self.linear(x), x)


def values(function, dtype=torch.float32):
    """What a function of a tensor of N zeros draws."""
    out = simulate(Of(lambda h, x: (function(x.new_zeros(N, dtype=dtype)), h.sum())), "dp=1", (torch.ones(2, 8),))
    return out.step(torch.ones(2, 8)).outputs[0]


MOMENTS = {  # mean, variance
    "rand": (lambda x: torch.rand(N), 1 / 2, 1 / 12),
    "rand_like": (torch.rand_like, 1 / 2, 1 / 12),
    "uniform_": (lambda x: x.uniform_(-1, 3), 1, 16 / 12),
    "randn": (lambda x: torch.randn(N), 0, 1),
    "randn_like": (torch.randn_like, 0, 1),
    "normal_": (lambda x: x.normal_(2, 3), 2, 9),
    "normal of a mean": (lambda x: torch.normal(x + 2, 3.0), 2, 9),
    "normal of a deviation": (lambda x: torch.normal(1.0, x + 2), 1, 4),
    "normal of both": (lambda x: torch.normal(x + 1, x + 2), 1, 4),
    "normal of numbers": (lambda x: torch.normal(1.0, 2.0, (N,)), 1, 4),
    "log_normal_": (lambda x: x.log_normal_(0, 0.5).log(), 0, 0.25),
    "exponential_": (lambda x: x.exponential_(2), 1 / 2, 1 / 4),
    "geometric_": (lambda x: x.geometric_(0.25), 4, 12),
    "cauchy_": (lambda x: (x.cauchy_(1, 2) > 1).float(), 1 / 2, 1 / 4),
    "bernoulli_": (lambda x: x.bernoulli_(0.9), 0.9, 0.09),
    "bernoulli of probabilities": (lambda x: torch.bernoulli(x + 0.9), 0.9, 0.09),
    "bernoulli_ of probabilities": (lambda x: x.bernoulli_(x + 0.25), 0.25, 3 / 16),
    "randint": (lambda x: torch.randint(5, (N,)), 2, 2),
    "randint from": (lambda x: torch.randint(-3, 2, (N,)), -1, 2),
    "randint_like": (lambda x: torch.randint_like(x, 5), 2, 2),
    "randint_like from": (lambda x: torch.randint_like(x, 2, 7), 4, 2),
    "random_": (lambda x: x.random_(), 2**23, 2**48 / 12),
    "random_ to": (lambda x: x.random_(5), 2, 2),
    "random_ from": (lambda x: x.random_(2, 7), 4, 2),
    "randperm": (lambda x: torch.randperm(N)[:100] / N, 1 / 2, 1 / 12),
    "multinomial": (lambda x: torch.multinomial(torch.tensor([1.0, 0.0, 3.0]).expand(N, 3), 1), 1.5, 0.75),
    "multinomial with replacement": (lambda x: torch.multinomial(torch.tensor([1.0, 0, 3]), N, replacement=True), 1.5, 0.75),
    "rrelu": (lambda x: F.rrelu(x - 1, 0, 1, training=True), -1 / 2, 1 / 12),
    "gumbel": (lambda x: -torch.empty_like(x).exponential_().log(), 0.5772156649, math.pi**2 / 6),
}


def test_numbers_are_distributed_as_pytorchs():
    model = Of(lambda h, x: ({n: function(x.new_zeros(N)) for n, (function, _, _) in MOMENTS.items()}, h.sum()))
    run = simulate(model, "dp=1", (torch.ones(2, 8),))
    one, other = (run.step(torch.ones(2, 8), seed=seed).outputs[0] for seed in (0, 1))
    for name, (_, mean, variance) in MOMENTS.items():
        made = one[name].double()
        assert abs(made.mean() - mean) < 5 * math.sqrt(variance / made.numel()), name
        assert made.numel() < N or abs(made.var() / variance - 1) < 0.25, name
        assert not torch.equal(one[name], other[name]), name


def test_what_is_drawn_has_the_dtype_that_pytorch_gives_it():
    drawn = values(lambda x: (torch.randint_like(x, 3), torch.randint(3, (2,)), torch.bernoulli(x), torch.randperm(4),
                              torch.rand(2, dtype=torch.float64), x.int().random_(), x.bool().bernoulli_()), torch.bfloat16)
    assert [t.dtype for t in drawn] == [torch.bfloat16, torch.int64, torch.bfloat16, torch.int64, torch.float64, torch.int32,
                                        torch.bool]


def test_samples_without_replacement_are_distinct():
    weights = torch.arange(6.0)
    picked = values(lambda x: torch.multinomial(weights.expand(200, 6), 5))
    assert torch.equal(picked.sort(-1).values, torch.arange(1, 6).expand(200, 5))
    assert (picked[:, 0] == 5).sum() > (picked[:, 0] == 1).sum()
    assert torch.equal(values(lambda x: torch.randperm(50)).sort().values, torch.arange(50))


def test_no_gradient_goes_through_a_draw():
    x = torch.rand(4, 8)
    model = Of(lambda h, x: h.sum() + torch.bernoulli(h.sigmoid()).sum() + torch.normal(h, 1.0).sum())
    step = simulate(model, "dp=2", (x,)).step(x)
    assert torch.allclose(step.grads["linear.bias"], torch.full((8,), 4.0))


def test_draws_of_a_forward_and_of_its_dropout_differ():
    drop = values(lambda x: (F.dropout(x + 1, 0.5) > 0, torch.rand(N) >= 0.5, torch.rand(N) >= 0.5))
    same = [(a == b).double().mean().item() for a, b in ((drop[0], drop[1]), (drop[1], drop[2]))]
    assert all(abs(share - 0.5) < 5 / (2 * math.sqrt(N)) for share in same)


class Net(nn.Module):
    """Two residual blocks over [batch, sequence, hidden], with noise in many places."""

    def __init__(self, r, known):
        super().__init__()
        self.noises = [r.choice(known) for _ in range(3)]
        self.up, self.down, self.qkv, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        h = NOISES[self.noises[0]](x)
        h = h + self.down(NOISES[self.noises[1]](torch.relu(self.up(h))))
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return NOISES[self.noises[2]](h).square().mean()


def drop_path(h):
    return h * h.new_empty((h.shape[0], *[1] * (h.dim() - 1))).bernoulli_(0.7).div_(0.7)


def masked(h):
    order = torch.rand(h.shape[0], h.shape[1], device=h.device).argsort(1)[:, :4]
    return h + h.gather(1, order[..., None].expand(-1, -1, h.shape[2])).mean(1, keepdim=True)


def timestep(h):
    t = torch.randint(0, 10, (h.shape[0],), device=h.device)
    return h * (t[:, None, None] / 10) + torch.randn_like(h)


def gumbel(h):
    return h * F.gumbel_softmax(h, tau=0.7, hard=True)


def sampled(h):
    picks = torch.multinomial(h.softmax(-1).flatten(0, 1), 2).view(*h.shape[:2], 2)
    return h + h.gather(-1, picks).sum(-1, keepdim=True)


def shuffled(h):
    return h + h[torch.randperm(h.shape[0])]


def reparameterised(h):
    mean, log = h.chunk(2, -1)
    z = mean + torch.randn_like(mean) * (0.5 * log).exp()
    return torch.cat([z, mean], -1)


NOISES = {f.__name__: f for f in (drop_path, masked, timestep, gumbel, sampled, shuffled, reparameterised)} | {
    "of channels": lambda h: h + torch.rand(h.shape[-1], device=h.device),
    "one number": lambda h: h * torch.rand((), device=h.device),
    "in place": lambda h: h + torch.zeros_like(h).exponential_(),
    "of a part": lambda h: h + torch.cat([torch.randn_like(h[:, :3]), torch.zeros_like(h[:, 3:])], 1),
    "of rows": lambda h: h + torch.randn(h.shape[0] * h.shape[1], 1, device=h.device).view(*h.shape[:2], 1),
    "dropout": lambda h: F.dropout(h, 0.3),
    "distribution": lambda h: h + torch.distributions.Normal(h, h.exp()).rsample(),
}
ACROSS = {"shuffled"}
"""What takes rows of several microbatches together."""
PLANS = ("dp=2", "tp=2", "dp=2,tp=2,zero=3", "cp=2", "dp=2,microbatches=2", "tp=2,microbatches=4", "dp=2,cp=2,zero=1",
         "pp=2,microbatches=2", "dp=4,zero=2")


def random_case(r, plans, lowered=0.0):
    torch.manual_seed(r.made_by % 2**31)
    plan = Plan.parse(r.choice(plans))
    model = Net(r, sorted(NOISES.keys() - ACROSS if plan.microbatches > 1 else NOISES))
    assert_equivalent(model, plan, (torch.randn(8, 8, 8),), lowered=plan.pp > 1 or r.random() < lowered, seed=r.randrange(2**40))


@settings(max_examples=3)
@given(RANDOM)
def test_plans_draw_what_one_device_draws(r):
    random_case(r, [plan for plan in PLANS if "pp" not in plan])


@pytest.mark.slow
@settings(max_examples=150)
@given(RANDOM)
def test_many_plans_draw_what_one_device_draws(r):
    random_case(r, PLANS, lowered=0.3)


def seeded(h, x):
    torch.manual_seed(3)
    return (h + torch.rand_like(h)).sum()


def forked(h, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (h + torch.rand_like(h)).sum()


def restored(h, x):
    state = torch.get_rng_state()
    y = h + torch.rand_like(h)
    torch.set_rng_state(state)
    return y.sum()


REFUSED = {
    "poisson": (lambda h, x: (h + torch.poisson(x.abs())).sum(), UnsupportedOperator, "torch.rand"),
    "gamma": (lambda h, x: (h + torch._standard_gamma(x.abs())).sum(), UnsupportedOperator, "outside"),
    "complex": (lambda h, x: (h + torch.randn(x.shape, dtype=torch.complex64).real).sum(), UnsupportedOperator, "outside"),
    "generator": (lambda h, x: (h + torch.randn(x.shape, generator=GENERATOR)).sum(), CaptureError, "outside of"),
    "generator in place": (lambda h, x: (h + x.clone().normal_(generator=GENERATOR)).sum(), CaptureError, "outside of"),
    "seed": (seeded, CaptureError, "manual_seed"),
    "seed of a fork": (forked, CaptureError, "manual_seed"),
    "state": (restored, CaptureError, "torch.get_rng_state inside of the forward.*module.seed"),
    "initial seed": (lambda h, x: (h * (torch.initial_seed() % 7)).sum(), CaptureError, "torch.initial_seed"),
    "new seed": (lambda h, x: (h * (torch.seed() % 7)).sum(), CaptureError, "torch.seed"),
    "seed of a generator": (lambda h, x: h.sum() * torch.default_generator.initial_seed(), CaptureError, "torch.initial_seed"),
}
GENERATOR = torch.Generator()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_counted_is_refused_with_its_line(name):
    function, kind, words = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(kind, match=words) as error:
        simulate(Of(function), "dp=2", (torch.rand(4, 8),))
    assert "test_random.py" in error.value.where


def test_a_trace_leaves_pytorchs_generator_alone():
    model = Of(lambda h, x: (h + torch.randn_like(h)).sum())
    before = torch.get_rng_state()
    capture(model, (torch.zeros(4, 8),))
    assert torch.equal(before, torch.get_rng_state())
