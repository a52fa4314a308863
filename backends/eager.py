"""eager: runs a program's graph as it stands; the reference for the inductor backend, and for debugging."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.backends.remat import choose_recomputation
from fxpar.backends.stepped import Stepped, in_steps
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.control import told
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import counts_rows
from fxpar.ops.runtime import Runtime, use_runtime
from fxpar.plan import Plan
from fxpar.program import module_path


def run_flat(module: fx.GraphModule, inputs: list[Any], record: dict[str, Any] | None = None) -> list[Any]:
    """Run a flat graph node by node, freeing values after their last use. record: filled with node name -> value."""
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    last: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    ranges = compat.profiling()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            env[node] = getattr(module, node.target)
        elif node.op == "output":
            return [env[n] for n in node.args[0]]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            with torch.profiler.record_function(_told(node)) if ranges else contextlib.nullcontext():
                env[node] = node.target(*args, **kwargs)
        if record is not None and isinstance(env[node], torch.Tensor):
            record[node.name] = env[node].detach()
        for used in node.all_input_nodes:
            if last[used] is node:
                del env[used]
    raise AssertionError("a program without an output")


def _told(node: fx.Node) -> str:
    """What profilers call an operator: "model.layers.0.mlp.up_proj: linear", or "all_gather over tp for model.norm"."""
    made, where = typed(node), module_path(node) or "the model"
    if made is not None:
        return f"{made.label} over {'+'.join(made.axes)} for {where}"
    return f"{where}: {getattr(node.target, '_opname', None) or getattr(node.target, '__name__', node.target)}"


def lower(module: fx.GraphModule, example: list[Any], runtime: Runtime, plan: Plan,
          later: Callable[[float], None] | None = None, recorder: compat.CodeRecorder | None = None) -> Callable[..., Any]:
    """A callable over the program's flat local inputs. Collectives speak to `runtime`. later: of a backend that compiles, see
    `fxpar.backends.inductor.lower`; here nothing is. recorder: is put around a forward and a backward that were traced.

    Where the plan has the backward pass make values again, forward and backward are traced once, split, and run as they
    stand; `example` has local inputs, one per placeholder, whose ``requires_grad`` matters.
    """
    if torch.is_grad_enabled() and (plan.recompute != "none" or plan.gathers_each_use):
        graph, keep = tensor_inputs_only(module, example)
        if recorder is not None:
            recorder.takes(keep)
        with use_runtime(runtime), compat.memory_budget(plan.memory_budget):
            split = compat.partition_eagerly(graph, [example[i] for i in keep], lambda g: choose_recomputation(g, plan),
                                             counts_rows(graph.graph), told, recorder)

        def run_split(*inputs: Any) -> Any:
            with use_runtime(runtime):
                return split(*[inputs[i] for i in keep])

        return run_split

    def run(*inputs: Any) -> Any:
        with use_runtime(runtime):
            return run_flat(module, list(inputs))

    return run


def stepped(module: fx.GraphModule, example: list[Any], runtime: Runtime, plan: Plan, early: Collection[int] = ()) -> Stepped:
    """As `lower`, in steps: the gradients of the inputs at the positions `early` come first."""
    graph, keep = tensor_inputs_only(module, example)

    def trace(plain: fx.GraphModule, given: list[torch.Tensor], cut: compat.Cut) -> compat.TracedForward:
        with use_runtime(runtime), compat.memory_budget(plan.memory_budget):
            return compat.trace_steps(plain, given, lambda g: choose_recomputation(g, plan), cut, counts_rows(plain.graph))

    return in_steps(graph, example, keep, early, trace, lambda: use_runtime(runtime), plan)
