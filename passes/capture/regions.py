"""Inlining of the nested graphs that `torch.export` makes for no-grad and autocast regions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.passes.capture.autocast import write_casts

aten = torch.ops.aten


def inline_regions(gm: fx.GraphModule) -> None:
    """Replace every nested region of `gm` by its operators, in place.

    Takes: a graph that may hold no-grad and autocast regions as higher-order calls.
    Afterwards: it holds none; what a no-grad region returns is detached; inside an autocast region the
    casts that the dispatcher would have made are written out.
    """
    _mend_users(gm)
    regions = [n for n in gm.graph.nodes if compat.no_grad_region(n) or compat.autocast_region(n)]
    for node in regions:
        if compat.no_grad_region(node):
            enabled, body, *args = node.args
            finish = _as_it_is if enabled else _detach(gm.graph)
        else:
            device, dtype, enabled, _cache, body, *args = node.args
            finish = _as_it_is
        sub = getattr(gm, body.target)
        inline_regions(sub)
        if compat.autocast_region(node) and enabled:
            write_casts(sub, device, dtype)
        with gm.graph.inserting_before(node):
            _splice(gm, sub, node, args, finish)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _mend_users(gm: fx.GraphModule) -> None:
    """Have every node known to what it reads: export cuts graphs at regions, and forgets that of what nobody reads."""
    if all(n in read.users for n in gm.graph.nodes for read in n.all_input_nodes):
        return
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    gm.graph = graph


def _as_it_is(value: fx.Node) -> fx.Node:
    return value


def _detach(graph: fx.Graph) -> Callable[[fx.Node], fx.Node]:
    def finish(value: fx.Node) -> fx.Node:
        new = graph.call_function(aten.detach.default, (value,))
        new.meta = dict(value.meta)
        return new

    return finish


def _splice(gm: fx.GraphModule, sub: fx.GraphModule, call: fx.Node, args: list, finish: Callable) -> None:
    values: dict[fx.Node, Any] = {}
    actual = iter(args)
    for inner in sub.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = next(actual)
        elif inner.op == "get_attr":
            name = f"{call.name}_{inner.target}".replace(".", "_")
            setattr(gm, name, getattr(sub, inner.target))
            values[inner] = gm.graph.get_attr(name)
        elif inner.op == "output":
            results = fx.map_arg(inner.args[0], lambda n: finish(values[n]))
        else:
            values[inner] = gm.graph.node_copy(inner, lambda n: values[n])
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(call)
