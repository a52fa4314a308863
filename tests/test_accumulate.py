"""Gradient accumulation: the gradients of one big step, and nothing communicated that need not be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.backends.runtime import GroupRuntime
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
    at = module.mesh["dp"].get_local_rank() if dp > 1 else 0
    rows = [{k: v.chunk(PARTS)[i] for k, v in batch.items()} for i in range(PARTS)]
    return [{k: v.chunk(dp)[at] for k, v in part.items()} for part in rows]


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
        out.append((gradients_after_count(counted, module), plan))
    return out


def gradients_after_count(counted: Counted, module: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    seen = dict(counted.seen)
    return gradients(module), seen


def whole_step() -> dict[str, Tensor]:
    model, batch = net()
    model(**batch).backward()
    return gradients(model)


# Communications of six parameters over three microbatches. Gathered are up (2), mid (2), down and turned; mid.weight is frozen;
# `odd` and its sum are whole: it is all-reduced.
EXPECTED = {
    "dp=2": {"all_reduce": 6},
    "dp=2,zero=1": {"all_gather": 6, "reduce_scatter": 5, "all_reduce": 1},
    "dp=2,zero=2": {"all_gather": 6, "reduce_scatter": 5 * PARTS, "all_reduce": PARTS},
}


def test_two_ranks():
    for per_rank in launch(2, accumulate, [*EXPECTED, "dp=2,zero=3"]):
        for (grads, seen), plan in per_rank:
            close(grads, whole_step())
            print(plan, seen)
