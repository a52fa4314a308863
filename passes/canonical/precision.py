"""precision: parameters kept in one dtype, computed in another, their gradients reduced in a third; inputs cast as they come."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch

from fxpar.errors import CaptureError
from fxpar.program import Program, user_line
from fxpar.sharding.facts import describe_global

aten = torch.ops.aten
PRODUCTS = {aten.linear, aten.mm, aten.bmm, aten.matmul, aten.addmm, aten.baddbmm, aten.convolution, aten.conv1d, aten.conv2d,
            aten.conv3d, aten.lstm_cell, aten.gru_cell}  # fmt: skip


def cast_parameters(program: Program) -> Program:
    """Write the casts from storage to compute dtype into the graph.

    Takes: a program captured in the plan's `param_dtype`. Afterwards: the placeholder of a parameter has the dtype it is
    stored in, that of a floating-point input the one it is given in, and one cast makes what is computed with.
    `GlobalValue.reduce_dtype` of a parameter's cast tells the partitioner in which dtype the gradient is summed over ranks: the
    plan's `reduce_dtype`, else the storage dtype. Raises: `CaptureError` for a product of values in different dtypes, which
    PyTorch has not: the model makes a value of its own in the dtype that parameters are stored in.
    """
    _require_equal_dtypes(program)
    for node, source in program.source_of().items():
        computed: Any = node.meta["val"]
        if source.kind not in ("param", "input") or not isinstance(computed, torch.Tensor) or not computed.is_floating_point():
            continue
        stored = source.storage_dtype or computed.dtype
        reduced = (program.plan.reduce_dtype or stored) if source.kind == "param" else None
        if stored == computed.dtype and reduced in (None, stored):
            continue
        with program.graph.inserting_after(node):
            cast = program.graph.call_function(aten.to.dtype, (node, computed.dtype))
        node.replace_all_uses_with(cast, delete_user_cb=functools.partial(operator.is_not, cast))
        cast.meta["val"] = computed
        if reduced is not None:
            describe_global(cast, reduce_dtype=reduced)
        fake: Any = computed
        with fake.fake_mode:
            node.meta["val"] = torch.empty_strided(
                computed.shape, computed.stride(), dtype=stored, device=computed.device
            )
        source.value = node.meta["val"]
    return program


def _require_equal_dtypes(program: Program) -> None:
    for node in program.graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in PRODUCTS:
            continue
        values = [n.meta.get("val") for n in node.all_input_nodes]
        dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
        if len(dtypes) > 1:
            names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            under = program.plan.param_dtype is not None
            raise CaptureError(f"a product of {names} values ({node.target})" + " under param_dtype" * under,
                               user_line(node) or None,
                               "make values of your own in the dtype of what they meet (torch.zeros(..., dtype=x.dtype), "
                               ".to(x.dtype))" + ", or leave param_dtype out" * under)
