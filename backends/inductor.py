"""inductor: AOTAutograd and Inductor on the partitioned program, without a Dynamo trace.

The typed collectives are traced through (forward and backward), so Inductor sees `_c10d_functional` operators in both
graphs and can bucket them and hide them behind compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxpar import compat
from fxpar.backends import buckets, overlap, prefetch, remat
from fxpar.backends.remat import choose_recomputation
from fxpar.backends.trace import tensor_inputs_only
from fxpar.ops.collectives import Runtime, use_runtime
from fxpar.plan import Plan


def _schedule(graph: fx.Graph, plan: Plan) -> None:
    overlap.overlap_communication(graph)
    if plan.overlap_param_gather:
        prefetch.prefetch_parameters(graph)
    if plan.overlap_grad_reduce:
        buckets.bucket_reductions(graph)


def settings(plan: Plan) -> dict[str, Any]:
    """Inductor's settings for one graph: our order of operators, which its own reordering must not undo."""
    return {
        "joint_custom_pre_pass": compat.graph_pass(
            lambda graph: choose_recomputation(graph, plan), remat.__file__, key=str((plan.zero, plan.recompute))
        ),
        "post_grad_custom_post_pass": compat.graph_pass(
            lambda graph: _schedule(graph, plan), overlap.__file__, prefetch.__file__, buckets.__file__,
            key=str((plan.overlap_param_gather, plan.overlap_grad_reduce)),
        ),
        "reorder_for_peak_memory": False,
    }


def lower(module: fx.GraphModule, example: list[Any], runtime: Runtime, plan: Plan) -> Callable:
    """Compile for local inputs like `example` (a list, one per placeholder; their ``requires_grad`` matters)."""
    plain, keep = tensor_inputs_only(module, example, tables=True)
    with use_runtime(runtime), compat.memory_budget(plan.memory_budget):
        compiled = compat.compile_graph(plain, [example[i] for i in keep], settings(plan))

    def run(*inputs: Any) -> Any:
        with use_runtime(runtime):
            return compiled(*[inputs[i] for i in keep])

    return run
