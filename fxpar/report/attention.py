"""What context parallelism makes of a model: how each attention runs, and what else is gathered along the sequence."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxpar.ops.collectives import typed
from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.ring import chunks, costs
from fxpar.ops.ring.chunks import attention_of_chunks
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.infer.roles import SOFTMAX
from fxpar.passes.infer.rules.attention import sight_of
from fxpar.passes.infer.rules.spec import Spec
from fxpar.passes.place.place import circulating
from fxpar.plan import Plan
from fxpar.program import Program, module_path
from fxpar.report.text import MIB, table
from fxpar.report.traffic import returned_bytes, sent_around
from fxpar.sharding.factors import Dim, leaves
from fxpar.sharding.facts import dims_of, global_value, local_value
from fxpar.sharding.layout import Layout, local_shape, restrict
from fxpar.sharding.mesh import Axes, Mesh


@dataclass(frozen=True)
class AttentionRow:
    """Attention alike, under context parallelism.

    where: the module (layer numbers replaced by ``*``). count: how many a step has. how: what is done along which axes of cp, and
    why. sent: bytes that one rank receives for one of them, forward and backward. workspace: bytes that the operators of fxpar
    hold at once beside their operands and results, forward and backward, as they are in the predicted peak.
    """

    where: str
    count: int
    how: str
    why: str
    sent: tuple[int, int]
    workspace: tuple[int, int]


def attention_rows(program: Program, count: int) -> list[AttentionRow]:
    """Those of a step of `count` microbatches, of which the partitioned program runs one; none without context parallelism."""
    if program.plan.cp == 1 or program.placements is None:
        return []
    rows: dict[AttentionRow, int] = {}
    sent = _sent(program)
    for node, placement in program.placements.operators.items():
        row = _row(program, node, placement.at, sent.get(node.name, (0, 0))) if node.target in ATTENTION else None
        if node.target in SOFTMAX and _is_written_out(node):
            row = _written_out(program, node, placement.at)
        if row is not None:
            rows[row] = rows.get(row, 0) + count
    return [replace(row, count=n) for row, n in rows.items()]


def _row(program: Program, node: fx.Node, at: Layout, sent: tuple[int, int]) -> AttentionRow:
    mesh, plan, spec = program.mesh, program.plan, global_value(node).spec
    assert spec is not None
    heads = _on(at, mesh, [spec.outs[0][-3]] if len(spec.outs[0]) > 3 else [])
    queries = _on(at, mesh, [spec.outs[0][-2]])
    ring = circulating(spec, at, mesh, plan)
    how = [f"heads over {'+'.join(heads)} (all-to-all)"] if heads else []
    if ring:
        how.append(f"keys and values go round over {'+'.join(ring)}")
    elif queries:
        how.append(f"keys and values gathered over {'+'.join(queries)}")
    workspace = 0, 0
    if ring:
        schedule, q, k, v = _ring(node, spec, at, mesh, ring)
        workspace = costs.workspace_bytes(schedule, q, k, v, node.meta["val"].dtype)
    elif any(n.target is attention_of_chunks and local_value(n).global_name == node.name
             for n in program.graph.nodes):
        gathered = {g for o in spec.operands[1:3] for f in o.gathered for g in f.leaves()}
        q, k, v = (local_shape(o.dims, restrict(at, o.dims, gathered if i else ()), mesh)
                   for i, o in enumerate(spec.operands[:3]))
        workspace = chunks.workspace_bytes(q, k, v, node.meta["val"].dtype)
    where = re.sub(r"\b\d+\b", "*", module_path(node))
    return AttentionRow(where, 1, ", ".join(how) or "replicated on every rank", _why(node, plan, mesh, heads, queries, ring),
                        sent if program.training else (sent[0], 0), workspace)


def _is_written_out(node: fx.Node) -> bool:
    """Whether a softmax is that of attention, in a model that does without the operator."""
    dims = dims_of(node)
    return len(dims) > 2 and any(f.role == "seq" for f in leaves(dims[-2])) and any(
        f.role in ("seq", "keys") for f in leaves(dims[-1]))


def _written_out(program: Program, node: fx.Node, at: Layout) -> AttentionRow:
    queries = _on(at, program.mesh, [dims_of(node)[-2]])
    how = (f"written out; keys and values gathered over {'+'.join(queries)}" if queries
           else "written out; replicated on every rank")
    path, cp, there, back = module_path(node), set(program.mesh.axes("cp")), 0, 0
    for new in program.graph.nodes:
        made = typed(new)
        if (made is not None and made.gathers and cp & set(made.axes) and module_path(new) == path
                and not local_value(new).unshard):
            there += local_value(new).bytes
            back += local_value(new).bytes if local_value(new).needs_grad and program.training else 0
    return AttentionRow(re.sub(r"\b\d+\b", "*", path), 1, how,
                        "the model makes its scores itself, or its weights drop out", (there, back), (0, 0))


def _on(at: Layout, mesh: Mesh, dims: Iterable[Dim]) -> Axes:
    """The axes of cp that split one of these dims."""
    flat = {f for d in dims for f in leaves(d)}
    return tuple(a for a in mesh.axes("cp") if at.get(a) in flat)


def _why(node: fx.Node, plan: Plan, mesh: Mesh, heads: Axes, queries: Axes, ring: Axes) -> str:
    reasons = [f"cp_comm={plan.cp_comm}"]
    left = [a for a in mesh.axes("a2a") if a not in heads]
    if left:
        reasons.append(f"its heads do not divide by {'+'.join(left)}")
    if queries and not ring and plan.sends_around:
        reasons.append("its weights drop out" if node.target is dropout_attention else
                       "its mask is a tensor" if sight_of(node) is None else
                       "its keys are not of the queries' sequence, or tp splits it too")
    return "; ".join(reasons)


def _sent(program: Program) -> dict[str, tuple[int, int]]:
    """Name of an attention -> bytes that collectives over cp, and rings, bring for it, forward and backward, its output's
    exchange for heads included."""
    cp, found = set(program.mesh.axes("cp")), defaultdict[str, list[tuple[int, int]]](list)
    for new in program.graph.nodes:
        made = typed(new)
        if made is None or not cp & set(made.axes) or made.forward.comm is None:
            continue
        size, back = local_value(new).bytes, 0
        if local_value(new).needs_grad and made.backward is not None and made.backward.comm is not None:
            back = returned_bytes(new, made, program.mesh)
        behind = made.kind == "all_to_all" and isinstance(made.value, fx.Node)
        for name in {local_value(new).made_for, *([local_value(made.value).global_name or ""] if behind else [])}:
            found[name].append((size, back))
    for node, _, there, back in sent_around(program):
        found[local_value(node).global_name or ""].append((there, back))
    return {name: (sum(s for s, _ in each), sum(b for _, b in each)) for name, each in found.items()}


def _ring(node: fx.Node, spec: Spec, at: Layout, mesh: Mesh, axes: Axes) -> tuple[RingSchedule, list[int], list[int], list[int]]:
    """The schedule of a ring, and the shapes of a rank's queries, keys and values."""
    q, k, v = (local_shape(o.dims, at, mesh) for o in spec.operands[:3])
    sight = sight_of(node)
    assert sight is not None
    dealt = any(f.causal for f in leaves(spec.outs[0][-2]))
    return RingSchedule(mesh.size(*axes), q[2], k[2], sight.causal, dealt, sight.window), q, k, v


def gathered_note(program: Program) -> list[str]:
    """What is gathered along the sequence beside keys and values."""
    cp = set(program.mesh.axes("cp"))
    attention = {n.name for n in (program.placements.operators if program.placements else ()) if n.target in ATTENTION}
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        made = typed(node)
        if made is None or not made.gathers or not cp & set(made.axes) or local_value(node).unshard:
            continue
        name = local_value(node).made_for
        if name not in attention:
            where = re.sub(r"\b\d+\b", "*", module_path(node))
            found[re.sub(r"(_default|_tensor)?(_\d+)?$", "", name.lower()) + (f" ({where})" if where else "")] = None
    return [f"gathered along the sequence, over {'+'.join(sorted(cp))}, for: {', '.join(found)}"] if found else []


def lines(rows: Sequence[AttentionRow]) -> list[str]:
    """The table of a report."""
    cells = [(r.where, str(r.count), r.how, r.why, *(f"{n / MIB:.2f}" for n in (*r.sent, max(r.workspace)))) for r in rows]
    return table(("attention", "count", "how", "why", "MiB forward", "MiB backward", "MiB workspace"), cells)
