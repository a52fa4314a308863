"""inductor: AOTAutograd and Inductor on the partitioned program, without a Dynamo trace.

The typed collectives are traced through (forward and backward), so Inductor sees `_c10d_functional` operators in both
graphs and can bucket them and hide them behind compute.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import fx

from fxpar import compat
from fxpar.backends import buckets, casts, overlap, prefetch, products, remat, widen
from fxpar.backends.buckets import NOTHING
from fxpar.backends.remat import choose_recomputation
from fxpar.backends.runtime import GroupRuntime
from fxpar.backends.trace import tensor_inputs_only
from fxpar.ops.collectives import use_runtime
from fxpar.plan import Plan

GraphPass = Callable[[fx.Graph], None]


def graph_passes(plan: Plan, bulk: Mapping[str, str] = NOTHING, as_on_gpu: bool = False) -> list[tuple[ModuleType, GraphPass]]:
    """The passes over the forward and over the backward graph, in order, each with the module that it is in.

    bulk: name of a group -> that which gathers parameters and scatters gradients over it instead. as_on_gpu: for graphs that
    are not run by Inductor.
    """
    return [
        (widen, lambda graph: widen.widen_products(graph, as_on_gpu)),
        (products, lambda graph: products.join_products(graph, bulk)),
        (overlap, overlap.overlap_communication),
        *([(prefetch, lambda graph: prefetch.prefetch_parameters(graph, bulk=bulk))] if plan.overlap_param_gather else []),
        *([(buckets, lambda graph: buckets.bucket_reductions(graph, bulk=bulk))] if plan.overlap_grad_reduce else []),
    ]


def settings(plan: Plan, bulk: Mapping[str, str] = NOTHING, as_on_gpu: bool = False,
             passes: int | None = None) -> dict[str, Any]:
    """Inductor's settings for one graph: our order of operators, which its own reordering must not undo.

    bulk, as_on_gpu: see `graph_passes`, of which the first `passes` are applied (None: all).
    """
    chosen = graph_passes(plan, bulk, as_on_gpu)[:passes]

    def schedule(graph: fx.Graph) -> None:
        for _, apply in chosen:
            apply(graph)

    files = [str(module.__file__) for module in (*(m for m, _ in chosen), casts)]
    return {
        "joint_custom_pre_pass": compat.graph_pass(
            lambda graph: choose_recomputation(graph, plan), remat.__file__, key=str((plan.zero, plan.recompute))
        ),
        "post_grad_custom_post_pass": compat.graph_pass(schedule, *files, key=str((dict(bulk), as_on_gpu))),
        "reorder_for_peak_memory": False,
    }


def lower(module: fx.GraphModule, example: list[Any], runtime: GroupRuntime, plan: Plan) -> Callable:
    """Compile for local inputs like `example` (a list, one per placeholder; their ``requires_grad`` matters)."""
    plain, keep = tensor_inputs_only(module, example, fused=True)
    with use_runtime(runtime), compat.memory_budget(plan.memory_budget), _few_collections():
        compiled = compat.compile_graph(plain, [example[i] for i in keep], settings(plan, runtime.bulk))

    def run(*inputs: Any) -> Any:
        with use_runtime(runtime):
            return compiled(*[inputs[i] for i in keep])

    return run


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Inside, Python looks for garbage less often: a compiler makes many objects, few of them garbage, and a tenth of its time
    went to that."""
    often = gc.get_threshold()
    if often[0]:
        gc.set_threshold(max(often[0], 10_000), often[1], max(often[2], 100))
    try:
        yield
    finally:
        gc.set_threshold(*often)
