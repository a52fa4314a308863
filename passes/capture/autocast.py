"""Autocast, written out: the casts that the dispatcher would make become operators of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def write_casts(gm: fx.GraphModule, device: str, dtype: torch.dtype | None) -> None:
    """Insert, in place, the casts of ``torch.autocast(device, dtype)`` before each operator of `gm`.

    Takes: the body of an autocast region, with fake values in ``meta["val"]``.
    Afterwards: run without autocast, it computes what it computed under it. What is cast to what is not a
    table of ours: each operator is run once on fake values under the real autocast, and the casts that
    arrive at the dispatcher below are recorded.
    """
    dtype = dtype or torch.get_autocast_dtype(device)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        casts = _casts(node, device, dtype)
        with gm.graph.inserting_before(node):
            for operand, to in casts.items():
                cast = gm.graph.call_function(aten.to.dtype, (operand, to))
                cast.meta = {**operand.meta, "val": operand.meta["val"].to(to)}
                node.replace_input_with(operand, cast)
    gm.recompile()


def _casts(node: fx.Node, device: str, dtype: torch.dtype) -> dict[fx.Node, torch.dtype]:
    operands = {n: n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    if not any(v.is_floating_point() for v in operands.values()):
        return {}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in operands.values() if hasattr(v, "fake_mode")), None)
    if mode is None:
        return {}
    target: Any = node.target
    with _Recorder(operands) as recorder, torch.autocast(device, dtype, cache_enabled=False), torch.no_grad(), mode:
        target(*args, **kwargs)
    return recorder.casts


class _Recorder(TorchDispatchMode):
    """Notes which operands reach the dispatcher in a `_to_copy`, and the dtype they are cast to."""

    def __init__(self, operands: dict[fx.Node, torch.Tensor]):
        super().__init__()
        self.node_of = {id(v): n for n, v in operands.items()}
        self.casts: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._to_copy.default and id(args[0]) in self.node_of and "dtype" in kwargs:
            self.casts.setdefault(self.node_of[id(args[0])], kwargs["dtype"])
        return func(*args, **kwargs)
