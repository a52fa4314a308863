"""Inlining of the nested graphs that `torch.export` makes for no-grad and autocast regions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.passes.capture.autocast import write_casts
from fxpar.program import user_line

aten = torch.ops.aten


def inline_regions(gm: fx.GraphModule) -> None:
    """Replace every nested region of `gm` by its operators, in place.

    Takes: a graph that may hold no-grad and autocast regions as higher-order calls.
    Afterwards: it holds none; what a no-grad region returns, and what it writes into something else, is detached; inside an
    autocast region the casts that the dispatcher would have made are written out.
    Raises: `CaptureError` for what writes, in a no-grad region or through `detach` (which ``.data`` is, too), into a value that
    has a gradient: PyTorch takes the gradient of what was there before for that of the new value.
    """
    _inline(gm, {})


def _inline(gm: fx.GraphModule, trained: dict[fx.Node, bool]) -> None:
    """trained: whether the placeholders of `gm` have gradients, where it is not at its top, and what is known of other nodes."""
    _mend_users(gm)
    _require_no_hidden_writes(gm.graph, trained)
    regions = [n for n in gm.graph.nodes if compat.no_grad_region(n) or compat.autocast_region(n)]
    for node in regions:
        if compat.no_grad_region(node):
            enabled, body, *args = node.args
            finish = _as_it_is if enabled else _detach(gm.graph)
        else:
            device, dtype, enabled, _cache, body, *args = node.args
            finish = _as_it_is
        sub = getattr(gm, body.target)
        inner = [n for n in sub.graph.nodes if n.op == "placeholder"]
        values = {p: _has_gradient(a, trained) for p, a in zip(inner, args, strict=True)}
        _inline(sub, dict(values))
        if compat.no_grad_region(node) and not enabled:
            _detach_writes(sub.graph, values)
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


def _has_gradient(value: Any, known: dict[fx.Node, bool]) -> bool:
    """Whether gradients flow through a value, as what it is made of says."""
    if not isinstance(value, fx.Node):
        return False
    todo = [value]
    while todo:
        node = todo[-1]
        unknown = [] if node in known else [n for n in node.all_input_nodes if n not in known]
        if unknown and not _cuts(node):
            todo += unknown
            continue
        todo.pop()
        if node not in known:
            wants = getattr(node.meta.get("val"), "requires_grad", False) if node.op == "placeholder" else \
                not _cuts(node) and any(known[n] for n in node.all_input_nodes)
            known[node] = bool(wants)
    return known[value]


def _cuts(node: fx.Node) -> bool:
    """Whether no gradient flows through the node: what is detached, integers, and what a no-grad region returns."""
    val = node.meta.get("val")
    if node.target is aten.detach.default or (compat.no_grad_region(node) and not node.args[0]):
        return True
    return isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex())


_WAY_OUT = ("write to a buffer, or to a detached clone; a value that is replaced and keeps its gradient is "
            "h + (new - h).detach()")


def _require_no_hidden_writes(graph: fx.Graph, trained: dict[fx.Node, bool]) -> None:
    """Refuse writes through `detach` into what is read with its gradient, or may be: a backward may keep what was there."""
    for node in graph.nodes:
        base = _written(node) if node.op == "call_function" and compat.mutates(node.target) else None
        detached = False
        while base is not None and base.op == "call_function" and _is_view(base):
            detached |= base.target is aten.detach.default
            base = base.args[0] if isinstance(base.args[0], fx.Node) else None
        of_region = base is not None and base.op == "placeholder" and bool(trained)  # what reads it is not all here
        given = base is not None and base.op == "placeholder" and not trained  # parameters and inputs: refused by name
        if not detached or base is None or given or not _has_gradient(base, trained):
            continue
        same, todo = {base}, [base]
        while todo:
            more = [u for u in todo.pop().users if u not in same and u.op == "call_function" and _is_view(u) and not _cuts(u)]
            same.update(more)
            todo += more
        read = any(u not in same and u.target is not aten.detach.default for n in same for u in n.users)
        if read or of_region:
            raise CaptureError("a write through detach() or .data into a value that has a gradient", user_line(node) or None,
                               _WAY_OUT)


def _written(node: fx.Node) -> fx.Node | None:
    """What an in-place operator writes to."""
    target: Any = node.target
    arguments = target._schema.arguments
    given = {**dict(zip([a.name for a in arguments], node.args, strict=False)), **node.kwargs}
    written = (given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write)
    return next((v for v in written if isinstance(v, fx.Node)), None)


def _detach_writes(graph: fx.Graph, trained: dict[fx.Node, bool]) -> None:
    """Detach what the in-place operators of a no-grad region write from. trained: of the region's placeholders."""
    for node in [n for n in graph.nodes if n.op == "call_function" and compat.mutates(n.target)]:
        names = [a.name for a in node.target._schema.arguments]
        written = {n for n, a in zip(names, node.target._schema.arguments, strict=True) if a.alias_info and a.alias_info.is_write}
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        target = _written(node)
        while isinstance(target, fx.Node) and target.op != "placeholder":  # a view of something, or made in the region
            target = target.args[0] if target.args and isinstance(target.args[0], fx.Node) and _is_view(target) else None
        if target is not None and trained[target]:
            raise CaptureError("a write within torch.no_grad() into a value that has a gradient", user_line(node) or None,
                               _WAY_OUT)
        with graph.inserting_before(node):
            finish = _detach(graph)
            fresh = {n: finish(v) for n, v in given.items() if n not in written and isinstance(v, fx.Node)
                     and not _cuts(v)}
        node.args = tuple(fresh.get(n, v) for n, v in zip(names, node.args, strict=False))
        node.kwargs = {n: fresh.get(n, v) for n, v in node.kwargs.items()}


def _is_view(node: fx.Node) -> bool:
    """Whether the node is a view of its first argument, or that argument itself, written to."""
    first = node.target._schema.arguments[0] if isinstance(node.target, torch._ops.OpOverload) else None
    return first is not None and first.alias_info is not None


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
