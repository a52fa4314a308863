"""inductor: AOTAutograd and Inductor on the partitioned program, without a Dynamo trace.

The typed collectives are traced through (forward and backward), so Inductor sees `_c10d_functional` operators in both
graphs and can bucket them and hide them behind compute.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, fx

from fxpar import compat, ops
from fxpar.backends import remat
from fxpar.backends.inductor import buckets, fp32_products, overlap, prefetch, products, reductions
from fxpar.backends.stepped import Stepped, in_steps
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.base import NCCL, Transport
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.exchange import counts_rows
from fxpar.ops.runtime import use_runtime
from fxpar.plan import Plan

GraphPass = tuple[ModuleType, functools.partial[None]]
"""The module that a pass is in, and the pass with its options: to be called with a graph."""


def graph_passes(plan: Plan, transport: Transport = NCCL, as_on_gpu: bool = False) -> list[GraphPass]:
    """The passes over the forward and over the backward graph, in order.

    transport: by which parameters and gradients go. as_on_gpu: for graphs that are not run by Inductor.
    """
    bind = functools.partial
    return [
        (reductions, bind(reductions.drop_kept_dims)),
        (fp32_products, bind(fp32_products.accumulate_in_fp32, as_on_gpu=as_on_gpu)),
        (products, bind(products.join_products, transport=transport)),
        (overlap, bind(overlap.overlap_communication)),
        *([(prefetch, bind(prefetch.prefetch_parameters, transport=transport))] if plan.overlap_param_gather else []),
        *([(buckets, bind(buckets.bucket_reductions, transport=transport))] if plan.overlap_grad_reduce else []),
    ]


def settings(plan: Plan, transport: Transport = NCCL, as_on_gpu: bool = False, passes: int | None = None) -> dict[str, Any]:
    """Inductor's settings for one graph: our order of operators, which its own reordering must not undo.

    transport, as_on_gpu: see `graph_passes`, of which the first `passes` are applied (None: all).
    """
    return {
        "joint_custom_pre_pass": _as_one([(remat, functools.partial(remat.choose_recomputation, plan=plan))]),
        "post_grad_custom_post_pass": _as_one(graph_passes(plan, transport, as_on_gpu)[:passes]),
        "reorder_for_peak_memory": False,
    }


def _as_one(passes: Sequence[GraphPass]) -> Any:
    """Passes one after the other, as Inductor takes them. What it compiled is used again with the same passes and options, as
    long as no file has changed that has a part in what becomes of a graph."""

    def apply(graph: fx.Graph) -> None:
        for _, one in passes:
            one(graph)

    return compat.graph_pass(apply, *_sources(), key=repr([(module.__name__, one.keywords) for module, one in passes]))


@functools.cache
def _sources() -> list[str]:
    """The passes, the operators that they and programs use, and how those are lowered."""
    folders = [Path(__file__).parent.parent, *(Path(str(file)).parent for file in (ops.__file__, compat.__file__))]
    return [str(file) for folder in folders for file in sorted(folder.rglob("*.py"))]


def lower(module: fx.GraphModule, example: list[Any], runtime: GroupRuntime, plan: Plan) -> Callable:
    """Compile for local inputs like `example` (a list, one per placeholder; their ``requires_grad`` matters)."""
    plain, keep = tensor_inputs_only(module, example, fused=True)
    with use_runtime(runtime), compat.memory_budget(plan.memory_budget), _few_collections():
        compiled = compat.compile_graph(plain, [example[i] for i in keep], settings(plan, runtime.transport),
                                        counts=counts_rows(plain.graph))

    def run(*inputs: Any) -> Any:
        with use_runtime(runtime):
            return compiled(*[inputs[i] for i in keep])

    return run


def stepped(module: fx.GraphModule, example: list[Any], runtime: GroupRuntime, plan: Plan,
            early: Collection[int] = ()) -> Stepped:
    """As `lower`, in steps: the gradients of the inputs at the positions `early` come first. All is compiled at once."""
    plain, keep = tensor_inputs_only(module, example, fused=True)

    def trace(plain: fx.GraphModule, given: list[Tensor], cut: compat.Cut) -> compat.TracedForward:
        with use_runtime(runtime), compat.memory_budget(plan.memory_budget), _few_collections():
            return compat.compile_steps(plain, given, settings(plan, runtime.transport), cut, counts_rows(plain.graph))

    return in_steps(plain, example, keep, early, trace, lambda: use_runtime(runtime), plan)


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
