"""facts: what the formulas have to know of a model, read off its program on one device.

The program of one device is partitioned as any plan's is and cut into one stage a block, so that seconds are those of
`fxpar.cost.stages`, and bytes kept those of `fxpar.report.memory`, of which one of equal blocks stands for all. What tensor and
expert parallelism communicate is read off the programs of two ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpar.compiler import Captured
from fxpar.cost.clusters import Cluster
from fxpar.cost.operators import measure
from fxpar.cost.stages import AGAIN, ATTENDING, OTHERS, PRODUCTS, OperatorTimes, StageLoad, stage_cost
from fxpar.errors import FxparError, PlanError
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import EXCHANGES
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.strategies.stages import Stage, cut_stages
from fxpar.plan import Plan
from fxpar.program import Program, block_path
from fxpar.report.memory import first_alike, predict
from fxpar.sharding.factors import leaves
from fxpar.sharding.facts import dims_of, full_value, global_value, local_value, sharding_at
from fxpar.sharding.layout import shard_shape

RECOMPUTE: tuple[str | float, ...] = ("none", "selective", "full")
"""What may be recomputed, from nothing to all."""
LEARNED = 2
"""How many ranks the programs have from which communication is read."""


@dataclass(frozen=True)
class Dimensions:
    """What of a model may be split: sizes of factors by role, those of all attention's heads and of all sequences.

    batch: sequences (rows) of the global batch. heads: of queries; kv_heads: of keys. sequences: pairs of a length and whether
    causal attention goes along it. split: whether a parameter has a dim that tp splits.
    """

    batch: int
    heads: frozenset[int]
    experts: frozenset[int]
    sequences: frozenset[tuple[int, bool]]
    split: bool

    @property
    def length(self) -> int:
        """Of the longest sequence; 0 where there is none."""
        return max((n for n, _ in self.sequences), default=0)

    def takes(self, tp: int, cp: int, ep: int) -> bool:
        """Whether every head, sequence and expert divides."""
        return (all(n % tp == 0 for n in self.heads) and (tp == 1 or self.split)
                and (cp == 1 or bool(self.sequences)) and all(n % (2 * cp if causal else cp) == 0 for n, causal in self.sequences)
                and (ep == 1 or bool(self.experts)) and all(n % ep == 0 for n in self.experts))


@dataclass(frozen=True)
class ModelFacts:
    """dimensions: what may be split. values: of the symbols of `fxpar.cost.formulas` that do not depend on recomputation.
    kept: those that do, for each recomputation that Inductor can trace. parts: seconds of each product, in order, on one
    device and for one sequence: between them a pipeline may be cut. width: of the residual stream, as norms have it; 0 where
    that is not known. parameters: how many the model has. batch_dims: of each input."""

    dimensions: Dimensions
    values: dict[str, float]
    kept: dict[str | float, dict[str, float]]
    parts: tuple[float, ...]
    width: int
    parameters: int
    batch_dims: Mapping[str, int | None]


def facts_of(captured: Captured, base: Plan, cluster: Cluster) -> ModelFacts:
    """What the formulas have to know. base: the fields that all plans share (dtypes, outputs).

    Raises: as `Captured.partition`; `PlanError` for a dtype that the cluster does not compute in.
    """
    seen: list[Program] = []
    alone = captured.partition(base, observe=lambda name, program: seen.append(program) if name == "infer" else None)
    dimensions = _dimensions(seen[0], alone)
    rows = dimensions.batch
    stages = _per_block(alone)
    alike = first_alike([s.program for s in stages])
    known = {i: stage_cost(cluster, StageLoad(_under(stages[i].program, "full"), 0)).terms for i in dict.fromkeys(alike)}
    costs = [known[i] for i in alike]
    values: dict[str, float] = {
        "t_products": sum(c[PRODUCTS] for c in costs) / rows, "t_attention": sum(c[ATTENDING] for c in costs) / rows,
        "t_others": sum(c[OTHERS] for c in costs) / rows, "t_again": sum(c[AGAIN] for c in costs) / rows,
        "hop": max((s.bytes_sent for s in stages[:-1]), default=0) / rows, "blocks": len(stages),
        **_of_attention(alone, rows), **_numbers(alone, base)}
    exchanging = _learned(captured, replace(base, dp=LEARNED, ep=LEARNED)) if dimensions.takes(1, 1, LEARNED) else None
    if exchanging is None:
        dimensions = replace(dimensions, experts=frozenset())
    halved = (_learned(captured, replace(base, tp=LEARNED, ep=LEARNED if dimensions.experts else 1))
              if dimensions.takes(LEARNED, 1, 1) else None)
    if halved is None:
        dimensions = replace(dimensions, split=False)
    values |= _of_tensor(halved or alone, alone, dimensions)
    values |= _of_experts(exchanging, rows)
    parts = _parts(stages, alike, cluster, rows)
    kept = _all_kept(stages, alike, _per_block(halved) if halved is not None else [], rows)
    vectors = Counter(v.shape[0] for n, s in alone.source_of().items() if s.kind == "param" and (v := full_value(n)).dim() == 1)
    width = next((size for size, _ in vectors.most_common(1)), 0)
    inputs = {s.name: local_value(n).batch_dim for n, s in alone.source_of().items() if s.kind == "input"}
    return ModelFacts(dimensions, values, kept, parts, width, int(values["numbers"]), inputs)


def _dimensions(inferred: Program, alone: Program) -> Dimensions:
    heads, experts, sequences, split = set(), set(), set(), False
    for node in inferred.graph.nodes:
        if node.target in ATTENTION:
            heads.add(math.prod(f.size for f in leaves(dims_of(node.args[0])[-3]) if f.role == "heads"))
        for dim in (global_value(node).dims or ()) if isinstance(node.meta.get("val"), torch.Tensor) else ():
            sequences |= {(f.size, f.causal) for f in leaves(dim) if f.role == "seq"}
    for node, source in inferred.source_of().items():
        for dim in dims_of(node) if source.kind == "param" else ():
            roles = {f.role for f in leaves(dim)}
            split = split or bool(roles & {"heads", "ffn", "vocab"})
            experts |= {f.size for f in leaves(dim) if f.role == "experts"}
    batch = next((int(full_value(n).shape[at]) for n in alone.placeholders() if (at := local_value(n).batch_dim) is not None), 1)
    return Dimensions(batch, frozenset(heads), frozenset(experts), frozenset(sequences), split)


def _parts(stages: list[Stage], alike: list[int], cluster: Cluster, rows: int) -> tuple[float, ...]:
    """Seconds of what a pipeline may be cut between, in order, for one sequence: products and attention."""
    clocks = {i: OperatorTimes(cluster, stages[i].program) for i in dict.fromkeys(alike)}
    made = {i: [sum(clock.seconds(node)) / rows for node, cost in clock.costs.items() if cost.forward]
            for i, clock in clocks.items()}
    return tuple(part for i in alike for part in made[i] or [0.0])


def _under(program: Program, recompute: str | float) -> Program:
    return replace(program, plan=replace(program.plan, recompute=recompute))


def _per_block(program: Program) -> list[Stage]:
    """The program cut into one stage a block, and what comes behind the last; into one, where it cannot be."""
    blocks = list(dict.fromkeys(path for n in program.graph.nodes if n.op == "call_function" and (path := block_path(n))))
    lists = Counter(path.rpartition(".")[0] for path in blocks)
    blocks = [b for b in blocks if lists[b.rpartition(".")[0]] > 1]
    try:
        return cut_stages(program, len(blocks), blocks[1:]) if len(blocks) > 1 else cut_stages(program, 1)
    except PlanError:
        return cut_stages(program, 1)


def _of_attention(program: Program, rows: int) -> dict[str, float]:
    """Bytes of keys and values, and of all that attention takes and makes."""
    values, ring, heads, count = measure(program).values, 0, 0, 0
    for node in program.graph.nodes:
        if node.target in ATTENTION:
            q, k, v = (values[n] for n in node.args[:3])
            made = values[node]
            out = made[0] if isinstance(made, tuple) else made
            ring, heads, count = ring + k.bytes + v.bytes, heads + q.bytes + k.bytes + v.bytes + out.bytes, count + 1
    return {"ring": ring / rows, "heads": heads / rows, "attentions": count}


def _numbers(program: Program, base: Plan) -> dict[str, float]:
    sizes = [(full_value(n), s) for n, s in program.source_of().items() if s.kind == "param"]
    numbers = sum(v.numel() for v, _ in sizes)
    stored = max((v.element_size() for v, _ in sizes), default=4)
    used = base.param_dtype.itemsize if base.param_dtype is not None else stored
    summed = base.reduce_dtype.itemsize if base.reduce_dtype is not None else stored
    return {"numbers": numbers, "tensors": len(sizes), "stored": stored, "used": used, "summed": summed,
            "copied": float(used != stored)}


def _of_tensor(program: Program, alone: Program, dimensions: Dimensions) -> dict[str, float]:
    """What tp splits and communicates, from a program of `LEARNED` ranks of tp, which have other experts; of experts'
    parameters, which ep splits instead, in `n_expert`."""
    found = {"n_split": 0.0, "n_same": 0.0, "n_expert": 0.0, "tp_forward": 0.0, "tp_backward": 0.0, "tp_count": 0.0}
    of_experts = {s.name for n, s in alone.source_of().items() if s.kind == "param" and _has_experts(n, dimensions)}
    for node, source in program.source_of().items():
        if source.kind == "param":
            whole, mine = full_value(node).numel(), math.prod(shard_shape(sharding_at(node), program.mesh))
            kind = "n_expert" if source.name in of_experts else "n_split" if mine < whole else "n_same"
            found[kind] += whole
    for ahead, back in _collectives(program, lambda n: n.target not in EXCHANGES):
        found["tp_forward"] += ahead / dimensions.batch
        found["tp_backward"] += back / dimensions.batch
        found["tp_count"] += bool(ahead) + bool(back)
    return found


def _has_experts(node: fx.Node, dimensions: Dimensions) -> bool:
    """Whether a parameter holds one matrix for each expert."""
    shape = full_value(node).shape
    return len(shape) == 3 and shape[0] in dimensions.experts


def _of_experts(program: Program | None, rows: int) -> dict[str, float]:
    """Bytes of rows that are sent to their experts and back, of all ranks; from a program of `LEARNED` ranks of ep, if there
    is one."""
    found = {"rows": 0.0, "ep_count": 0.0}
    for ahead, _ in _collectives(program, lambda n: n.target in EXCHANGES) if program is not None else ():
        found["rows"] += ahead * LEARNED / rows
        found["ep_count"] += 2
    return found


def _learned(captured: Captured, plan: Plan) -> Program | None:
    """The program of two ranks, where the model has one."""
    try:
        return captured.partition(plan)
    except FxparError:
        return None


def _collectives(program: Program, wanted: Any) -> Iterator[tuple[float, float]]:
    """Bytes of the full tensor that each collective gathers or scatters, forward and backward; an all-reduce does both."""
    values = measure(program).values
    for node in program.graph.nodes:
        made = typed(node) if node.op == "call_function" else None
        if made is None or made.ranks(program.mesh) == 1 or not wanted(node):
            continue
        size = values[node].bytes
        back = made.backward_bytes(size, values[made.value].dtype, program.mesh)
        kinds = made.forward.comm, made.backward.comm if made.backward is not None and values[node].requires_grad else None
        yield tuple(  # type: ignore[misc]
            0.0 if kind is None else (2.0 if kind == "all_reduce" else 1.0) * result * (
                made.ranks(program.mesh) if kind == "reduce_scatter" else 1)
            for kind, result in zip(kinds, (size, back), strict=True))


def _all_kept(stages: list[Stage], alike: list[int], halved: list[Stage], rows: int) -> dict[str | float, dict[str, float]]:
    """Recomputation -> what is kept under it. alike: of each stage, which one stands for it. halved: the stages of `LEARNED`
    ranks of tp, where there are such; what each of these ranks keeps of gathered values grows with tp as much as it does
    without recomputation."""
    others = first_alike([s.program for s in halved])
    found: dict[str | float, dict[str, float]] = {}
    grows = {"kept_blocks": 0.0, "kept_end": 0.0}
    for policy in RECOMPUTE:
        whole = _kept(stages, alike, policy, rows)
        parts = _kept(halved, others, policy, rows / LEARNED) if halved else whole
        if whole is None or parts is None:
            continue
        more = {name: max(0.0, parts[name] - whole[name]) for name in whole}
        grows = more if policy == "none" else grows
        found[policy] = whole | {f"{name}_tp": size for name, size in more.items()} | {
            f"{name}_gathered": min(more[name], grows[name]) for name in ("kept_blocks", "kept_end")}
    return found


def _kept(stages: list[Stage], alike: list[int], policy: str | float, rows: float) -> dict[str, float] | None:
    """What blocks, and what comes behind the last, keep, and need while they run, for one sequence; None where it cannot be
    traced. alike: of each stage, which one is traced for it."""
    try:
        traced = {i: predict(_under(stages[i].program, policy)) for i in dict.fromkeys(alike)}
    except Exception as error:  # whatever stops Inductor: plans that recompute so are not searched
        if policy == "none":
            raise FxparError(f"no plan can be suggested, as the memory of a step is not predicted ({type(error).__name__}: "
                             f"{str(error).partition(chr(10))[0]})") from error
        return None
    peaks = [traced[i] for i in alike]
    kept = [peak.kept / rows for peak in peaks]
    room = [max(0.0, (peak.parts["activations"] + peak.parts["temporaries"] - peak.kept) / rows) for peak in peaks]
    last = kept[-2] if len(kept) > 2 else kept[-1]
    return {"kept_blocks": sum(kept[:-1]) + last, "kept_end": max(0.0, kept[-1] - last),
            "room_block": max(room[:-1], default=0.0), "room_end": room[-1]}
