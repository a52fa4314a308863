"""reasons: what limits a plan, and why a family of plans is not preferred, in a sentence with numbers each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxpar.choose.facts import ModelFacts
from fxpar.choose.space import LONG, Estimate
from fxpar.cost.clusters import Cluster
from fxpar.cost.stages import AGAIN, ATTENDING, BUBBLE, CONTEXT, DATA, EXPERTS, OPTIMIZER, OTHERS, PRODUCTS, TENSOR
from fxpar.plan import Plan
from fxpar.report.text import GIB
from fxpar.report.verdict import usable

PHRASES = {
    PRODUCTS: "matrix products, which the largest pipeline rank has more of", ATTENDING: "attention",
    OTHERS: "operators that move memory", AGAIN: "recomputation",
    TENSOR: "exposed gathers and scatters of activations over tp", CONTEXT: "exposed exchanges of keys and values over cp",
    EXPERTS: "exposed exchanges of rows with their experts", DATA: "exposed gathers of parameters and sums of gradients",
    BUBBLE: "the pipeline's bubble", OPTIMIZER: "the optimizer"}
"""Term of a step -> how a sentence calls it."""
SHARED = ("param_dtype", "reduce_dtype", "outputs", "batch_dims", "roles")
"""Fields that have nothing to do with ranks, and that all plans share: neither tables nor sentences repeat them."""
WIDE, DEEP = 4096, 50
"""Of the public guide of Megatron Core: hidden size from which a layer is wide, blocks from which a model is deep."""


@dataclass(frozen=True)
class Rejection:
    """A family of plans that is not preferred. best: the formulas' best of it, which fits unless `reason` says that none does."""

    family: str
    best: Estimate
    reason: str

    def __str__(self) -> str:
        return f"{self.family}: {self.reason}"


def limits(terms: Mapping[str, float], memory: Mapping[str, float], size: int) -> str:
    """What limits a plan whose step and peak are for these."""
    whole = sum(terms.values())
    own = sum(terms[name] for name in (PRODUCTS, ATTENDING, OTHERS))
    rest = sorted(((seconds, name) for name, seconds in terms.items() if name not in (PRODUCTS, ATTENDING, OTHERS)), reverse=True)
    told = ", ".join(f"{PHRASES[name]} {seconds / whole:.1%}" for seconds, name in rest if seconds >= 0.005 * whole)
    parts = ", ".join(f"{name} {part / GIB:.1f}" for name, part in sorted(memory.items(), key=lambda item: -item[1])
                      if part >= 0.05 * GIB)
    return (f"{own / whole:.1%} of the step are the model's own operators ({PRODUCTS} {terms[PRODUCTS] / whole:.1%}, {ATTENDING} "
            f"{terms[ATTENDING] / whole:.1%}, {OTHERS} {terms[OTHERS] / whole:.1%})" + (f"; {told}" if told else "")
            + f". Memory: {sum(memory.values()) / GIB:.1f} of the {usable(size) / GIB:.1f} GiB that a step may take: {parts}")


def rejections(best: Plan, estimates: Sequence[Estimate], pace: Callable[[Estimate], float], memory: int,
               facts: ModelFacts) -> list[Rejection]:
    """Every family that `best` does not belong to, with the reason. pace: seconds for a row of the batch. memory: bytes of a
    device."""
    mine = next(e for e in estimates if e.plan == best)
    found = []
    for family, belongs in _families(estimates, best):
        members = [e for e in estimates if belongs(e.plan)]
        if not members or belongs(best):
            continue
        fitting = [e for e in members if e.peak <= usable(memory)]
        if fitting:
            other = min(fitting, key=pace)
            found.append(Rejection(family, other, _slower(mine, other, pace)))
        else:
            other = min(members, key=lambda e: e.peak)
            found.append(Rejection(family, other, _larger(other, facts)))
    return found


def not_searched(facts: ModelFacts, cluster: Cluster, gpus: int) -> list[str]:
    """What is left out of the search, and why."""
    node, size = cluster.links[0].ranks or gpus, facts.dimensions
    out = []
    if gpus > node and size.split:
        far = cluster.link(gpus)
        out.append(f"tp={2 * node} and more leave the node: {far.beta / 1e9:.0f} GB/s instead of "
                   f"{cluster.links[0].beta / 1e9:.0f}, for collectives that nothing hides")
    if size.sequences and size.length < LONG:
        out.append(f"cp is for sequences of {LONG} tokens and more; these have {size.length}")
    if not size.split:
        out.append("tp: no parameter has heads, ffn or vocab that it could split")
    if not size.experts:
        out.append("ep: the model has no experts that it could split")
    elif size.split:
        out.append("tp with fewer ranks of ep: it would split each expert, and exchange all of what they make")
    return out


Belongs = Callable[[Plan], bool]


def _families(estimates: Sequence[Estimate], best: Plan) -> Iterator[tuple[str, Belongs]]:
    """Names of families, and whether a plan belongs to them."""
    alone = {"tp": 1, "pp": 1, "cp": 1}
    for level in (0, 1, 2, 3):
        yield f"zero={level} alone" if level else "dp alone", _with(**alone, zero=level, recompute="none")
    for policy in ("selective", "full"):
        yield f"zero=3 with recompute={policy}, alone", _with(**alone, zero=3, recompute=policy)
    for name in ("tp", "cp", "pp", "ep"):
        yield f"no {name}", _with(**{name: 1})
    for name in ("tp", "cp", "pp", "ep", "zero", "recompute"):
        yield from ((f"{name}={value}", _with(**{name: value})) for value in _values(estimates, name)
                    if value != 1 or name == "zero")
    pipelines, contexts = ([e for e in estimates if getattr(e.plan, name) > 1] for name in ("pp", "cp"))
    if best.pp > 1:
        yield from ((f"schedule={order}", _more("pp", schedule=order)) for order in _values(pipelines, "schedule"))
    if best.cp > 1:
        yield from ((f"cp_comm={how}", _more("cp", cp_comm=how)) for how in _values(contexts, "cp_comm"))


def _with(**fields: object) -> Belongs:
    return lambda plan: all(getattr(plan, name) == value for name, value in fields.items())


def _more(degree: str, **fields: object) -> Belongs:
    has = _with(**fields)
    return lambda plan: getattr(plan, degree) > 1 and has(plan)


def _values(estimates: Iterable[Estimate], name: str) -> list:
    return sorted({getattr(e.plan, name) for e in estimates}, key=lambda value: (str(type(value)), value))


def _slower(mine: Estimate, other: Estimate, pace: Callable[[Estimate], float]) -> str:
    """Why a family that fits is not preferred."""
    ratio = pace(other) / pace(mine)
    scale = pace(mine) / mine.seconds / (pace(other) / other.seconds)  # of a row each, where steps have other batches
    term = max(other.terms, key=lambda name: other.terms[name] / scale - mine.terms[name])
    share = other.terms[term] / other.seconds
    plan = short(other.plan)
    if ratio < 1.005:
        return f"as fast within {abs(ratio - 1):.1%}, and no simpler ({plan})"
    return f"{ratio - 1:.1%} slower at best: {share:.0%} of the step is {PHRASES[term]} ({plan})"


def _larger(other: Estimate, facts: ModelFacts) -> str:
    """Why a family does not fit."""
    part, size = max(other.memory.items(), key=lambda item: item[1])
    tokens = f" at {facts.dimensions.length} tokens" if part == "activations" and facts.dimensions.length else ""
    return f"does not fit: {size / GIB:.0f} GiB of {part}{tokens}, {other.peak / GIB:.0f} GiB at least ({short(other.plan)})"


def short(plan: Plan) -> str:
    """A plan without the fields that all have."""
    return ",".join(item for item in str(plan).split(",") if item.partition("=")[0] not in SHARED) or "dp=1"


def advice(plan: Plan, facts: ModelFacts, cluster: Cluster, gpus: int, memory: int) -> list[str]:
    """What the public guide would have one look at, with this model's numbers."""
    values, node = facts.values, cluster.links[0].ranks or gpus
    state = facts.parameters * values["stored"] * 4 / GIB
    lines = [f"dp first: {plan.dp} replicas of {plan.tp * plan.pp * plan.cp} GPUs each"]
    needs = state > usable(memory) / GIB
    lines.append(f"ZeRO when state does not fit: parameters, gradients and optimizer state are {state:.0f} GiB, "
                 f"{'more' if needs else 'less'} than a GPU's {usable(memory) / GIB:.1f}: zero={plan.zero}")
    if facts.width:
        lines.append(f"tp inside a node for wide layers ({WIDE} and more): {facts.width} wide, {node} GPUs a node: tp={plan.tp}")
    lines.append(f"pp for depth ({DEEP} blocks and more): {int(values['blocks'])} blocks: pp={plan.pp}")
    if facts.dimensions.length:
        lines.append(f"cp for long sequences ({LONG} tokens and more) rather than more tp: {facts.dimensions.length}: "
                     f"cp={plan.cp}")
    if facts.dimensions.experts:
        lines.append(f"ep for experts: {max(facts.dimensions.experts)}: ep={plan.ep}")
    lines.append(f"recomputation last: {plan.recompute}")
    return lines
