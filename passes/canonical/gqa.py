"""gqa: attention on repeated key and value heads becomes attention with fewer heads of those."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.ops.vocabulary import ATTENTION, RESHAPES
from fxpar.passes.rewrite import remove_unread
from fxpar.program import Program, value_of

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)


def fold_repeat_kv(program: Program) -> Program:
    """Let attention repeat the key and value heads, instead of the graph; in place.

    Takes: attention without a mask (with one, most kernels cannot repeat heads), on 4 dims; on a GPU in half precision (the
    kernel for fp32 there cannot repeat heads, and PyTorch would fall back to one that makes all scores).
    Afterwards: where each key head and each value head is repeated the same number of times in a row, by
    `repeat_interleave` or by unsqueeze, expand and reshape, it reads the heads that there are, and has
    ``enable_gqa=True``, which means the same repetition.
    """
    for node in program.graph.nodes:
        if node.target not in ATTENTION or node.kwargs.get("enable_gqa"):
            continue
        if (len(node.args) > 3 and node.args[3] is not None) or node.kwargs.get("attn_mask") is not None:
            continue
        query, key, value = (n for n in node.args[:3] if isinstance(n, fx.Node))
        if value_of(query).device.type == "cuda" and value_of(query).dtype not in (torch.float16, torch.bfloat16):
            continue
        of_key, of_value = _unrepeated(key), _unrepeated(value)
        if of_key is None or of_value is None or value_of(query).dim() != 4:
            continue
        same = value_of(of_key).shape[1] == value_of(of_value).shape[1]
        if same and value_of(query).shape[1] == value_of(key).shape[1] == value_of(value).shape[1]:
            node.args = (query, of_key, of_value, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
    remove_unread(program.graph)
    program.graph.lint()
    return program


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """What `node`, [b, heads * times, s, d], repeats `times` in a row along dim 1; None if nothing."""
    node = _original(node)
    if node.target is aten.repeat_interleave.self_int:
        args: Any = node.args
        source, times = args[:2]
        dim = args[2] if len(args) > 2 else node.kwargs.get("dim")
        repeats = isinstance(times, int) and value_of(node).dim() == 4 and dim in (1, -3)
        return source if repeats else None
    expand = _operand(node, *RESHAPES)
    unsqueeze = _operand(expand, aten.expand.default)
    source = _operand(unsqueeze, aten.unsqueeze.default)
    if expand is None or unsqueeze is None or source is None or value_of(source).dim() != 4:
        return None
    b, heads, s, d = value_of(source).shape
    times = value_of(node).shape[1] // heads
    shapes = [tuple(value_of(n).shape) for n in (unsqueeze, expand, node)]
    exact = shapes == [(b, heads, 1, s, d), (b, heads, times, s, d), (b, heads * times, s, d)]
    return source if exact and unsqueeze.args[1] in (2, -3) else None


def _operand(node: fx.Node | None, *targets: object) -> fx.Node | None:
    """The operand of `node`, if it is a call of one of `targets`."""
    if node is None or node.target not in targets:
        return None
    args: Any = node.args
    return _original(args[0])


def _original(node: fx.Node) -> fx.Node:
    """`node` before copies, and before slices that cut nothing."""
    while node.target in _COPIES or node.target is aten.slice.Tensor:
        before: Any = node.args[0]
        if value_of(node).shape != value_of(before).shape:
            break
        node = before
    return node
