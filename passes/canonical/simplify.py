"""simplify: drop what computes nothing, so that later passes see only the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import remove_unread
from fxpar.program import Program, user_line

aten = torch.ops.aten

CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
ALIASES = (aten.alias.default, aten.lift_fresh_copy.default)
LOOKUPS = (aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default)  # fmt: skip


def simplify(program: Program) -> Program:
    """Erase, in place: metadata assertions, casts to the same dtype and device, aliases, dropout that is off, the joint
    broadcasting of tensors (of which expansions are left), dead code (random numbers that nothing reads included). Gradients of
    lookups become dense ones.

    The values that remain are unchanged, bit for bit.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in LOOKUPS and bind(node)["sparse"]:
            _with_dense_gradient(program, node)
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.native_dropout.default and not (node.args[1] and node.args[2]):
            _off(graph, node)
        elif node.target is aten.broadcast_tensors.default:
            _expansions(graph, node)
        elif _is_noop(node):
            args: Any = node.args
            node.replace_all_uses_with(args[0])
            graph.erase_node(node)
    remove_unread(graph, lambda node: node.is_impure() and not compat.is_random(node.target))
    return program


def _with_dense_gradient(program: Program, node: fx.Node) -> None:
    """A lookup's gradient is the same, of a tensor in full."""
    node.args = tuple({**bind(node), "sparse": False}.values())
    node.kwargs = {}
    program.note(f"the gradient of a lookup with sparse=True is dense ({user_line(node)}): use Adam in the place of SparseAdam")


def _off(graph: fx.Graph, node: fx.Node) -> None:
    """Its mask, which nothing needs where it keeps everything, stays only if it is read."""
    args: Any = node.args
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(args[0])
            graph.erase_node(user)


def _expansions(graph: fx.Graph, node: fx.Node) -> None:
    """Each of its results is an operand, expanded where that is smaller; losses of torch.nn.functional begin like this."""
    args: Any = node.args
    for user in list(node.users):
        operand, value = args[0][user.args[1]], user.meta["val"]
        if operand.meta["val"].shape == value.shape:
            user.replace_all_uses_with(operand)
        else:
            with graph.inserting_before(user):
                new = graph.call_function(aten.expand.default, (operand, list(value.shape)))
            new.meta.update(user.meta)
            user.replace_all_uses_with(new)
        graph.erase_node(user)


def _is_noop(node: fx.Node) -> bool:
    args: Any = node.args
    if node.target in ALIASES:
        return True
    if node.target in DROPOUTS:
        return not args[2] or args[1] == 0
    if node.target not in CASTS:
        return False
    old, new = args[0].meta["val"], node.meta["val"]
    return old.dtype == new.dtype and old.device == new.device
