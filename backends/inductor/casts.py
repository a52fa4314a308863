"""casts: parameters that are gathered together are cast together: by one kernel, or by what copies them.

What copies them can also write those that are only used concatenated one after the other.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.transport.base import Transport

CAST = torch.ops.prims.convert_element_type.default
PERMUTE, CAT = torch.ops.aten.permute.default, torch.ops.aten.cat.default


def _cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    out = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(out, tensors)
    return out


_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("cast_together(Tensor[] tensors, ScalarType dtype) -> Tensor[]")
_library.impl("cast_together", _cast_together, "CompositeExplicitAutograd")
CAST_TOGETHER = torch.ops.fxpar.cast_together.default
"""Every operand in another dtype, each in memory of its own."""


@torch.library.register_fake("fxpar::cast_together", lib=_library)
def _fake(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def _gathered(tensors: list[Tensor], dtype: torch.dtype, size: int, counts: list[int]) -> list[Tensor]:
    groups = iter(tensors)
    heads = [[next(groups) for _ in range(count)] for count in counts]
    return [torch.empty((size * sum(t.shape[0] for t in g), *g[0].shape[1:]), dtype=dtype, device=g[0].device) for g in heads]


def _gather_casts(tensors: list[Tensor], dtype: torch.dtype, size: int, group: str, counts: list[int]) -> list[Tensor]:
    out = _gathered(tensors, dtype, size, counts)
    each = iter(tensors)
    parts: list[Tensor] = []
    for full, count in zip(out, counts, strict=True):
        rows = [size * next(each).shape[0] for _ in range(count)]
        parts += full.split(rows) if count > 1 else [full]
    work = compat.collective_group(group).allgather_into_tensor_coalesced(parts, tensors)
    for full in out:
        compat.register_work(full, work)
    return out


_library.define("gather_casts(Tensor[] tensors, ScalarType dtype, int size, str group, int[] counts) -> Tensor[]")
_library.impl("gather_casts", _gather_casts, "CompositeExplicitAutograd")
GATHER_CASTS = torch.ops.fxpar.gather_casts.default
"""As `all_gather_into_tensor_coalesced`, on a `CopyGroup`, with results in another dtype; `counts` of them, one after the other,
are concatenated."""


@torch.library.register_fake("fxpar::gather_casts", lib=_library)
def _fake_gather(tensors: list[Tensor], dtype: torch.dtype, size: int, group: str, counts: list[int]) -> list[Tensor]:
    return _gathered(tensors, dtype, size, counts)


def gather_casts(graph: fx.Graph, bucket: list[fx.Node], transport: Transport) -> bool:
    """Join, in place, gathers of inputs of the graph that are cast before, if all are: says whether it did.

    Takes: gathers over one group, in the order in which they are waited for, after whose last one nothing that they need
    stands. Nothing is joined of a group for which the transport does not copy.
    Afterwards: one operator, where the last of them stood, gathers and casts; and concatenates those that are only used so.
    """
    args: Any = bucket[0].args
    casts = {n: cast for n in bucket if (cast := _cast_of(n.all_input_nodes[0])) is not None}
    kinds = {(c.all_input_nodes[0].meta["val"].dtype, c.args[1]) for c in casts.values()}
    if not transport.copies(args[-1]) or len(casts) < len(bucket) or len(kinds) > 1:
        return False
    groups = _concatenated(bucket)
    ((_, dtype),) = kinds
    with graph.inserting_after(bucket[-1]):
        shards = [casts[n].args[0] for group, _ in groups for n in group]
        counts = [len(group) for group, _ in groups]
        joined = graph.call_function(GATHER_CASTS, (shards, dtype, args[1], transport.group(args[-1]), counts))
    values = [(cat or group[0]).meta["val"] for group, cat in groups]
    joined.meta = {**bucket[0].meta, "val": values}
    operands, unused, after = [n.all_input_nodes[0] for n in bucket], [], joined
    for i, (group, cat) in enumerate(groups):
        first = min(group, key=bucket.index)
        wait = next(iter(first.users))
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (joined, i))
        after.meta = {**first.meta, "val": values[i]}
        wait.args = (after,)
        if cat is not None:
            wait.meta = {**wait.meta, "val": cat.meta["val"]}
            cat.replace_all_uses_with(wait)
            unused.append(cat)
    erase_unused(graph, [*unused, *bucket, *operands])
    return True


def _concatenated(bucket: list[fx.Node]) -> list[tuple[list[fx.Node], fx.Node | None]]:
    """The gathers of a bucket: those of which nothing is used but their concatenation in the order of that, with it."""
    into = {value: (gather, cat) for gather in bucket for value, cat in [concatenation(gather)] if cat is not None}
    groups: list[tuple[list[fx.Node], fx.Node | None]] = []
    for cat in dict.fromkeys(cat for _, cat in into.values()):
        values: Any = cat.args[0]
        if len(set(values)) == len(values) and all(v in into for v in values):
            groups.append(([into[v][0] for v in values], cat))
    done = {n for group, _ in groups for n in group}
    return [*groups, *(([n], None) for n in bucket if n not in done)]


def concatenation(gather: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What is used of a gather, which is waited for; and the concatenation of rows, if it is used for that alone, as it is."""
    value = next(iter(gather.users))
    while (user := _only_user(value)) is not None and user.target is PERMUTE:
        value = user
    joins = user is not None and user.target is CAT and user.args[1:] in ((), (0,)) and _is_as_gathered(value)
    return value, user if joins else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_as_gathered(value: fx.Node) -> bool:
    """Whether the permutations behind which it stands change nothing together."""
    order = list(range(value.meta["val"].dim()))
    while value.target is PERMUTE:
        dims: Any = value.args[1]
        order, value = [dims[i] for i in order], value.all_input_nodes[0]
    return order == sorted(order)


def erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase what nothing uses, and what was there for that alone."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node.users and node.op == "call_function" and not node._erased:
            stack += node.all_input_nodes
            graph.erase_node(node)


def cast_together(graph: fx.Graph, values: list[fx.Node]) -> None:
    """Join, in place, the casts of the graph's inputs that `values` are, or are views of.

    Takes: nodes of a functional graph. Afterwards: those casts, of one source dtype to one dtype and with no other use, are one
    operator, where the first of them stood. A value that is rearranged in memory after its cast is left alone, because
    its cast is part of the kernel that does that.
    """
    alike: dict[tuple, list[fx.Node]] = {}
    for cast in dict.fromkeys(map(_cast_of, values)):
        if cast is not None:
            alike.setdefault((cast.all_input_nodes[0].meta["val"].dtype, cast.args[1]), []).append(cast)
    for (_, dtype), casts in alike.items():
        if len(casts) > 1:
            _join(graph, sorted(casts), dtype)


def _cast_of(value: fx.Node) -> fx.Node | None:
    value = origin(value)
    return value if value.target is CAST and value.all_input_nodes[0].op == "placeholder" and len(value.users) == 1 else None


def origin(value: fx.Node) -> fx.Node:
    """What a value is, behind permutations that change nothing and whose operand has no other use."""
    args: Any = value.args
    while value.target is PERMUTE and list(args[1]) == sorted(args[1]) and len(args[0].users) == 1:
        value, args = args[0], args[0].args
    return value


def _join(graph: fx.Graph, casts: list[fx.Node], dtype: torch.dtype) -> None:
    with graph.inserting_before(casts[0]):
        joined = graph.call_function(CAST_TOGETHER, ([c.args[0] for c in casts], dtype))
        joined.meta = {**casts[0].meta, "val": [c.meta["val"] for c in casts]}
        for i, cast in enumerate(casts):
            part = graph.call_function(operator.getitem, (joined, i))
            part.meta = dict(cast.meta)
            cast.replace_all_uses_with(part)
    for cast in casts:
        graph.erase_node(cast)
