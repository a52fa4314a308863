"""stages: Inductor's graph passes in two parts, so that a graph can be edited between them, and what the partitioner decided."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

from fxpar.compat import graph_pass
from fxpar.compat.steps import after_graph_passes, at_once, output_code, outputs_of

UNBOUNDED = ("pre_grad_custom_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass", "pre_grad_fusion_options",
             "post_grad_fusion_options", "b2b_gemm_pass", "_micro_pipeline_tp", "_fuse_ddp_communication")
"""Settings of Inductor, all off, that turn on passes which may look at all of a graph before "post_grad_custom_post_pass"."""


def passes_are_local() -> bool:
    """Whether what Inductor does to an operator before that pass depends on operators near it alone."""
    from torch._inductor import config as settings

    return not any(getattr(settings, name, None) for name in UNBOUNDED)


@dataclass
class Decision:
    """What AOTAutograd's partitioner has the forward pass keep, and what it decided that by.

    graph: the joint graph. saved: what is kept. forward: what the forward pass computes, and its inputs.
    network: a networkx.DiGraph; of an operator ``x`` the nodes "x_in" and "x_out", the capacity between them is the price of
    keeping it; what hangs at "source" is not made again, what hangs at "sink" is needed in the backward. `saved` is its minimum
    cut, once all that is `banned` hangs at "source"; it shows what is banned for its own sake. Whether the rest is depends on
    chains of operators: a value may follow another in one kernel if both are `fusible`, or it is one of `joins`; no ban concerns
    `exempt`.
    """

    graph: fx.Graph
    network: Any
    saved: set[fx.Node]
    forward: set[fx.Node]
    banned: set[fx.Node]
    fusible: set[fx.Node]
    joins: set[fx.Node]
    exempt: set[fx.Node]


@dataclass
class HandedOver:
    """A graph for which Inductor is about to generate code, as it is before the pass "post_grad_custom_post_pass".

    options: those of `compile_fx_inner`. donated: the positions of inputs that it may overwrite. seeds: of a forward graph, which
    outputs have a gradient; outputs: how many of its first outputs are the program's. inputs: what it takes.
    """

    module: fx.GraphModule
    options: dict[str, Any]
    donated: list[int]
    seeds: list[int]
    outputs: int
    inputs: list[Any]


def graphs_before(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any],
                  decided: Callable[[Decision], None] = lambda decision: None,
                  then: Callable[[list[HandedOver]], None] | None = None, in_steps: bool = False) -> list[fx.GraphModule]:
    """As `lowered_graphs`, but as they are before the pass "post_grad_custom_post_pass" of `config`.

    decided: called with the partitioner's decision, if there is a backward pass; not where a `Decision` does not tell it all
    (of several networks, as for a memory budget; with operators of higher order). then: called with all graphs where Inductor
    would generate code for the last of them, in its context and that of AOTAutograd. in_steps: as they are before all passes of
    Inductor over each of them, and traced as for `compile_steps`.
    Raises: `SharedOutputs`, `NotInSteps`, if `then` is given.
    """
    from torch._functorch import config as aot
    from torch._inductor.compile_fx import compile_fx

    copies: list[fx.GraphModule] = []
    found: list[HandedOver] = []
    updaters: list[Any] = []

    def keep(graph: fx.Graph) -> None:
        for updater in updaters[-1:]:
            updater.incremental_update()  # a pass may have put an operator in the place of one whose result had other strides
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        copies.append(fx.GraphModule(graph.owning_module or torch.nn.Module(), copy))

    def hand_over(module: fx.GraphModule, example: Any, is_inference: bool = False, **options: Any) -> Any:
        metadata: Any = TracingContext.get().fw_metadata
        if in_steps:
            keep(module.graph)
        else:
            after_graph_passes(module, example, is_inference)
        made = HandedOver(copies[-1], {**options, "is_inference": is_inference}, [], [], 0, list(example))
        if options.get("is_backward"):
            made.donated = list(metadata.bw_donated_idxs or [])
        elif then is not None:
            made.seeds, made.outputs = outputs_of(module, len(inputs))
        found.append(made)
        if then is not None and (is_inference or options.get("is_backward")):
            then(found)
        return output_code(lambda given: fx.Interpreter(module).boxed_run(given))

    settings = config if in_steps else {**config, "post_grad_custom_post_pass": graph_pass(keep, __file__)}
    with (_observed(decided), _updating(updaters), at_once() if in_steps else contextlib.nullcontext(),
          aot.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)):
        compile_fx(gm, inputs, inner_compile=hand_over, config_patches=settings)
    return [made.module for made in found]


def _updating(updaters: list[Any]) -> Any:
    """Inside, what Inductor updates values with is put into the list: for the graph that its passes look at, the last one."""
    from torch._inductor.fx_utils import FakeTensorUpdater

    begin = FakeTensorUpdater.__init__

    def begun(updater: Any, *args: Any, **kwargs: Any) -> None:
        begin(updater, *args, **kwargs)
        updaters.append(updater)

    return mock.patch.object(FakeTensorUpdater, "__init__", begun)


def _observed(decided: Callable[[Decision], None]) -> Any:
    """Inside, `decided` hears of every decision of the partitioner."""
    import networkx
    from torch._functorch import partitioners

    solve = partitioners.solve_min_cut

    def observed(graph: fx.Graph, info: Any, options: Any, *rest: Any, **more: Any) -> Any:
        result = solve(graph, info, options, *rest, **more)
        if not rest and not more and not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in graph.nodes):
            alone = dataclasses.replace(options, ban_if_long_fusible_chains=False, ban_if_used_far_apart=False)
            networks: list[Any] = []

            def keep(network: Any, *ends: Any) -> Any:
                networks.append(network)
                return 0, (set(), set())

            with mock.patch.object(networkx, "minimum_cut", keep):
                solve(graph, info, alone)
            kinds, nodes = partitioners.get_default_op_list(), [n for n in graph.nodes if n.op != "output"]
            decided(Decision(graph, networks[0], set(result[0]), set(info.required_fw_nodes), set(result[1]),
                             fusible={n for n in nodes if kinds.is_fusible(n)},
                             joins={n for n in nodes if partitioners.get_aten_target(n) == torch.ops.aten.cat},
                             exempt={n for n in nodes if kinds.is_view(n) or partitioners.must_recompute(n)}))
        return result

    return mock.patch.object(partitioners, "solve_min_cut", observed)


def apply_graph_passes(gm: fx.GraphModule, config: dict[str, Any], is_inference: bool = False) -> fx.GraphModule:
    """A graph of `graphs_before`, in place, as it is after that pass and those of Inductor that follow."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor import config as settings
    from torch._inductor.virtualized import V

    mode = next(n.meta["val"].fake_mode for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
    with settings.patch({**config, "pattern_matcher": False}), V.set_fake_mode(mode), values_stay():
        inductor._recursive_post_grad_passes(gm, is_inference=is_inference)
    return gm


def values_stay() -> Any:
    """Inside, Inductor's passes compute values of nodes that have none, and not again those of nodes whose arguments changed:
    passes replace arguments by equal ones, and recomputing took a third of the time."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import fx_utils
    from torch._inductor.virtualized import V

    def fill(updater: Any) -> None:
        for node in getattr(updater, "gm", updater).graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                _, args, kwargs = fx_utils.get_fake_args_kwargs(node)
                with V.fake_mode, enable_python_dispatcher():
                    node.meta["val"] = node.target(*args, **kwargs)

    return mock.patch.object(fx_utils.FakeTensorUpdater, "incremental_update", fill)


def fake_view(value: FakeTensor, base: torch.Tensor) -> torch.Tensor:
    """A fake tensor as `value`, in the memory of `base`."""
    inner = torch.empty(0, dtype=value.dtype, device="meta")
    inner.set_(base.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    return FakeTensor(value.fake_mode, inner, value.device)
