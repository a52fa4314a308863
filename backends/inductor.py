"""inductor: AOTAutograd and Inductor on the partitioned program, without a Dynamo trace.

The typed collectives are traced through (forward and backward), so Inductor sees `_c10d_functional` operators in both
graphs and can bucket them and hide them behind compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.backends import buckets, overlap
from fxpar.ops.collectives import Runtime, use_runtime


def _schedule(graph: fx.Graph) -> None:
    overlap.overlap_communication(graph)
    buckets.bucket_reductions(graph)


def settings() -> dict[str, Any]:
    """Inductor's settings for one graph: our order of operators, which its own reordering must not undo."""
    return {
        "post_grad_custom_post_pass": compat.graph_pass(_schedule, overlap.__file__, buckets.__file__),
        "reorder_for_peak_memory": False,
    }


def lower(module: fx.GraphModule, example: list[Any], runtime: Runtime) -> Callable:
    """Compile for local inputs like `example` (a list, one per placeholder; their ``requires_grad`` matters)."""
    tensors = [i for i, x in enumerate(example) if isinstance(x, torch.Tensor)]
    plain = _tensor_inputs_only(module, example)
    with use_runtime(runtime):
        compiled = compat.compile_graph(plain, [example[i] for i in tensors], settings())

    def run(*inputs: Any) -> Any:
        with use_runtime(runtime):
            return compiled(*[inputs[i] for i in tensors])

    return run


def _tensor_inputs_only(module: fx.GraphModule, example: list[Any]) -> fx.GraphModule:
    """A copy of the graph without the placeholders that carry no tensor (captured as constants, and unused)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    feed = iter(example)
    for node in module.graph.nodes:
        if node.op == "placeholder" and not isinstance(next(feed), torch.Tensor):
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
    return fx.GraphModule(module, graph)
