"""Cases of ring attention, cut for ranks and put together again, and the same attention on one device in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from fxpar.ops.ring.algorithm import Rank, backward, forward
from fxpar.ops.ring.drive import lock_step
from fxpar.ops.ring.operator import rank_of
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.ring.sight import Ids

NAMES = ("q", "k", "v", "q_segments", "kv_segments", "kv_valid")


@dataclass
class Case:
    """Whole tensors of attention over `ranks` ranks, and the cotangent of its result. settings: causal, zigzag, window, scale."""

    ranks: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(7)
        self.grad = torch.randn(*self.q.shape[:3], self.v.shape[3], generator=gen).to(self.q)
        get = self.settings.get
        self.schedule = RingSchedule(self.ranks, self.q.shape[2] // self.ranks, self.k.shape[2] // self.ranks,
                                     get("causal", False), get("zigzag", False), get("window"))

    def to(self, *args: Any) -> Case:
        """With operands and ids elsewhere, or operands of another dtype."""
        ids = {name: t.to(args[0]) if not isinstance(args[0], torch.dtype) else t for name, t in self.ids.items()}
        return Case(self.ranks, self.q.to(*args), self.k.to(*args), self.v.to(*args), ids, self.settings)

    def cut(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """A rank's part."""
        parts = x.chunk(self.ranks * self.schedule.chunks, dim)
        return torch.cat([parts[i] for i in self.schedule.chunks_of(rank)], dim)

    def glued(self, parts: Sequence[Tensor], dim: int = 2) -> Tensor:
        """The whole of all ranks' parts."""
        chunks = {i: c for rank, part in enumerate(parts)
                  for i, c in zip(self.schedule.chunks_of(rank), part.chunk(self.schedule.chunks, dim), strict=True)}
        return torch.cat([chunks[i] for i in range(len(chunks))], dim)

    def operands(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A rank's q, k and v, which want gradients."""
        q, k, v = (self.cut(x, rank).requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v

    def ids_of(self, rank: int) -> dict[str, Tensor]:
        return {name: self.cut(t, rank, 1) for name, t in self.ids.items()}

    def rank(self, rank: int) -> Rank:
        """What the algorithm is told of a rank."""
        ids = self.ids_of(rank)
        q, k, v = (x.detach() for x in self.operands(rank))
        return rank_of(rank, self.ranks, q, k, v, Ids(*(ids.get(name) for name in NAMES[3:])), **self.settings)

    def seen(self) -> Tensor:
        """[b, 1, lq, lk], true where a query sees a key."""
        seen = torch.ones(self.q.shape[0], 1, self.q.shape[2], self.k.shape[2], dtype=torch.bool, device=self.q.device)
        at, key = (torch.arange(x.shape[2], device=x.device) for x in (self.q, self.k))
        if self.settings.get("causal"):
            seen &= key <= at[:, None]
            if self.settings.get("window"):
                seen &= key > at[:, None] - self.settings["window"]
        if "q_segments" in self.ids:
            seen &= self.ids["q_segments"][:, None, :, None] == self.ids["kv_segments"][:, None, None, :]
        if "kv_valid" in self.ids:
            seen &= self.ids["kv_valid"][:, None, None, :]
        return seen

    def whole(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The result on one device, and the gradients of q, k and v, by plain products in `dtype`."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        groups, seen = q.shape[1] // k.shape[1], self.seen()
        scale = self.settings.get("scale") or q.shape[3] ** -0.5
        scores = (q @ k.repeat_interleave(groups, 1).mT * scale).masked_fill(~seen, -math.inf)
        weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1) * seen
        out = weights @ v.repeat_interleave(groups, 1)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.grad.to(dtype))]


def in_lock_step(case: Case) -> list[Tensor]:
    """The result of all ranks and the gradients of q, k and v."""
    ranks = [case.rank(r) for r in range(case.ranks)]
    found = lock_step([forward(rank) for rank in ranks])
    grads = lock_step([backward(rank, case.cut(case.grad, r), found[r][0].to(case.q.dtype), found[r][1])
                       for r, rank in enumerate(ranks)])
    return [case.glued(parts) for parts in ([out for out, _ in found], *zip(*grads, strict=True))]


def random_case(r: Random, dtype: torch.dtype = torch.float32) -> Case:
    """Any number of ranks, lengths, heads, masks; some queries see no key, some ranks no key of another."""
    gen = torch.Generator().manual_seed(r.getrandbits(31))
    ranks, causal, zigzag = r.choice([1, 2, 2, 4, 4, 8]), r.random() < 0.7, r.random() < 0.6
    mine = r.choice([1, 2, 3, 8]) * (2 if zigzag else 1)
    length, keys = ranks * mine, ranks * (mine if causal else r.choice([1, 2, 5]))
    batch, kv, d = r.choice([1, 2]), r.choice([1, 2]), r.choice([4, 8, 5])
    heads, e = kv * r.choice([1, 3]), r.choice([d, d, 6])
    settings: dict[str, Any] = {"causal": causal, "zigzag": zigzag, "scale": r.choice([None, 0.3])}
    if causal and r.random() < 0.6:
        settings["window"] = r.choice([1, 2, 5, mine, length // 2 + 1, length])
    ids: dict[str, Tensor] = {}
    if r.random() < 0.4:
        for name, n in (("q_segments", length), ("kv_segments", keys)):
            ids[name] = torch.randint(0, 3, (r.choice([1, batch]), n), generator=gen, dtype=r.choice([torch.int32, torch.int64]))
    if r.random() < 0.4:
        ids["kv_valid"] = torch.rand(r.choice([1, batch]), keys, generator=gen) < r.choice([0.2, 0.8])

    def random(h: int, n: int, width: int) -> Tensor:
        if r.random() < 0.5:
            return torch.randn(batch, n, h, width, generator=gen).to(dtype).transpose(1, 2)
        return torch.randn(batch, h, n, width, generator=gen).to(dtype)

    return Case(ranks, random(heads, length, d), random(kv, keys, d), random(kv, keys, e), ids, settings)


def off(have: Sequence[Tensor], want: Sequence[Tensor], of: Sequence[Tensor] | None = None) -> float:
    """The largest distance of a tensor from another, as a part of the largest norm of the others (or of `of`, of which they are
    parts); NaN is infinitely far."""
    distances = [(a.double() - b.double()).norm() for a, b in zip(have, want, strict=True)]
    size = max(b.double().norm().item() for b in of or want)
    return max(math.inf if d.isnan() else d.item() for d in distances) / (size or 1)
