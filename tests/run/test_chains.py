"""Several parallel modules in one step: what is fed from one into another, losses inside and outside, gradients of inputs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from fxpar.errors import InputError
from tests.harness import RANDOM
from tests.processes import launch

pytestmark = pytest.mark.multiproc

PLANS = {"dp=2": 2, "tp=2": 2, "dp=2,tp=2": 4, "dp=2,zero=1": 2, "dp=2,zero=2": 2, "dp=2,zero=3": 2}
ROWS, WIDTH = 8, 8


class Block(nn.Module):
    """An MLP with a residual stream and, if it is given a target, a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        y = x + self.down(torch.tanh(self.up(x)))
        return y if target is None else (F.mse_loss(y, target), y)


class Scaled(nn.Module):
    """Features that tp leaves split, and a learned number that all replicas have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.table = nn.Linear(WIDTH, 16), nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tanh(self.up(x)), self.scale.exp(), self.table * 2


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Shifted(nn.Module):
    """Adds a value that has no batch dim."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.out(x + shift)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def parallel(model: nn.Module, plan: str, *example: Tensor) -> fxpar.ParallelModule:
    return fxpar.parallelize(model, plan, example, backend="eager")


def mine(t: Tensor, plan: str, module: Any) -> Tensor:
    """The rows of this rank's replica."""
    return t.chunk(fxpar.Plan.parse(plan).dp)[module.replica]


def outside(t: Tensor) -> Tensor:
    """As plain operators take it: a full tensor, where tp splits it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def full(t: Tensor) -> Tensor:
    return outside(t).detach().clone()


def gradients(*modules: nn.Module) -> list[dict[str, Tensor]]:
    return [{n: full(p.grad) for n, p in m.named_parameters() if p.grad is not None} for m in modules]


def close(have: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert have.keys() == want.keys()
        have, want = list(have.values()), list(want.values())
    if isinstance(want, list | tuple):
        assert len(have) == len(want)
        for one, other in zip(have, want, strict=True):
            close(one, other)
    else:
        assert have.shape == want.shape and (have - want).norm() <= 1e-5 * want.norm() + 1e-9, f"{have} instead of {want}"


# ---- programs of several modules, at random ----


def between(r: Random, x: Tensor) -> Tensor:
    """Plain operators that keep rows apart, or none."""
    if r.random() < 0.3:
        return x
    x = outside(x)
    return r.choice([lambda: 2 * x, lambda: torch.sin(x), lambda: x.flip(1), lambda: x - x.mean(1, keepdim=True),
                     lambda: x.reshape(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH)])()


def chain(r: Random, modules: list[nn.Module], z: Tensor, target: Tensor) -> Tensor:
    """A loss: values go through modules in any order, some twice, and losses are made of them inside and outside."""
    values, losses = [z], []
    for _ in range(r.randint(1, 4)):
        module, start = r.choice(modules), r.choice(values[-2:])
        x = between(r, start.detach() if r.random() < 0.2 else start)
        if r.random() < 0.3 and len(values) > 1 and not (start is z and z.requires_grad):
            x = outside(x) + outside(r.choice(values[1:]))
        if r.random() < 0.4:
            loss, y = module(x, target)
            losses.append(loss)
        else:
            y = module(x)
        values.append(y)
        if r.random() < 0.4:
            losses.append(F.smooth_l1_loss(outside(between(r, y)), target))
    return torch.stack([*losses, F.mse_loss(outside(values[-1]), target)]).sum()


def program(seed: int, modules: list[nn.Module], z: Tensor, target: Tensor, parts: int) -> dict[str, Any]:
    """One step of such a program, in microbatches, with some modules frozen."""
    r = Random(seed)
    for module in modules:
        module.zero_grad()
        module.requires_grad_(r.random() < 0.8)
    z = z.clone().requires_grad_(r.random() < 0.5)
    microbatches, total = r.choice([1, 1, 2]), 0.0
    for k, (rows, wanted) in enumerate(zip(z.chunk(microbatches), target.chunk(microbatches), strict=True)):
        with contextlib.ExitStack() as stack:
            if k < microbatches - 1 and parts:
                for module in modules:
                    stack.enter_context(module.no_sync())
            loss = chain(Random(seed), modules, rows, wanted) / microbatches
            if loss.requires_grad:
                loss.backward()
        total += loss.item()
    return {"loss": torch.tensor(total, dtype=torch.float64), "gradients": gradients(*modules), "input": z.grad}


def programs(rank: int, plan: str, seeds: list[int]) -> list[dict[str, Any]]:
    size = ROWS // fxpar.Plan.parse(plan).dp
    modules = [parallel(plain(Block, i), plan, torch.randn(size, WIDTH)) for i in range(3)]
    z, target = (mine(seeded(s, ROWS, WIDTH), plan, modules[0]) for s in (10, 11))
    return [program(seed, modules, z, target, 1) for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=2, phases=[Phase.generate])
@given(RANDOM)
def test_any_chain_of_modules_is_that_of_one_device(plan, r):
    seeds = [r.randrange(1 << 30) for _ in range(6)]
    modules = [plain(Block, i) for i in range(3)]
    want = [program(seed, modules, seeded(10, ROWS, WIDTH), seeded(11, ROWS, WIDTH), 0) for seed in seeds]
    ranks = launch(PLANS[plan], programs, plan, seeds)
    dp = fxpar.Plan.parse(plan).dp
    for i, one in enumerate(want):
        close(torch.stack([have[i]["loss"] for have in ranks]).mean(), one["loss"])
        for rank, have in enumerate(ranks):
            close(have[i]["gradients"], one["gradients"])
            assert (have[i]["input"] is None) == (one["input"] is None)
            if one["input"] is not None:
                close(have[i]["input"], one["input"].chunk(dp)[rank * dp // PLANS[plan]])


# ---- generator and discriminator ----


def adversarial(modules: list[nn.Module], noise: Tensor, real: Tensor, mix: Tensor) -> list[Any]:
    """A step of a discriminator with a gradient penalty, and one of a generator."""
    generator, critic, head = modules
    fake = outside(generator(noise))

    def judge(x: Tensor) -> Tensor:
        return outside(head(critic(x)[0]))

    between = (mix * real + (1 - mix) * fake.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
    (F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean() + 10 * penalty).backward()
    first = gradients(*modules)
    for module in modules:
        module.zero_grad()
    critic.requires_grad_(False)
    F.softplus(-judge(fake)).mean().backward()
    return [first, gradients(*modules), slope.detach()]


def adversarial_data() -> list[Tensor]:
    mix = torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(2))
    return [seeded(0, ROWS, WIDTH), seeded(1, ROWS, WIDTH), mix]


def adversarial_ranks(rank: int, plan: str) -> list[Any]:
    size = ROWS // fxpar.Plan.parse(plan).dp
    modules = [parallel(plain(kind), plan, torch.randn(size, width)) for kind, width in ((Block, 8), (Scaled, 8), (Head, 16))]
    return adversarial(modules, *(mine(t, plan, modules[0]) for t in adversarial_data()))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,tp=2", "dp=2", "tp=2", "dp=2,zero=2"])
def test_gradient_penalties_and_a_frozen_discriminator(plan):
    want = adversarial([plain(Block), plain(Scaled), plain(Head)], *adversarial_data())
    dp = fxpar.Plan.parse(plan).dp
    for rank, have in enumerate(launch(PLANS[plan], adversarial_ranks, plan)):
        close(have[:2], want[:2])
        close(have[2], want[2].chunk(dp)[rank * dp // PLANS[plan]])


# ---- several calls of one module ----


def twice(module: nn.Module, z: Tensor, split: bool) -> list[Any]:
    """Three microbatches; in the last the module is called twice, for two losses."""
    first, second, third = z.chunk(3)
    with contextlib.ExitStack() as stack:
        if split:
            stack.enter_context(module.no_sync())
        for rows in (first, second):
            outside(module(rows)).square().mean().backward()
    losses = [outside(module(rows)).square().mean() for rows in (third, 2 * third)]
    losses[1].backward()
    losses[0].backward()
    return gradients(module)


def twice_ranks(rank: int, plan: str) -> list[Any]:
    module = parallel(plain(Block), plan, torch.randn(2, WIDTH))
    return twice(module, torch.cat([mine(part, plan, module) for part in seeded(0, 12, WIDTH).chunk(3)]), True)


@pytest.mark.parametrize("plan", ["dp=2,zero=1", *(pytest.param(p, marks=pytest.mark.slow) for p in ("dp=2", "dp=2,zero=2"))])
def test_two_calls_in_the_last_microbatch(plan):
    for have in launch(2, twice_ranks, plan):
        close(have, twice(plain(Block), seeded(0, 12, WIDTH), False))


# ---- gradients of inputs ----


def of_inputs(module: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """What an input's gradient is after a backward, and what is asked for by `torch.autograd.grad`."""
    found = []
    for loss in (lambda x: module(x, target)[0], lambda x: F.mse_loss(outside(module(x)), target),
                 lambda x: F.mse_loss(outside(module(x, target)[1]), target) + module(x, target)[0]):
        leaf = x.clone().requires_grad_()
        loss(leaf * 3).backward()
        found.append(leaf.grad)
    leaf = x.clone().requires_grad_()
    found += torch.autograd.grad(outside(module(leaf)).square().sum(), leaf)  # rows do not know of each other
    found += torch.autograd.grad(module(leaf, target)[0], leaf)
    return found


def inputs_ranks(rank: int, plan: str) -> list[Tensor]:
    module = parallel(plain(Block), plan, torch.randn(ROWS // fxpar.Plan.parse(plan).dp, WIDTH))
    return of_inputs(module, *(mine(seeded(s, ROWS, WIDTH), plan, module) for s in (0, 1)))


@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,tp=2"])
def test_inputs_have_the_gradients_of_one_device(plan):
    dp = fxpar.Plan.parse(plan).dp
    want = of_inputs(plain(Block), seeded(0, ROWS, WIDTH), seeded(1, ROWS, WIDTH))
    for rank, have in enumerate(launch(PLANS[plan], inputs_ranks, plan)):
        close(have, [t.chunk(dp)[rank * dp // PLANS[plan]] for t in want])


# ---- what all replicas have in common ----


def in_common(module: nn.Module, x: Tensor, target: Tensor) -> list[Any]:
    features, scale, table = map(outside, module(x))
    F.mse_loss(features * scale + table, target).backward()
    return gradients(module)


def common_ranks(rank: int, plan: str) -> list[Any]:
    module = parallel(plain(Scaled), plan, torch.randn(ROWS // fxpar.Plan.parse(plan).dp, WIDTH))
    return in_common(module, mine(seeded(0, ROWS, WIDTH), plan, module), mine(seeded(1, ROWS, 16), plan, module))


@pytest.mark.parametrize("plan", PLANS)
def test_outputs_without_a_batch_may_be_used_outside(plan):
    want = in_common(plain(Scaled), seeded(0, ROWS, WIDTH), seeded(1, ROWS, 16))
    for have in launch(PLANS[plan], common_ranks, plan):
        close(have, want)


# ---- a plain module before, between and behind ----


def through(plain_ones: list[nn.Module], parallels: list[nn.Module], x: Tensor, target: Tensor, inside: bool) -> Tensor:
    x = outside(parallels[0](plain_ones[0](x)))
    x = plain_ones[1](x)
    loss, y = parallels[1](x, target)
    return loss if inside else F.mse_loss(plain_ones[2](outside(y)), target)


def plain_ranks(rank: int, inside: bool) -> tuple[list[Any], list[str]]:
    parallels = [parallel(plain(Block, i), "dp=2", torch.randn(4, WIDTH)) for i in range(2)]
    plain_ones = [plain(Block, i) for i in (2, 3, 4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for module in [*parallels, *plain_ones]:
                module.zero_grad()
            x, target = (mine(seeded(s, ROWS, WIDTH), "dp=2", parallels[0]) for s in (0, 1))
            through(plain_ones, parallels, x, target, inside).backward()
    for module in plain_ones:
        for p in module.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= 2
    return gradients(*parallels, *plain_ones), [str(w.message) for w in caught if "no parallel module" in str(w.message)]


@pytest.mark.parametrize("inside", [False, True])
def test_parameters_of_plain_modules_are_averaged_as_in_ddp(inside):
    parallels, plain_ones = [plain(Block, i) for i in range(2)], [plain(Block, i) for i in (2, 3, 4)]
    through(plain_ones, parallels, seeded(0, ROWS, WIDTH), seeded(1, ROWS, WIDTH), inside).backward()
    for have, said in launch(2, plain_ranks, inside):
        close(have, gradients(*parallels, *plain_ones))
        assert len(said) == 2 and "input 'x' of Block was computed with 4 parameters of no parallel module" in said[0]


# ---- what is refused, and what a user does besides ----


def refusals(rank: int) -> list[str]:
    blocks = [parallel(plain(Block), plan, torch.randn(4, WIDTH)) for plan in ("dp=2", "dp=2", "tp=2")]
    shifted = fxpar.parallelize(plain(Shifted), "dp=2", {"x": torch.randn(4, 6), "shift": torch.randn(6)}, backend="eager")
    x, target, delta = torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.zeros(4, WIDTH, requires_grad=True)
    loss, y = blocks[0](delta, target)
    calls: list[Callable[[], Any]] = [
        lambda: blocks[2](blocks[0](x)),
        lambda: blocks[0](outside(blocks[2](x))),
        lambda: shifted(x[:, :6], blocks[0](x).mean(0)[:6]),
        lambda: blocks[1](blocks[0](x) + delta).sum().backward(),
        lambda: torch.autograd.grad(loss + y.sum(), delta),
    ]
    said = []
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        said.append(str(error.value))
    return said


def test_what_cannot_be_right_is_refused():
    for said in launch(2, refusals):
        assert "input 'x' of Block (plan tp=2) comes from Block (plan dp=2), which has other ranks pass the same part" in said[0]
        assert "input 'x' of Block (plan dp=2) comes from Block (plan tp=2)" in said[1]
        assert "input 'shift' of Shifted has no batch dim" in said[2] and "Plan(batch_dims)" in said[2]
        assert "input 'x' of Block was computed from tensors that require grad along with outputs" in said[3]
        assert "adds a loss of the model" in said[4] and "ask for that of each by itself" in said[4]


def habits(rank: int) -> list[Any]:
    module = parallel(plain(Block), "dp=2", torch.randn(4, WIDTH))
    loss, y = module(*(mine(seeded(s, ROWS, WIDTH), "dp=2", module) for s in (0, 1)))
    loss /= 2
    loss.backward()
    return [gradients(module), y.detach()]


def test_outputs_are_the_replicas_rows_and_may_be_written_to():
    model = plain(Block)
    loss, y = model(seeded(0, ROWS, WIDTH), seeded(1, ROWS, WIDTH))
    (loss / 2).backward()
    for rank, have in enumerate(launch(2, habits)):
        close(have, [gradients(model), y.detach().chunk(2)[rank]])
