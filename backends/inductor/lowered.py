"""lowered: every rank runs the forward and backward graphs that the inductor backend hands over, in threads of one process.

`backends.simulate` proves the partitioned program. What runs on a cluster is more: AOTAutograd's joint graph, what is made
again in the backward and the partitioner's cut, and the passes over both halves (`backends.inductor.graph_passes`), each of
which can go wrong. Here these graphs are run, operator by operator, or compiled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor.sites import sites_as_inputs
from fxpar.backends.stepped import Stepped, in_steps
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.base import BLOCKS, copied_axes
from fxpar.backends.transport.runtime import beside_products
from fxpar.backends.transport.threads import Threads
from fxpar.ops.collectives import differs_along
from fxpar.ops.exchange import counts_rows
from fxpar.ops.runtime import use_runtime
from fxpar.plan import Plan
from fxpar.sharding.mesh import Mesh

T = TypeVar("T")


class Lowered:
    """All ranks of one mesh under a plan.

    compiled: Inductor compiles the graphs; otherwise their operators are run one after the other. transport: as on a host whose
    GPUs see each other's memory (see `fxpar.backends.transport`). passes: how many of the inductor backend's graph passes are
    applied (None: all). blocks: how equal blocks are compiled, one of `BLOCKS`.
    """

    def __init__(self, mesh: Mesh, plan: Plan, compiled: bool = False, transport: str = "auto", passes: int | None = None,
                 blocks: str = BLOCKS[0]):
        self.plan, self.compiled, self.passes, self.blocks = plan, compiled, passes, blocks
        self.threads = Threads(mesh)
        self._transport = self.threads.transport(copied_axes(transport, plan, mesh))
        self._made: dict[int, tuple[fx.GraphModule, list[Callable[..., Any]]]] = {}

    def forward(self, module: fx.GraphModule, feeds: list[list[Any]]) -> list[list[Any]]:
        """feeds[r]: rank r's local inputs, one per placeholder. Returns rank r's flat outputs at [r]."""
        if id(module) not in self._made:
            self._made[id(module)] = module, self._of_each_rank(module, lambda rank: self._lower(module, feeds[rank], rank))
        _, made = self._made[id(module)]
        return self.threads.run(lambda rank: list(made[rank](*feeds[rank])))

    def backward(self, roots: list[list[Tensor]], seeds: list[list[Tensor]],
                 inputs: list[list[Tensor]]) -> list[list[Tensor | None]]:
        """The gradients of rank r's `inputs` from its outputs `roots` and their cotangents `seeds`."""
        return self.threads.run(lambda rank: list(torch.autograd.grad(
            roots[rank], inputs[rank], seeds[rank], allow_unused=True)) if roots[rank] else [None] * len(inputs[rank]))

    def stepped(self, module: fx.GraphModule, feeds: list[list[Any]], early: Collection[int] = ()) -> list[Stepped]:
        """At [r]: rank r's program in steps, to be called in its thread (``threads.run``)."""
        return self._of_each_rank(module, lambda rank: self._in_steps(module, feeds[rank], rank, early))

    def _of_each_rank(self, module: fx.GraphModule, make: Callable[[int], T]) -> list[T]:
        """What ``make(rank)`` makes, once for ranks whose graphs are the same."""
        alike: dict[tuple[int, ...], T] = {}
        kinds = self._kinds(module)
        for rank, kind in enumerate(kinds):
            if kind not in alike:
                alike[kind] = make(rank)
        return [alike[kind] for kind in kinds]

    def _kinds(self, module: fx.GraphModule) -> list[tuple[int, ...]]:
        """Equal for ranks whose graphs are the same: for all along whose axes nothing in the program differs, nor the order in
        which parts are computed."""
        axes = {a: None for n in module.graph.nodes if (a := differs_along(n)) is not None}
        mesh = self.threads.mesh
        if self.plan.overlaps_tp:
            axes[mesh.axes("tp")] = None
        return [tuple(mesh.index(rank, a) for a in axes) for rank in range(mesh.world_size)]

    def _settings(self, rank: int, by_block: bool) -> dict[str, Any]:
        transport = beside_products(self.threads.runtime(rank), self.threads.mesh, self.plan, self._transport)
        return inductor.settings(self.plan, transport, as_on_gpu=not self.compiled, passes=self.passes, by_block=by_block)

    def _lower(self, module: fx.GraphModule, example: list[Any], rank: int) -> Callable[..., Any]:
        plain, keep = tensor_inputs_only(module, example, fused=True)
        given, counts = [example[i] for i in keep], counts_rows(plain.graph)
        sites = sites_as_inputs(plain, given)
        given += sites
        with use_runtime(self.threads.runtime(rank)), compat.memory_budget(self.plan.memory_budget):
            cut = inductor.cutting(plain.graph, self.blocks)
            config = self._settings(rank, cut is not None)
            generate = compat.code_of(cut) if self.compiled else functools.partial(compat.interpret_final, _OnCPU, cut)
            made = inductor.from_few(plain, given, config, self.plan, self.blocks, generate)
            if made is not None:
                run = made.function(None)
            elif self.compiled:
                run = compat.compile_graph(plain, given, config, backward_at_once=True, counts=counts, cutting=cut)
            else:
                run = compat.interpret_graph(plain, given, config, _OnCPU, counts, cut)
        return lambda *inputs: run(*[inputs[i] for i in keep], *sites)

    def _in_steps(self, module: fx.GraphModule, example: list[Any], rank: int, early: Collection[int]) -> Stepped:
        plain, keep = tensor_inputs_only(module, example, fused=True)
        sites = sites_as_inputs(plain, [example[i] for i in keep])

        def trace(plain: fx.GraphModule, given: list[Tensor], cut: compat.Cut) -> compat.TracedForward:
            with use_runtime(self.threads.runtime(rank)), compat.memory_budget(self.plan.memory_budget):
                into = inductor.cutting(plain.graph, self.blocks)
                config, counts = self._settings(rank, into is not None), counts_rows(plain.graph)
                making = compat.compiling(into) if self.compiled else compat.interpreting(_OnCPU, into)
                made = inductor.few_steps(plain, given, config, self.plan, self.blocks, cut, making)
                if made is not None:
                    return made
                if self.compiled:
                    return compat.compile_steps(plain, given, config, cut, counts, into)
                return compat.interpret_steps(plain, given, config, _OnCPU, cut, counts, into)

        return in_steps(plain, example, keep, early, trace, contextlib.nullcontext, self.plan, sites)


class _OnCPU(fx.Interpreter):
    """Runs graphs as they are on a GPU, where the CPU lacks an operator."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.mm.dtype and args[0].device.type == "cpu":
            return args[0].to(args[2]) @ args[1].to(args[2])
        return super().call_function(target, args, kwargs)
