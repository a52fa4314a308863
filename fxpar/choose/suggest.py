"""`fxpar.suggest`: the plans that fit a number of GPUs, the best of them, what limits it, and why the others are worse."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fxpar.choose.evaluate import Candidate, Captures, partitioned, traced
from fxpar.choose.facts import ModelFacts, facts_of
from fxpar.choose.reasons import SHARED, Rejection, advice, limits, not_searched, rejections, short
from fxpar.choose.space import Estimate, Space
from fxpar.compiler import Captured, capture
from fxpar.cost.clusters import Cluster, cluster_of
from fxpar.cost.clusters import cluster as read_cluster
from fxpar.cost.stages import TERMS
from fxpar.errors import FxparError, PlanError
from fxpar.model.inputs import Call, globalize
from fxpar.plan import Plan
from fxpar.progress import stage
from fxpar.report.step import CLUSTER
from fxpar.report.text import GIB
from fxpar.report.verdict import bytes_of, usable
from fxpar.sharding.mesh import from_plan

CANDIDATES = 5
"""How many plans are partitioned for real."""
ALIKE = 0.02
"""Plans whose steps differ by less than this part are alike: the simpler one is preferred."""
ROUNDS = 3
"""How often plans are partitioned: where none fits as traced, others that formulas find as much smaller as they were off."""
DEFAULT = "param_dtype=bf16,outputs=loss"


@dataclass(frozen=True)
class Suggestions:
    """What `suggest` found.

    gpus, memory, cluster: what plans were searched for; memory: bytes of one device. best: the plan to take; None where
    nothing that was traced fits. candidates: what was partitioned for real, from the best on; those that do not fit at the
    end. compared: the plans that one asked to compare with, whether they fit or not; with `rank(candidate)`, their place among
    all plans that fit. rejected: families of plans that `best` is none of. estimates: of all plans that were searched. errors:
    plans that looked good and cannot be partitioned, with what stops them. facts: of the model. per_replica: whether each
    replica has as many rows under all plans, rather than all replicas together. seconds: of a processor, that it took,
    capture included and `compared` not.
    """

    gpus: int
    memory: int
    cluster: Cluster
    best: Candidate | None
    candidates: tuple[Candidate, ...]
    compared: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    estimates: tuple[Estimate, ...] = field(repr=False)
    errors: tuple[tuple[Plan, FxparError], ...]
    facts: ModelFacts = field(repr=False)
    per_replica: bool
    seconds: float

    @property
    def plan(self) -> Plan:
        """The best plan. Raises `PlanError` where nothing fits."""
        if self.best is None:
            raise PlanError("memory", self.memory, f"holds no plan for {self.gpus} GPUs: {self._least()}", "more gpus")
        return self.best.plan

    def fitting(self) -> list[Estimate]:
        """The plans that fit, with their seconds and bytes by the formulas, from the fastest on."""
        return sorted((e for e in self.estimates if e.peak <= usable(self.memory)), key=lambda e: e.seconds / self._rows(e.plan))

    def rank(self, candidate: Candidate) -> int:
        """The place of a plan (candidate: of `candidates` or `compared`) among all that fit, by the formulas: 1 for the
        fastest."""
        pace = candidate.estimate.seconds / candidate.rows
        return 1 + sum(e.seconds / self._rows(e.plan) < pace for e in self.fitting())

    def _rows(self, plan: Plan) -> int:
        return self.facts.dimensions.batch * (plan.dp if self.per_replica else 1)

    def _least(self) -> str:
        least = min(self.estimates, key=lambda e: e.peak, default=None)
        if least is None:
            return "no plan divides what has to be divided"
        return (f"{short(least.plan)} takes least, about {least.peak / GIB:.1f} GiB of the {usable(self.memory) / GIB:.1f} that "
                "a step may")

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = 160) -> list[str]:
        """As text: the table, in so many columns (width), what limits the best plan, the rejected families."""
        facts, shared = self.facts, next((e.plan for e in self.estimates), Plan())
        head = (f"{len(self.estimates)} plans for {self.gpus} GPUs of {self.cluster.name} ({self.cluster.device}), "
                f"{len(self.fitting())} of which fit into {usable(self.memory) / GIB:.1f} of {self.memory / GIB:.1f} GiB; "
                f"{len(self.candidates) + len(self.compared)} partitioned for real; {self.seconds:.0f} s of a processor")
        told = ", ".join(i for i in str(shared).split(",") if i.partition("=")[0] in SHARED)
        out = [head, *([f"all with {told}"] if told else []), "", *self._table(width)]
        if self.best is None:
            out += ["", f"nothing fits: {self._least()}"]
        else:
            best = self.best
            out += ["", f"best: {best.plan}", limits(best.terms, best.memory, self.memory), "", "by the public guide:",
                    *(f"  {line}" for line in advice(best.plan, facts, self.cluster, self.gpus, self.memory))]
        for other in self.compared:
            out += ["", *self._beside(other)]
        if self.rejected:
            out += ["", "rejected:", *(f"  {rejection}" for rejection in self.rejected)]
        left = not_searched(facts, self.cluster, self.gpus)
        out += ["", "not searched:", *(f"  {line}" for line in left)] if left else []
        return out + [f"  cannot be partitioned: {short(plan)}: {error}" for plan, error in self.errors]

    def _table(self, width: int) -> list[str]:
        table = Table(box=None, pad_edge=False)
        for name, side in (("", "right"), ("plan", "left"), ("step s", "right"), ("MFU", "right"), ("bubble", "right"),
                           ("exposed", "right"), ("again", "right"), ("peak GiB", "right"), ("", "left")):
            table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
        for number, made in enumerate(self.candidates, 1):
            table.add_row(str(number), *self._row(made))
        for made in self.compared:
            table.add_row("*", *self._row(made))
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(table)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]

    def _row(self, made: Candidate) -> tuple[str, ...]:
        exposed = sum(seconds for name, seconds in made.terms.items() if name.endswith("collectives"))
        about = "" if made.traced else "about "
        return (short(made.plan), f"{made.seconds:.3f}", f"{made.utilization:.1%}", f"{made.bubble:.1%}",
                f"{exposed / made.seconds:.1%}", f"{made.terms['recomputation'] / made.seconds:.1%}",
                f"{about}{made.peak / GIB:.1f}", "" if made.fits(self.memory) else "does not fit")

    def _beside(self, other: Candidate) -> list[str]:
        """A plan that was asked for, term by term beside the best."""
        place = f"place {self.rank(other)} of {len(self.fitting())} by the formulas"
        fit = "fits" if other.fits(self.memory) else "does not fit"
        out = [f"compared: {short(other.plan)}: {fit} ({other.peak / GIB:.1f} GiB); {place}"]
        if self.best is None:
            return out
        mine, its = self.best, other
        rows = [(name, mine.terms[name] * its.rows / mine.rows, its.terms[name]) for name in TERMS]
        rows += [("step", mine.seconds * its.rows / mine.rows, its.seconds)]
        out += [f"  {name:20} {a:10.3f} s {b:10.3f} s {b - a:+10.3f} s" for name, a, b in rows if max(a, b) >= 0.0005]
        out += [f"  {name:20} {mine.memory.get(name, 0) / GIB:10.1f} GiB {its.memory.get(name, 0) / GIB:8.1f} GiB"
                for name in {**mine.memory, **its.memory} if max(mine.memory.get(name, 0), its.memory.get(name, 0)) >= 0.05 * GIB]
        return [*out, f"  {'MFU':20} {mine.utilization:12.1%} {its.utilization:12.1%}",
                f"  {'peak':20} {mine.peak / GIB:10.1f} GiB {its.peak / GIB:8.1f} GiB   (the best one's first)"]


def suggest(model: nn.Module | Captured, example_inputs: Any = None, *, gpus: int, memory: int | float | str | None = None,
            cluster: Cluster | str = CLUSTER, fixed: Plan | str = DEFAULT, compare: Sequence[Plan | str] = (),
            candidates: int = CANDIDATES, trace: bool = True) -> Suggestions:
    """Which plan to train `model` under: a ranked table of plans, what limits the best, and why others are rejected.

    model: may be on the meta device; or what `fxpar.capture` made of one. example_inputs: the *global* batch of a step (a dict of
    keyword arguments or a tuple), of which only shapes and dtypes matter. gpus: how many there are. memory: of one, in bytes
    or as text ("80GiB"); default: what the cluster's devices have. cluster: a name, or a .toml file of one's own. fixed:
    fields that all plans share, a plan or its text: what it says of degrees and options is kept too ("tp=4,param_dtype=bf16").
    compare: plans that are told beside the best; of dtypes and outputs they have what `fixed` has, unless they say it.
    candidates: how many plans are partitioned for real, the best by the formulas. trace: whether the best one's peak is
    predicted as `fxpar.inspect` does; without it all peaks are those of the formulas.

    No process, GPU or weight is needed. Raises: `PlanError` for arguments that are none, and for a dtype that the cluster does
    not compute in; as `fxpar.capture`.
    """
    start = time.process_time()
    base, names = _fixed(fixed)
    machine = read_cluster(cluster) if isinstance(cluster, str) else cluster
    others = [Plan.of(plan) for plan in compare]
    sizes = _count("gpus", gpus), machine, bytes_of(memory) if memory is not None else machine.memory
    count = _count("candidates", candidates)
    captured = model if isinstance(model, Captured) else capture(model, example_inputs)
    base = _with_loss(captured, base, fixed != DEFAULT)
    others = [_in_common(plan, base) for plan in others]
    with stage(f"searching plans for {gpus} GPUs"):
        facts = facts_of(captured, _shared(base), machine)
        return _search(lambda plan: captured, facts, base, names, *sizes, others, count, trace, start)


def suggest_for_replicas(model: nn.Module, example: Call, gpus: int, memory: int, cluster: Cluster) -> Suggestions:
    """The same for a training loop that passes each replica such an example, whatever the plan, and calls backward itself:
    without pipelines and accumulation. Raises as `suggest`."""
    start = time.process_time()
    alone = capture(model, _inputs(example))
    known: dict[int, Captured] = {1: alone}

    def capture_of(plan: Plan, batch: Mapping[str, int | None]) -> Captured:
        if plan.dp not in known:
            known[plan.dp] = capture(model, _inputs(globalize(example, from_plan(plan), batch)))
        return known[plan.dp]

    with stage(f"searching plans for {gpus} GPUs"):
        facts = facts_of(alone, Plan(), cluster)
        return _search(lambda plan: capture_of(plan, facts.batch_dims), facts, Plan(), frozenset(), gpus, cluster, memory, [], 2,
                       True, start, per_replica=True)


def _inputs(call: Call) -> Any:
    args, kwargs = call
    if args and kwargs:
        raise PlanError("plan", "auto", "needs example_inputs that all have names, or none", 'a plan, as "dp=2"')
    return kwargs or args


def _search(capture_of: Captures, facts: ModelFacts, base: Plan, fixed: frozenset[str], gpus: int, cluster: Cluster, size: int,
            others: list[Plan], count: int, trace: bool, start: float, per_replica: bool = False) -> Suggestions:
    space = Space(facts, cluster, gpus, base, fixed, plain=per_replica)
    estimates = space.estimates()

    def rows(plan: Plan) -> int:
        return facts.dimensions.batch * (plan.dp if per_replica else 1)

    def pace(estimate: Estimate) -> float:
        return estimate.seconds / rows(estimate.plan)

    made: list[Candidate] = []
    errors: list[tuple[Plan, FxparError]] = []
    more = 1.0  # what a traced peak is at most, over the formulas' peak of it
    for _ in range(ROUNDS):
        tried, wanted = {c.plan for c in made} | {plan for plan, _ in errors}, len(made) + count
        for estimate in _promising(estimates, pace, int(size / more)):
            if len(made) == wanted or len(errors) > 2 * count:
                break
            if estimate.plan in tried:
                continue
            found = partitioned(capture_of, estimate, cluster, rows(estimate.plan))
            if isinstance(found, FxparError):
                errors.append((estimate.plan, found))
            else:
                made.append(found)
        made = _ordered(made, size, trace)
        if not made or made[0].fits(size):
            break
        more = max([more, *(c.peak / c.estimate.peak for c in made if c.traced)])
    best = made[0] if made and made[0].fits(size) else None
    rejected = rejections(best.plan, estimates, pace, size, facts) if best is not None else []
    used, compared = time.process_time() - start, []
    for estimate in space.of(others):
        found = partitioned(capture_of, estimate, cluster, rows(estimate.plan))
        if isinstance(found, FxparError):
            raise found
        compared.append(traced(found) if trace else found)
    return Suggestions(gpus, size, cluster, best, tuple(made), tuple(compared), tuple(rejected), tuple(estimates), tuple(errors),
                       facts, per_replica, used)


def _promising(estimates: list[Estimate], pace: Any, memory: int) -> list[Estimate]:
    """Plans that fit by the formulas, the fastest first; of each combination of degrees one, the simplest of those that are
    alike."""
    fitting = sorted((e for e in estimates if e.peak <= usable(memory)), key=pace)
    kinds: dict[tuple[int, ...], list[Estimate]] = {}
    for e in fitting:
        kinds.setdefault((e.plan.tp, e.plan.pp, e.plan.cp, e.plan.ep), []).append(e)
    return [min((e for e in kind if pace(e) <= pace(kind[0]) * (1 + ALIKE)), key=lambda e: (complexity(e.plan), pace(e)))
            for kind in kinds.values()]


def _ordered(made: list[Candidate], memory: int, trace: bool) -> list[Candidate]:
    """The best first: the fastest that fits, or the simplest of those that are as fast; its peak is traced, and that of the next
    where it does not fit."""
    while True:
        made = sorted(made, key=lambda c: (not c.fits(memory), c.pace))
        if not made or not made[0].fits(memory):
            return made
        alike = [c for c in made if c.fits(memory) and c.pace <= made[0].pace * (1 + ALIKE)]
        first = min(alike, key=lambda c: (complexity(c.plan), c.pace))
        rest = [c for c in made if c is not first]
        if first.traced or not trace:
            return [first, *rest]
        made = [traced(first), *rest]


def complexity(plan: Plan) -> int:
    """How late in the guide's order a plan is: dp, ZeRO, tp, pp, cp, recomputation."""
    again = {"none": 0, "selective": 8, "full": 16}.get(plan.recompute, 12) if isinstance(plan.recompute, str) else 12
    return (plan.zero + (plan.dp_replicate > 1) + 2 * (plan.tp > 1) + 3 * (plan.pp > 1) + (plan.virtual_stages > 1)
            + (plan.schedule in ("zb1p", "zbv")) + 2 * (plan.cp > 1) + again)


def _fixed(given: Plan | str) -> tuple[Plan, frozenset[str]]:
    """A plan, and the names of the fields that it sets."""
    plan = Plan.of(given)
    said = {item.partition("=")[0].strip() for item in (given if isinstance(given, str) else str(plan)).split(",")}
    return plan, frozenset(said - set(SHARED) if str(plan) != "dp=1" or isinstance(given, str) else ())


def _shared(plan: Plan) -> Plan:
    """Its fields that have nothing to do with ranks."""
    return Plan(**{name: getattr(plan, name) for name in SHARED})


def _in_common(plan: Plan, base: Plan) -> Plan:
    """A plan with those of the fields that have nothing to do with ranks from `base` which it leaves as they are by default."""
    default = Plan()
    return replace(plan, **{name: getattr(base, name) for name in SHARED if getattr(plan, name) == getattr(default, name)})


def _with_loss(captured: Captured, base: Plan, asked: bool) -> Plan:
    """The plan as it is, or, where nobody asked for it, without `outputs=loss` for a model that returns none."""
    try:
        captured.partition(_shared(base))
    except PlanError as error:
        if error.field != "outputs" or asked:
            raise
        return replace(base, outputs="all")
    return base


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(name, value, "must be a positive integer", f"{name}=8")
    return value


def likely_cluster(device: torch.device) -> str:
    """The name of the cluster whose devices are of the kind of this one; the default where none is."""
    made = cluster_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return CLUSTER if made is None else made.name
