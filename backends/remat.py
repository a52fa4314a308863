"""remat: what the backward pass computes, or gathers, again instead of keeping it from the forward pass.

A pass over the joint graph (forward and backward in one) that AOTAutograd traces. It decides by tags; PyTorch's min-cut
partitioner, which reads them, decides what is left open: of values that are cheap to make again it keeps the fewest bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxpar import compat
from fxpar.ops.before import before
from fxpar.ops.exchange import PLANS
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.ring.chunks import FORWARD as CHUNKS
from fxpar.ops.ring.operator import FORWARD as RING
from fxpar.ops.rng import dropout_mask
from fxpar.ops.vocabulary import WAIT, is_attention_kernel, is_view
from fxpar.plan import Plan
from fxpar.program import block_path
from fxpar.sharding.facts import local_value

aten = torch.ops.aten
SAVE, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
ATTENTION = (RING.overloadpacket, CHUNKS.overloadpacket)
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten._grouped_mm, grouped_mm.overloadpacket)
CHOICES = (aten.topk, aten.sort, aten.argsort, aten.argmax, aten.argmin, aten.kthvalue, aten.multinomial)
"""Operators that choose among elements. What they chose is kept: made again, rounded otherwise, they may choose otherwise
(another expert), and what the forward pass kept would no longer fit."""
BLOCK, UNSHARD, DRAWN = "fxpar_block", "fxpar_unshard", "fxpar_drawn"
"""Keys of ``meta["custom"]``, which reaches the joint graph: the block a value belongs to; that it is a parameter gathered
from where it is stored; that it is a part of drawing a dropout mask."""


def mark(node: fx.Node) -> dict[str, Any]:
    """What this module has to know about a node of a partitioned program, as ``meta["custom"]`` of its copy."""
    custom: dict[str, Any] = {BLOCK: block_path(node)}
    if local_value(node).unshard:
        custom[UNSHARD] = True
    if node.target is dropout_mask:
        custom[DRAWN] = True
    return custom


def choose_recomputation(graph: fx.Graph, plan: Plan) -> None:
    """Tag the forward part of a joint graph, in place, with ``meta["recompute"]``.

    Takes: a joint graph of a program whose nodes were `mark`ed. Afterwards: parameters gathered at their use are gathered
    again under zero=3 (but for those used after the last block, which the backward pass needs at once) and kept under zero=1
    and 2, and by the plan's `recompute`

    - "selective": inside blocks, outputs of matrix products, attention and collectives are kept, all else is made again;
    - "full": what leaves a block is kept, all that is inside is made again;
    - "none", or a memory budget: nothing more is decided here;

    but for what `CHOICES` made, the plans of exchanges (which rows go to which expert's rank: they are small, and say how large
    other values are) and buffers as they were before the forward wrote them, which are kept, and for dropout masks, which are
    always drawn again: that reads nothing.
    """
    forward = _forward(graph)
    decide = _POLICIES.get(str(plan.recompute), _open)
    tail = _after_blocks(forward)
    for node in forward:
        policy = decide(node, forward)
        decides = policy is not None or plan.memory_budget is not None
        if _plans(node) or node.target is before or (decides and _packet(node) in CHOICES):
            policy = SAVE
        if node.meta.get("custom", {}).get(DRAWN):
            policy = AGAIN
        if _is_unsharded(node):
            keep = not plan.gathers_each_use or node in tail
            policy = AGAIN if not keep else SAVE if node.target is WAIT else None
        if policy is not None:
            node.meta["recompute"] = policy
            node.meta["ac_graph_id"] = 0


def _forward(graph: fx.Graph) -> dict[fx.Node, None]:
    """The operators of the forward pass, in order."""
    return {n: None for n in graph.nodes if n.op == "call_function" and not compat.in_backward(n)}


def _after_blocks(forward: dict[fx.Node, None]) -> set[fx.Node]:
    """What follows the last operator of the last block."""
    tail: set[fx.Node] = set()
    for node in reversed(forward):
        if block_of(node):
            return tail
        tail.add(node)
    return set()


def _is_unsharded(node: fx.Node) -> bool:
    """Part of a gather of a parameter, or a mere rearrangement of what it gathered."""
    if node.meta.get("custom", {}).get(UNSHARD):
        return True
    inputs = node.all_input_nodes
    takes_one = len(inputs) == 1 and (node.target is operator.getitem or is_view(node))
    return takes_one and inputs[0].op == "call_function" and _is_unsharded(inputs[0])


def block_of(node: fx.Node) -> str:
    """The block that an operator of a joint graph, or of either half, belongs to; "" for none."""
    return node.meta.get("custom", {}).get(BLOCK, "")


def _open(node: fx.Node, forward: dict[fx.Node, None]) -> CheckpointPolicy | None:
    return None


def _made_by(node: fx.Node) -> fx.Node:
    """The operator that made a value: of one of several results, the one that made them all."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _packet(node: fx.Node) -> Any:
    return getattr(_made_by(node).target, "overloadpacket", None)


def _plans(node: fx.Node) -> bool:
    """Whether a value is a part of a plan of an exchange of rows."""
    return _made_by(node).target in PLANS


def _selective(node: fx.Node, forward: dict[fx.Node, None]) -> CheckpointPolicy | None:
    packet = _packet(node)
    attention = packet is not None and (packet in ATTENTION or is_attention_kernel(packet.__name__))
    if packet in PRODUCTS or attention or node.target is WAIT:
        return SAVE
    return AGAIN if block_of(_made_by(node)) else None


def _full(node: fx.Node, forward: dict[fx.Node, None]) -> CheckpointPolicy | None:
    block = block_of(_made_by(node))
    if not block:
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return AGAIN  # several results: each of them is kept, or not
    leaves = any(u.op == "output" or (u in forward and block_of(u) != block) for u in node.users)
    return SAVE if leaves else AGAIN


_POLICIES: dict[str, Callable[[fx.Node, dict[fx.Node, None]], CheckpointPolicy | None]] = {
    "selective": _selective,
    "full": _full,
}
