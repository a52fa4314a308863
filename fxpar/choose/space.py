"""space: all plans for a number of GPUs, and what the formulas say of each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fxpar.choose.facts import ModelFacts
from fxpar.cost.clusters import Cluster
from fxpar.cost.formulas import SYMBOLS, compiled
from fxpar.errors import PlanError
from fxpar.plan import Plan

SIZES = (1, 2, 4, 8)
"""Sequences of a microbatch."""
LONG = 8192
"""Tokens of a sequence from which cp is searched."""
STAGES = (2, 3, 4, 5, 6, 7, 8)
"""Stages of a pipeline rank that are searched, where they are interleaved."""


@dataclass(frozen=True)
class Estimate:
    """What the formulas say of a plan. terms: seconds, by what they are for; memory: bytes of a rank at its peak, likewise."""

    plan: Plan
    terms: dict[str, float]
    memory: dict[str, float]

    @functools.cached_property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @functools.cached_property
    def peak(self) -> float:
        return sum(self.memory.values())


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Space:
    """Every plan that a model, a number of GPUs and a cluster allow; `base` has the fields that all plans share, and those in
    `fixed` keep the value that they have there. plain: each replica has the batch of `facts`, and no pipeline or accumulation."""

    def __init__(self, facts: ModelFacts, cluster: Cluster, gpus: int, base: Plan, fixed: frozenset[str], plain: bool):
        self.facts, self.cluster, self.gpus, self.base, self.fixed, self.plain = facts, cluster, gpus, base, fixed, plain

    def estimates(self) -> list[Estimate]:
        """Of all plans."""
        return self.of([plan for plan in self.plans()])

    def of(self, plans: list[Plan]) -> list[Estimate]:
        """Of these plans, in their order."""
        made: dict[int, Estimate] = {}
        kinds: dict[str, list[int]] = {}
        for i, plan in enumerate(plans):
            kinds.setdefault(plan.schedule if plan.pp > 1 else "", []).append(i)
        for kind, numbers in kinds.items():
            rows = [self.values(plans[i]) for i in numbers]
            columns = {name: np.array([row[name] for row in rows]) for name in SYMBOLS}
            seconds, memory = (function(**columns) for function in compiled(kind))
            arrays = [{name: np.broadcast_to(value, len(rows)) for name, value in each.items()} for each in (seconds, memory)]
            for at, i in enumerate(numbers):
                terms, sizes = ({name: float(values[at]) for name, values in each.items()} for each in arrays)
                made[i] = Estimate(plans[i], terms, sizes)
        return [made[i] for i in range(len(plans))]

    # ---- what the formulas take ----

    def values(self, plan: Plan) -> dict[str, float]:
        """The value of every symbol of `fxpar.cost.formulas` under a plan."""
        node = self.cluster.links[0].ranks or self.gpus
        rank = plan.dp * plan.cp * plan.tp
        replicas = plan.dp_replicate if plan.stores_parts else 1
        reach = dict(tp=plan.tp, cp=plan.cp * plan.tp, ep=plan.ep, dp=rank // replicas, rep=rank,
                     pp=rank * plan.pp if rank * plan.pp <= node else self.gpus + node)
        links = {axis: self.cluster.link(ranks) for axis, ranks in reach.items()}
        kept = self.facts.kept.get(plan.recompute) or self._between(plan)
        rows = self.facts.dimensions.batch / (plan.microbatches * (1 if self.plain else plan.dp))
        return {
            **self.facts.values, **kept, "bandwidth": self.cluster.memory_bandwidth,
            **{f"alpha_{axis}": link.alpha for axis, link in links.items()},
            **{f"beta_{axis}": link.beta for axis, link in links.items()},
            **{name: getattr(plan, name) for name in ("dp", "tp", "cp", "pp", "ep")},
            "m": plan.microbatches, "v": plan.virtual_stages, "b": rows, "rep": replicas,
            "z1": float(plan.stores_parts), "z2": float(plan.reduces_each_backward), "z3": float(plan.gathers_each_use),
            "again": 1.0 if plan.recompute == "full" else 1 - plan.memory_budget if plan.memory_budget is not None else 0.0,
            "a2a": float(plan.cp_comm == "a2a"), "uneven": self.uneven(plan.pp, plan.virtual_stages)}

    def _between(self, plan: Plan) -> dict[str, float]:
        """Of a memory budget: that part of what is kept without recomputation, and at least what is kept with all of it."""
        budget = plan.memory_budget if plan.memory_budget is not None else 1.0
        none = self.facts.kept.get("none", {})
        full = self.facts.kept.get("full", none)
        return {name: full[name] + budget * (none[name] - full[name]) for name in none}

    def uneven(self, pp: int, virtual: int) -> float:
        """What the largest pipeline rank computes over the average: more than 1 where one product is more than an even stage."""
        whole, stages = sum(self.facts.parts), pp * virtual
        if stages == 1 or not whole:
            return 1.0
        largest = max(whole / stages, *self.facts.parts)
        return (largest + (virtual - 1) * (whole - largest) / (stages - 1)) * pp / whole

    # ---- which plans there are ----

    def plans(self) -> Iterator[Plan]:
        """All plans that divide what has to be divided, and contradict nothing."""
        seen: set[Plan] = set()
        for degrees in self._degrees():
            for choice in self._choices(*degrees[:4]):
                plan = self._plan(degrees, choice)
                if plan is not None and plan not in seen:
                    seen.add(plan)
                    yield plan

    def _kept(self, **values: Any) -> bool:
        """Whether fields that are fixed have the values that they are fixed to."""
        return all(name not in self.fixed or getattr(self.base, name) == value for name, value in values.items())

    def _degrees(self) -> Iterator[tuple[int, int, int, int, int]]:
        """dp, tp, pp, cp, ep."""
        size, node = self.facts.dimensions, self.cluster.links[0].ranks or self.gpus
        blocks = self.facts.values["blocks"]
        for tp, cp in itertools.product(divisors(self.gpus), repeat=2):
            inside = tp <= node or "tp" in self.fixed
            long = cp == 1 or (size.length >= LONG and cp <= max(1, size.length // 2048)) or "cp" in self.fixed
            if not (inside and long and size.takes(tp, cp, 1) and self.gpus % (tp * cp) == 0):
                continue
            for pp in divisors(self.gpus // (tp * cp)):
                dp = self.gpus // (tp * cp * pp)
                if (pp > 1 and self.plain) or pp > blocks or (size.batch % dp and not self.plain):
                    continue
                for ep in (divisors(dp * cp * tp) if size.experts else (1,)):
                    folded = not size.experts or ep >= tp or "ep" in self.fixed  # or tp would split each expert
                    if folded and size.takes(tp, cp, ep) and self._kept(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep):
                        yield dp, tp, pp, cp, ep

    def _choices(self, dp: int, tp: int, pp: int, cp: int) -> Iterator[dict[str, Any]]:
        """The other fields of a plan of these degrees."""
        rows = self.facts.dimensions.batch // (1 if self.plain else dp)
        counts = [1] if self.plain else [rows // b for b in SIZES if rows % b == 0]
        if "microbatches" in self.fixed:
            counts = [self.base.microbatches]
        storage = [(0, 1), *((z, rep) for z in (1, 2, 3) for rep in self._replicas(dp, tp, cp))] if dp * cp > 1 else [(0, 1)]
        if "zero" in self.fixed:
            storage = [(z, rep) for z, rep in {(self.base.zero, 1), *storage} if z == self.base.zero]
        exchanged = cp > 1 and all(n % (tp * cp) == 0 for n in self.facts.dimensions.heads)
        around = ["p2p", *(["a2a"] if exchanged else [])]
        again = [self.base.recompute] if "recompute" in self.fixed else [*self.facts.kept]
        for (zero, replicate), count, comm, recompute, (order, virtual) in itertools.product(
                storage, counts, around, again, self._orders(pp)):
            if self._kept(microbatches=count, zero=zero, dp_replicate=replicate, cp_comm=comm if cp > 1 else self.base.cp_comm,
                          schedule=order, virtual_stages=virtual) and rows % count == 0:
                yield dict(zero=zero, dp_replicate=replicate, microbatches=count, cp_comm=comm, recompute=recompute,
                           schedule=order, virtual_stages=virtual)

    def _replicas(self, dp: int, tp: int, cp: int) -> list[int]:
        """Degrees of hybrid sharding: none, and that which keeps parts inside a node."""
        node = self.cluster.links[0].ranks or self.gpus
        across = dp * cp * tp // node
        return [1, across] if across > 1 and dp % across == 0 and across < dp else [1]

    def _orders(self, pp: int) -> list[tuple[str, int]]:
        """Schedules, and how many stages a pipeline rank has under each."""
        if pp == 1:
            return [("1f1b", 1)]
        blocks = self.facts.values["blocks"]
        looped = [("interleaved1f1b", v) for v in STAGES if pp * v <= blocks]
        return [("1f1b", 1), *looped, ("zb1p", 1), *([("zbv", 2)] if 2 * pp <= blocks else [])]

    def _plan(self, degrees: tuple[int, ...], choice: dict[str, Any]) -> Plan | None:
        fields: dict[str, Any] = {**dict(zip(("dp", "tp", "pp", "cp", "ep"), degrees, strict=True)), **choice}
        try:
            return replace(self.base, **fields)
        except PlanError:
            return None
