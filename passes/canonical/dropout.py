"""dropout: every dropout drawn from the counter-based generator, so that a plan does not change it."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar.ops.attention import windowed_attention
from fxpar.ops.dropout_attention import dropout_attention, refusal, uses_kernels
from fxpar.ops.rng import dropout_mask
from fxpar.ops.vocabulary import SDPA
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter, device_of, remove_unread
from fxpar.program import Program, Source, user_line, value_of

aten = torch.ops.aten
PLAIN = (aten.dropout.default, aten.native_dropout.default)
WITH_DROPOUT = (SDPA, windowed_attention)


def expand_dropout(graph: fx.Graph) -> None:
    """Rewrite, in place, what drops whole channels, and `AlphaDropout`, to plain dropout of a tensor of ones.

    Takes: a graph as exported. Making it functional would turn them into random operators that nothing knows; so it would what
    drops in place, which becomes a copy of what is kept.
    """
    for node in list(graph.nodes):
        if node.target in IN_PLACE and node.args[1] and node.args[2]:
            r = Rewriter(graph, node)
            r.replace(r.call(aten.copy_.default, node.args[0], r.call(IN_PLACE[node.target], *node.args)))
    for node in list(graph.nodes):
        build = RELATIVES.get(node.target)
        if build is not None and node.args[1] and node.args[2]:
            build(Rewriter(graph, node), *node.args[:2])


def _noise(r: Rewriter, x: fx.Node, p: float, features: bool) -> fx.Node:
    """Dropout of ones: 0 or 1 / (1 - p), for each element or for each channel."""
    shape = list(x.meta["val"].shape)
    shape = [n if i < 2 or not features else 1 for i, n in enumerate(shape)]
    return r.call(aten.dropout.default, r.call(aten.new_ones.default, x, shape), p, True)


def _features(r: Rewriter, x: fx.Node, p: float) -> None:
    r.replace(r.call(aten.mul.Tensor, x, _noise(r, x, p, True)))


def _alpha(features: bool) -> Callable[[Rewriter, fx.Node, float], None]:
    """What is dropped becomes the lowest value of SELU; mean and variance are kept."""

    def build(r: Rewriter, x: fx.Node, p: float) -> None:
        lowest = 1.7580993408473766
        scale = 1 / math.sqrt((lowest**2 * p + 1) * (1 - p)) if p < 1 else 0.0
        keep = r.call(aten.mul.Tensor, _noise(r, x, p, features), 1 - p)
        low = lowest * scale
        shift = r.call(aten.add.Scalar, r.call(aten.mul.Tensor, keep, low), low * (p - 1))
        kept = r.call(aten.mul.Tensor, x, r.call(aten.mul.Tensor, keep, scale))
        r.replace(r.call(aten.add.Tensor, kept, shift))

    return build


IN_PLACE = {
    aten.dropout_.default: aten.dropout.default,
    aten.feature_dropout_.default: aten.feature_dropout.default,
    aten.alpha_dropout_.default: aten.alpha_dropout.default,
    aten.feature_alpha_dropout_.default: aten.feature_alpha_dropout.default,
}

RELATIVES = {
    aten.feature_dropout.default: _features,
    aten.alpha_dropout.default: _alpha(False),
    aten.feature_alpha_dropout.default: _alpha(True),
}


def counter_dropout(program: Program) -> Program:
    """Rewrite, in place, every dropout that is on to the counter-based generator of `fxpar.ops.rng`.

    Takes: a simplified program. Afterwards: if anything was rewritten there is one more source, the "seed" (an int64
    scalar that the caller passes at every step); each dropout has a site number, in program order; plain dropout is a
    `dropout_mask`; attention with dropout is a `dropout_attention`. What this operator does not compute is written out as two
    products around a softmax, with a `dropout_mask` between them, and noted; so is, without a note, all of it under
    `use_kernels(False)`.
    """
    sites = [n for n in program.graph.nodes if _rate(n)]
    if not sites:
        return program
    seed = seed_of(program, device_of(sites[0].args[0]))
    for site, node in enumerate(sites):
        r = Rewriter(program.graph, node)
        if node.target in WITH_DROPOUT:
            _attention(program, r, node, seed, site)
        else:
            _plain(r, node, seed, site)
    remove_unread(program.graph)
    return program


def _rate(node: fx.Node) -> float:
    if node.op != "call_function" or node.target not in (*PLAIN, *WITH_DROPOUT):
        return 0.0
    a = bind(node)
    return a.get("dropout_p", 0.0) if node.target in WITH_DROPOUT else a["p"] if a["train"] in (True, None) else 0.0


def seed_of(program: Program, device: torch.device) -> fx.Node:
    """The placeholder that what draws takes its seed from, made where the program has none."""
    for node, source in program.source_of().items():
        if source.kind == "seed":
            return node
    last = program.placeholders()[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder("dropout_seed")
    modes = [n.meta["val"].fake_mode for n in program.placeholders() if hasattr(n.meta.get("val"), "fake_mode")]
    with modes[0] if modes else contextlib.nullcontext():
        value = torch.zeros((), dtype=torch.int64, device=device if modes else "meta")
    node.meta["val"] = value
    program.sources.append(Source("seed", "dropout_seed", value))
    return node


def _drop(r: Rewriter, x: fx.Node, p: float, seed: fx.Node, site: int) -> tuple[fx.Node, fx.Node]:
    """(`x` with its zeros, the mask of what is kept)."""
    keep = r.call(dropout_mask, x, seed, p=p, site=site)
    scaled = r.call(aten.mul.Tensor, x, 1 / (1 - p) if p < 1 else 0.0)
    return r.call(aten.where.ScalarOther, keep, scaled, 0.0), keep


def _plain(r: Rewriter, node: fx.Node, seed: fx.Node, site: int) -> None:
    a = bind(node)
    made = _drop(r, a["input"], a["p"], seed, site)
    if node.target is aten.dropout.default:
        r.replace(made[0])
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(made[index])
        r.graph.erase_node(user)
    r.graph.erase_node(node)


def _attention(program: Program, r: Rewriter, node: fx.Node, seed: fx.Node, site: int) -> None:
    if node.target is windowed_attention:
        options = {**node.kwargs, "p": node.kwargs["dropout_p"]}
        del options["dropout_p"]
        r.replace(r.call(dropout_attention, *node.args, seed, site=site, **options))
        return
    a = bind(node)
    if not uses_kernels():
        _written_out(r, a, seed, site)
        return
    q, k, v, mask, p = a["query"], a["key"], a["value"], a["attn_mask"], a["dropout_p"]
    why = refusal(value_of(q), value_of(k), value_of(v), None if mask is None else value_of(mask), a["enable_gqa"], p)
    if not why and mask is not None and _is_trained(program, mask):
        why = "its mask has a gradient"
    if why:
        program.note(f"attention with dropout{' at ' + line if (line := user_line(node)) else ''} makes all scores: {why}")
        _written_out(r, a, seed, site)
        return
    options = dict(attn_mask=mask, is_causal=a["is_causal"], scale=a["scale"], enable_gqa=a["enable_gqa"])
    r.replace(r.call(dropout_attention, q, k, v, seed, p=p, site=site, **{n: o for n, o in options.items() if o}))


def _is_trained(program: Program, mask: fx.Node) -> bool:
    """Whether a gradient may be asked of an attention's mask."""
    sources, seen, pending = program.source_of(), set(), [mask]
    while pending:
        node = pending.pop()
        value = value_of(node)
        if node in seen or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
            continue
        if node in sources and sources[node].requires_grad:
            return True
        seen.add(node)
        pending += node.all_input_nodes
    return False


def _written_out(r: Rewriter, a: dict[str, Any], seed: fx.Node, site: int) -> None:
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["enable_gqa"] and q.meta["val"].shape[-3] != k.meta["val"].shape[-3]:
        groups = q.meta["val"].shape[-3] // k.meta["val"].shape[-3]
        k, v = (r.call(aten.repeat_interleave.self_int, t, groups, -3) for t in (k, v))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(q.meta["val"].shape[-1])
    scores = r.call(aten.matmul.default, r.call(aten.mul.Tensor, q, scale), r.call(aten.transpose.int, k, -2, -1))
    if a["is_causal"]:
        rows, columns = (int(n) for n in scores.meta["val"].shape[-2:])
        device = device_of(q)
        at = r.call(aten.unsqueeze.default, r.call(aten.arange.default, rows, device=device), 1)
        allowed = r.call(aten.le.Tensor, r.call(aten.arange.default, columns, device=device), at)
        scores = r.call(aten.where.ScalarOther, allowed, scores, -math.inf)
    elif mask is not None and mask.meta["val"].dtype is torch.bool:
        scores = r.call(aten.where.ScalarOther, mask, scores, -math.inf)
    elif mask is not None:
        scores = r.call(aten.add.Tensor, scores, mask)
    weights = r.call(aten.softmax.int, scores, -1)
    weights, _ = _drop(r, weights, a["dropout_p"], seed, site)
    r.replace(r.call(aten.matmul.default, weights, v))
