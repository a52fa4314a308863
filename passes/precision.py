"""precision: parameters kept in one dtype, computed in another, their gradients reduced in a third."""

from __future__ import annotations

import functools
import operator

import torch

from fxpar.program import Program

aten = torch.ops.aten


def cast_parameters(program: Program) -> Program:
    """Write the casts from storage to compute dtype into the graph.

    Takes: a program captured in the plan's `param_dtype`. Afterwards: a parameter's placeholder has the dtype it is
    stored in, and one cast makes what is computed with. ``meta["reduce_dtype"]`` on that cast tells the partitioner in
    which dtype the gradient is summed over ranks: the plan's `reduce_dtype`, else the storage dtype.
    """
    for node, source in program.source_of().items():
        if source.kind != "param" or not node.meta["val"].is_floating_point():
            continue
        computed = node.meta["val"]
        stored = source.storage_dtype or computed.dtype
        reduced = program.plan.reduce_dtype or stored
        if stored == computed.dtype == reduced:
            continue
        with program.graph.inserting_after(node):
            cast = program.graph.call_function(aten.to.dtype, (node, computed.dtype))
        node.replace_all_uses_with(cast, delete_user_cb=functools.partial(operator.is_not, cast))
        cast.meta.update(val=computed, reduce_dtype=reduced)
        with computed.fake_mode:
            node.meta["val"] = torch.empty_strided(
                computed.shape, computed.stride(), dtype=stored, device=computed.device
            )
        source.value = node.meta["val"]
    return program
