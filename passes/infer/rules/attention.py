"""Rules of attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpar.ops.attention import MaskSight, attention_of_rows, windowed_attention
from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.ring.chunks import attention_of_chunks
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Operand, Spec, bind, einsum
from fxpar.sharding.factors import extent, leaves
from fxpar.sharding.facts import global_value


def sight_of(node: fx.Node) -> MaskSight | None:
    """What queries of an attention see; None where that is not known from how its mask is made."""
    args = bind(node)
    if node.target is windowed_attention:
        return MaskSight(True, args["window"], None, None, None)
    mask, window = args.get("attn_mask"), args.get("window")
    if isinstance(mask, fx.Node):
        return global_value(mask).sight if node.target is not dropout_attention else None
    return MaskSight(bool(args.get("is_causal")) or window is not None, window, None, None, None)


@rule(*ATTENTION)
def attention(op: Op) -> Spec:
    """Batch, heads and queries are parallel; keys and values are gathered where they are of the queries' sequence."""
    args: Any = op.node.args
    q, k, v = args[:3]
    mask = op["attn_mask"] if op.target is not windowed_attention else None
    grouped = bool(op["enable_gqa"]) and op.shape(q)[-3] != op.shape(k)[-3]
    if len(op.dims(q)) != 4 or len(op.dims(k)) != 4 or len(op.dims(v)) != 4:
        return _attention_any_rank(op, q, k, v, mask)
    if not grouped:
        spec = einsum(op, "b h q d!, b h k! d!, b h k! e -> b h q e", [q, k, v])
    else:
        spec = einsum(op, "b h q d!, b j k! d!, b j k! e -> b h q e", [q, k, v])
        spec.sums.clear()
        spec.maxes.clear()
        _group_heads(op, spec, q, k)
    spec.sums.clear()
    if isinstance(mask, fx.Node):
        _mask_operand(op, spec, mask)
    sight = sight_of(op.node)
    if op.target is dropout_attention:
        spec.leading, spec.emit = [spec.outs[0][2]], _emit_dropout
    elif sight is not None:
        _ids(op, spec, sight)
        spec.emit = lambda local: _emit_attention(local, sight)
        if leaves(op.dim(q, 2)) == leaves(op.dim(k, 2)):
            spec.circulates = spec.operands[1:3]
    return spec


def _emit_attention(local: Any, sight: MaskSight) -> fx.Node:
    """Where cp splits it, an operator that is told what queries see, and where in the sequence they are; elsewhere, and where
    that is no mask, the same one as on one device."""
    a, q, k = local.op, *(o.dims for o in local.spec.operands[:2])
    ids = {"q_segments": sight.q_segments, "kv_segments": sight.kv_segments, "kv_valid": sight.valid}
    ids = {name: local.row(node) for name, node in ids.items() if node is not None}
    if local.ring:
        ids = {name: local.part_of_row(x, k[-2]) for name, x in ids.items()}
        return local.call(ring_attention, *local.args[:3], local.ring, causal=sight.causal, zigzag=local.is_dealt(q[-2]),
                          window=sight.window, scale=a["scale"], **ids)
    split = bool(local.axes(q[-2]))
    if not (split and sight.causal) and not (ids and local.along("cp")):
        return local.default()
    starts = local.starts(q[-2])
    if starts is not None:
        if "q_segments" in ids:
            ids["q_segments"] = local.part_of_row(ids["q_segments"], q[-2])
        return local.call(attention_of_chunks, *local.args[:3], starts, causal=sight.causal, window=sight.window,
                          scale=a["scale"], **ids)
    if ids:
        return local.default()
    (rows,) = local.grid((q[-2],))
    return local.call(attention_of_rows, *local.args[:3], rows=rows, window=sight.window, scale=a["scale"],
                      enable_gqa=bool(a["enable_gqa"]))


def _emit_dropout(local: Any) -> fx.Node:
    """The same weights drop out, wherever in the global tensor the local ones lie."""
    return local.call(dropout_attention, *local.args, **local.kwargs, grid=local.grid(local.spec.outs[0][:3]))


def _ids(op: Op, spec: Spec, sight: MaskSight) -> None:
    """What queries see is said by small tensors, each of which is there whole but for the batch."""
    batch = spec.outs[0][0]
    for node in dict.fromkeys((sight.q_segments, sight.kv_segments, sight.valid)):
        if node is None:
            continue
        dims = op.dims(node)
        if dims[0] and not op.factors.align(batch, dims[0]):
            spec.replicated.update(batch, dims[0])
        spec.operands.append(Operand(node, dims, gathered={*dims[2], *dims[3]}))


def _group_heads(op: Op, spec: Spec, q: fx.Node, k: fx.Node) -> None:
    """Query heads are (key/value heads, group): the major part is the key/value heads themselves."""
    heads, kv = op.dim(q, 1), op.dim(k, 1)
    group = op.factors.new(extent(heads) // max(extent(kv), 1))
    if not op.factors.align(heads, (*kv, *group)):
        spec.replicated.update(heads, kv)


def _mask_operand(op: Op, spec: Spec, mask: fx.Node) -> None:
    """An explicit mask broadcasts to [..., q, k], and is gathered along k."""
    dims, rows = op.dims(mask), spec.outs[0][:-1]
    for have, want in zip(reversed(dims[:-1]), reversed(rows), strict=False):
        if have and not op.factors.align(want, have):
            spec.replicated.update(have, want)
    spec.operands.append(Operand(mask, dims, gathered=set(dims[-1]) if dims else set()))


def _attention_any_rank(op: Op, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> Spec:
    length = "q!" if op["is_causal"] else "q"
    spec = einsum(op, f"... {length} d!, ... k! d!, ... k! e -> ... q e", [q, k, v])
    spec.sums.clear()
    if isinstance(mask, fx.Node):
        _mask_operand(op, spec, mask)
    return spec
