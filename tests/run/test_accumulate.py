"""Gradient accumulation: the gradients of one big step, and nothing communicated that need not be."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.run import after_steps
from tests.processes import launch

pytestmark = pytest.mark.multiproc
PARTS = 3


class Net(nn.Module):
    """Weights that are used as they are, through a view, and twice; a frozen one; one that no axis divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4, bias=False)
        self.turned = nn.Parameter(torch.randn(4, 16) / 4)
        self.odd = nn.Parameter(torch.randn(3))
        self.mid.weight.requires_grad_(False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.mid(F.gelu(self.up(x)))
        logits = self.down(y) + y @ self.turned.t() + F.linear(y, self.turned) * self.odd.sum()
        return F.cross_entropy(logits, target)


def net() -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(4 * PARTS, 8), "target": torch.randint(4, (4 * PARTS,))}


class Counted:
    """Counts what the runtime communicates, by kind; a sum of one number is not counted (losses)."""

    def __init__(self, monkey: Any = GroupRuntime):
        self.seen: Counter[str] = Counter()
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            original = getattr(monkey, kind)

            def counted(runtime: Any, x: Tensor, *args: Any, kind: str = kind, original: Any = original) -> Tensor:
                self.seen[kind] += x.numel() > 1
                return original(runtime, x, *args)

            setattr(monkey, kind, counted)


def parts(module: Any, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """This replica's rows of each microbatch."""
    dp = module.plan.dp
    rows = [{k: v.chunk(PARTS)[i] for k, v in batch.items()} for i in range(PARTS)]
    return [{k: v.chunk(dp)[module.replica] for k, v in part.items()} for part in rows]


def gradients(module: Any) -> dict[str, Tensor]:
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()}


def close(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert have.keys() == want.keys()
    for name, grad in want.items():
        assert (have[name] - grad).norm() <= tolerance * grad.norm(), name


def accumulate(rank: int, plans: list[str]) -> list[Any]:
    out = []
    for plan in plans:
        model, batch = net()
        module = fxpar.parallelize(model, plan, {k: v[: 4 // fxpar.Plan.parse(plan).dp] for k, v in batch.items()})
        counted, micro = Counted(), parts(module, batch)
        with module.no_sync():
            for part in micro[:-1]:
                (module(**part) / PARTS).backward()
        (module(**micro[-1]) / PARTS).backward()
        seen = dict(counted.seen)  # before gradients are gathered to be looked at
        out.append(((gradients(module), seen), plan))
    return out


def whole_step() -> dict[str, Tensor]:
    model, batch = net()
    model(**batch).backward()
    return gradients(model)


# Communications of six parameters over three microbatches. `odd`, which no axis divides, is summed before it is used in a way
# that differs: its gradient is computed alike, from one number, and averaged.
# mid.weight is frozen; `turned` is used as it is and turned, and gathered once.
EXPECTED = {
    "dp=2": {"all_reduce": 6},
    "dp=2,zero=1": {"all_gather": 6, "reduce_scatter": 5, "all_reduce": 1},
    "dp=2,zero=2": {"all_gather": 6, "reduce_scatter": 5 * PARTS, "all_reduce": PARTS},
}


def test_the_gradients_are_those_of_one_step_and_are_communicated_once():
    for per_rank in launch(2, accumulate, [*EXPECTED, "dp=2,zero=3"]):
        for (grads, seen), plan in per_rank:
            close(grads, whole_step())
            if plan in EXPECTED:
                assert {k: n for k, n in seen.items() if n} == EXPECTED[plan], plan


@pytest.mark.slow
def test_four_ranks():
    plans = ["dp=4,dp_replicate=2,zero=1", "dp=4,dp_replicate=2,zero=2", "dp=4,dp_replicate=2,zero=3", "dp=2,tp=2,zero=1",
             "dp=2,tp=2,zero=2", "dp=2,tp=2,zero=3", "dp=4,zero=1", "dp=2,tp=2"]
    for per_rank in launch(4, accumulate, plans, timeout=400):
        for (grads, _), _plan in per_rank:
            close(grads, whole_step())


def unusual(rank: int, plan: str) -> dict[str, Any]:
    """Microbatches in unusual orders."""
    model, batch = net()
    module = fxpar.parallelize(model, plan, {k: v[:2] for k, v in batch.items()})
    first, second, last = parts(module, batch)
    with module.no_sync():
        one = module(**first)
    two = module(**second)
    ((one + two) / 2).backward()
    together = gradients(module)
    module.zero_grad()
    with module.no_sync():
        module(**first).backward()
    discarded = module(**last)  # carries what is pending, and is never differentiated
    del discarded
    module(**second).backward()
    return {"together": together, "after a discarded forward": gradients(module)}


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=1", "dp=2,zero=2"])
def test_unusual_orders(plan: str):
    model, batch = net()
    rows = [{k: v.chunk(PARTS)[i] for k, v in batch.items()} for i in (0, 1)]
    sum(model(**r) for r in rows).backward()
    want = gradients(model)
    for have in launch(2, unusual, plan):
        close(have["after a discarded forward"], want)
        close(have["together"], {n: g / 2 for n, g in want.items()})


def changing(rank: int, plan: str) -> list[float]:
    """Losses while parameters change inside of `no_sync`."""
    model, batch = net()
    module = fxpar.parallelize(model, plan, {k: v[:2] for k, v in batch.items()})
    (part, *_) = parts(module, batch)
    losses = []
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5, foreach=True)
    module(**part).backward()
    with module.no_sync():
        losses.append(module(**part).item())
        optimizer.step()
        losses.append(module(**part).item())
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.5)
        losses.append(module(**part).item())
        with torch.no_grad():
            torch._foreach_mul_([*module.parameters()], 1.5)
        losses.append(module(**part).item())
    return losses


@pytest.mark.slow
def test_changed_parameters_are_gathered_again():
    want = launch(2, changing, "dp=2")
    assert len({round(loss, 4) for loss in want[0]}) == 4
    for plan in ("dp=2,zero=1", "dp=2,zero=2"):
        for have, other in zip(launch(2, changing, plan), want, strict=True):
            assert have == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_sums_over_microbatches_are_wide():
    """bfloat16 gradients of microbatches are added up in the reduction dtype."""
    (wide, *_), (sums, *_) = launch(2, narrow, "dp=2,zero=1"), launch(2, narrow, "dp=2,zero=3")
    del sums["odd"]  # it becomes one number, in bfloat16, before ranks differ
    for name, grad in sums.items():
        assert wide[name].dtype is torch.float32
        assert (wide[name] - grad).norm() <= 1e-3 * grad.norm(), name


def narrow(rank: int, plan: str) -> dict[str, Tensor]:
    model, batch = net()
    plan += ",param_dtype=bf16,reduce_dtype=fp32"
    module = fxpar.parallelize(model, plan, {k: v[:2] for k, v in batch.items()})
    *others, last = parts(module, batch)
    with module.no_sync():
        for part in others:
            module(**part).backward()
    module(**last).backward()
    return gradients(module)


class Unversioned(torch.optim.Optimizer):
    """Writes where no version of a tensor tells."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.to_local().data.mul_(0.5)


def told() -> int:
    """How many objects are told of optimizers' steps."""
    return len(after_steps._told)


def unversioned(rank: int, plan: str) -> tuple[list[float], list[int]]:
    before = told()
    model, batch = net()
    part = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
    module = fxpar.parallelize(model, plan, part)
    losses, counts = [], [before, told()]
    module(**part).backward()
    with module.no_sync():
        losses.append(module(**part).item())
        Unversioned(module.parameters()).step()
        losses.append(module(**part).item())
    del module
    gc.collect()
    gc.collect()  # what autograd's graph alone held
    return losses, [*counts, told()]


@pytest.mark.slow
def test_any_optimizers_step_makes_kept_values_invalid_and_nobody_is_told_for_longer_than_a_module_lives():
    (want, none), _ = launch(2, unversioned, "dp=2,zero=3")
    (have, counts), _ = launch(2, unversioned, "dp=2,zero=1")
    assert have == pytest.approx(want, rel=1e-6) and abs(have[0] - have[1]) > 1e-4
    for before, meanwhile, afterwards in (none, counts):
        assert before == afterwards == 0 < meanwhile
