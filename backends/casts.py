"""casts: parameters that are gathered together are cast together, by one kernel."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

CAST = torch.ops.prims.convert_element_type.default
PERMUTE = torch.ops.aten.permute.default


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
