"""stages: Inductor's graph passes in two parts, so that a graph can be edited between them, and what the partitioner decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from fxpar.compat import graph_pass, lowered_graphs


@dataclass
class Decision:
    """What AOTAutograd's partitioner has the forward pass keep, and the flow network of which that is the minimum cut.

    graph: the joint graph. network: a networkx.DiGraph; of an operator ``x`` the nodes "x_in" and "x_out", the capacity between
    them is the price of keeping it; what hangs at "source" is not made again, what hangs at "sink" is needed in the backward.
    forward: what the forward pass computes, and its inputs. by_chains: whether other values would have been kept without the
    partitioner's limit on chains of operators that are made again.
    """

    graph: fx.Graph
    network: Any
    saved: set[fx.Node]
    forward: set[fx.Node]
    by_chains: bool


def graphs_before(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any],
                  decided: Callable[[Decision], None] = lambda decision: None) -> list[fx.GraphModule]:
    """As `lowered_graphs`, but as they are before the pass "post_grad_custom_post_pass" of `config`.

    decided: called with the partitioner's decision, if there is a backward pass.
    """
    found: list[fx.GraphModule] = []

    def keep(graph: fx.Graph) -> None:
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        found.append(fx.GraphModule(graph.owning_module or torch.nn.Module(), copy))

    with _observed(decided):
        lowered_graphs(gm, inputs, {**config, "post_grad_custom_post_pass": graph_pass(keep, __file__)})
    return found


def _observed(decided: Callable[[Decision], None]) -> Any:
    """Inside, `decided` hears of every decision of the partitioner."""
    import networkx
    from torch._functorch import partitioners

    solve, cut = partitioners.solve_min_cut, networkx.minimum_cut

    def observed(graph: fx.Graph, info: Any, options: Any, *rest: Any) -> Any:
        networks: list[Any] = []

        def keep(network: Any, *ends: Any) -> Any:
            networks.append(network)
            return cut(network, *ends)

        with mock.patch.object(networkx, "minimum_cut", keep):
            result = solve(graph, info, options, *rest)
        free, _ = solve(graph, info, dataclasses.replace(options, ban_if_long_fusible_chains=False), *rest)
        decided(Decision(graph, networks[0], set(result[0]), set(info.required_fw_nodes), set(free) != set(result[0])))
        return result

    return mock.patch.object(partitioners, "solve_min_cut", observed)


def apply_graph_passes(gm: fx.GraphModule, config: dict[str, Any]) -> fx.GraphModule:
    """A graph of `graphs_before`, in place, as it is after that pass and those of Inductor that follow."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor import config as settings
    from torch._inductor.virtualized import V

    mode = next(n.meta["val"].fake_mode for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
    with settings.patch({**config, "pattern_matcher": False}), V.set_fake_mode(mode):
        inductor._recursive_post_grad_passes(gm, is_inference=False)
    return gm
