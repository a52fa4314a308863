"""unmask: rows of no expert, which grouped products leave out, need no mask beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.ops.experts import expert_product, sort_experts
from fxpar.passes.infer.rules.spec import bind
from fxpar.program import Program

aten = torch.ops.aten


def unmask_products(program: Program) -> Program:
    """Erase, in place, masks that put zeros into the rows of no expert where a product has zeros already, or reads nothing.

    Takes: a program whose rows are sorted by `sort_by_expert`. Afterwards: a mask of rows whose expert has a number from some `n`
    on is gone where its rows are what an `expert_product` of at most `n` matrices makes, or where such products alone read them.
    Those products make zeros of such rows, and give no gradient to them nor from them: all values and gradients stay as they are,
    bit for bit. Models have these masks for kernels that leave such rows as they were.
    """
    for node in list(program.graph.nodes):
        if node.target is not aten.masked_fill.Scalar:
            continue
        a = bind(node)
        experts, first = _of_no_expert(a["mask"])
        if experts is None or a["value"] != 0:
            continue
        if _product_of(a["self"], experts, first) or (node.users and all(
                user.args[0] is node and node not in user.args[1:] and _product_of(user, experts, first) for user in node.users)):
            node.replace_all_uses_with(a["self"])
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return program


def _of_no_expert(mask: fx.Node) -> tuple[fx.Node | None, int]:
    """The sorted numbers of experts of which a mask [rows, 1] says which are so large, and the first that is; None of others."""
    compared = mask.all_input_nodes[0] if mask.target is aten.unsqueeze.default and mask.args[1] in (1, -1) else mask
    if compared.target is not aten.ge.Scalar or mask.meta["val"].dim() != 2:
        return None, 0
    experts: Any
    first: Any
    experts, first = compared.args
    return (experts, first) if experts.target is sort_experts and isinstance(first, int) else (None, 0)


def _product_of(node: Any, experts: fx.Node, most: int) -> bool:
    """Whether a node is a product of the rows of these experts, of which there are at most so many."""
    return node.target is expert_product and node.args[2] is experts and len(node.args[1].meta["val"]) <= most
