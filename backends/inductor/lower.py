"""inductor: AOTAutograd and Inductor on the partitioned program, without a Dynamo trace.

The typed collectives are traced through (forward and backward), so Inductor sees `_c10d_functional` operators in both
graphs and can bucket them and hide them behind compute.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, fx

import fxpar
from fxpar import compat
from fxpar.backends import remat
from fxpar.backends.inductor import (
    buckets,
    direct,
    fp32_products,
    named,
    overlap,
    pieces,
    prefetch,
    products,
    reductions,
    tp_overlap,
    transfers,
)
from fxpar.backends.inductor.few import Generate, MadeFromFew, made_from_few, steps_from_few
from fxpar.backends.inductor.key import key_of, python_functions
from fxpar.backends.inductor.sites import sites_as_inputs
from fxpar.backends.stepped import Stepped, in_steps
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.base import NCCL, Transport
from fxpar.backends.transport.runtime import GroupRuntime, beside_products
from fxpar.garbage import few_collections
from fxpar.ops.exchange import counts_rows
from fxpar.ops.runtime import use_runtime
from fxpar.plan import Plan

SHARES = {"auto": 0.4, "once": 1.0}
"""How much of a graph may be left to compile, for its equal blocks to be compiled once."""
GraphPass = tuple[ModuleType, functools.partial[None]]
"""The module that a pass is in, and the pass with its options: to be called with a graph."""


def graph_passes(plan: Plan, transport: Transport = NCCL, as_on_gpu: bool = False, by_block: bool = False) -> list[GraphPass]:
    """The passes over the forward and over the backward graph, in order.

    transport: by which parameters and gradients go, and where activations go beside products. as_on_gpu: for graphs that are not
    run by Inductor. by_block: buckets end with blocks.
    """
    bind = functools.partial
    more: dict[str, Any] = {"transport": transport} | ({"by_block": True} if by_block else {})
    return [
        (reductions, bind(reductions.drop_kept_dims)),
        (fp32_products, bind(fp32_products.accumulate_in_fp32, as_on_gpu=as_on_gpu)),
        (products, bind(products.join_products, transport=transport)),
        *([(tp_overlap, bind(tp_overlap.overlap_tensor_parallel, transport=transport))] if plan.overlaps_tp else []),
        (overlap, bind(overlap.overlap_communication)),
        *([(prefetch, bind(prefetch.prefetch_parameters, **more))] if plan.overlap_param_gather else []),
        *([(buckets, bind(buckets.bucket_reductions, **more))] if plan.overlap_grad_reduce else []),
        *([(transfers, bind(transfers.transfers_before_products))] if by_block else []),
    ]


def settings(plan: Plan, transport: Transport = NCCL, as_on_gpu: bool = False, passes: int | None = None,
             key: str | None = None, functions: Sequence[str] = (), by_block: bool = False,
             groups: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Inductor's settings for one graph: our order of operators, which its own reordering must not undo.

    transport, as_on_gpu, by_block: see `graph_passes`, of which the first `passes` are applied (None: all). key: under which what
    is compiled is kept on disk, and found by the next start of the same program (None: it is not kept). functions: of
    `python_functions`. groups: see `name_operators`.
    """
    last: list[GraphPass] = [] if groups is None else [(named, functools.partial(named.name_operators, groups=groups))]
    return {
        "joint_custom_pre_pass": _as_one([(remat, functools.partial(remat.choose_recomputation, plan=plan))], key),
        "post_grad_custom_post_pass": _as_one([*graph_passes(plan, transport, as_on_gpu, by_block)[:passes], *last], key),
        "reorder_for_peak_memory": False,
        **compat.cache_settings(key, functions),
    }


def cutting(graph: fx.Graph, blocks: str) -> compat.Cutting | None:
    """What cuts the graphs that are made of this one into pieces, of which equal ones are compiled once; None: nothing is cut.

    blocks: one of `BLOCKS`.
    """
    share = SHARES.get(blocks)
    if share is None or not pieces.repeats(graph, share):
        return None
    return functools.partial(pieces.cut_into_pieces, share=share)


def from_few(plain: fx.GraphModule, given: list[Tensor], config: dict[str, Any], plan: Plan, blocks: str, generate: Generate,
             key: str | None = None) -> MadeFromFew | None:
    """The code of a program of which few of many equal blocks are traced; None: all are to be traced. See `made_from_few`.

    blocks: one of `BLOCKS`. key: of `key_of`.
    """
    if blocks == "flat" or counts_rows(plain.graph):
        return None
    passes = [config[name].uuid() for name in ("joint_custom_pre_pass", "post_grad_custom_post_pass")]
    whole = None if key is None else f"{key} {blocks} {passes}"
    return made_from_few(plain, given, config, plan, generate, whole)


def few_steps(plain: fx.GraphModule, given: list[Tensor], config: dict[str, Any], plan: Plan, blocks: str, cut: compat.Cut,
              making: compat.Making) -> compat.TracedForward | None:
    """The steps of a program of which few of many equal blocks are traced; None: all are to be traced. See `steps_from_few`.

    blocks: one of `BLOCKS`.
    """
    if blocks == "flat" or counts_rows(plain.graph):
        return None
    return steps_from_few(plain, given, config, plan, cut, making)


def _settings(graph: fx.Graph, inputs: Sequence[Tensor], runtime: GroupRuntime, plan: Plan, by_block: bool
              ) -> tuple[dict[str, Any], str | None]:
    """`settings` of a graph that is about to be compiled for inputs like these, and the key under which it is kept."""
    key = key_of(graph, inputs, runtime.facts(), plan)
    functions = python_functions(graph) if key is not None else ()
    groups = {name: "+".join(axes) for _, axes, name in runtime.mesh.group_names()}
    groups |= {runtime.transport.group(name): axes for name, axes in groups.items()}
    groups |= {runtime.transport.part_group(name): axes for name, axes in groups.items()}
    transport = beside_products(runtime, runtime.mesh.mesh, plan, runtime.transport)
    return settings(plan, transport, key=key, functions=functions, by_block=by_block, groups=groups), key


def _as_one(passes: Sequence[GraphPass], key: str | None) -> Any:
    """Passes one after the other, as Inductor takes them. What it compiled is used again with the same key, passes and options,
    as long as no file of fxpar has changed."""

    def apply(graph: fx.Graph) -> None:
        for _, one in passes:
            one(graph)

    applied = [(module.__name__, one.func.__name__, one.keywords) for module, one in passes]
    return compat.graph_pass(apply, key=f"{applied} {_digest(tuple(_sources()))} {key}")


@functools.cache
def _sources() -> list[str]:
    """All of fxpar: the passes, the operators that they and programs use, how those are lowered, and what they are made of."""
    package = str(Path(fxpar.__file__).parent)
    folders = [(folder, names) for folder, _, names in os.walk(package, followlinks=True)]
    return sorted(f"{folder}/{name}" for folder, names in folders for name in names if name.endswith(".py"))


@functools.cache
def _digest(files: tuple[str, ...]) -> str:
    """Of what the files say, which this process goes by from now on: it has imported them."""
    return hashlib.sha256(b"\0".join(Path(file).read_bytes() for file in files)).hexdigest()


def lower(module: fx.GraphModule, example: list[Any], runtime: GroupRuntime, plan: Plan,
          later: Callable[[float], None] | None = None, recorder: compat.CodeRecorder | None = None) -> Callable:
    """Compile for local inputs like `example` (a list, one per placeholder; their ``requires_grad`` matters).

    ``later(seconds)`` is called when the backward was compiled, if that was after this had returned. recorder: is put around
    the code of forward and backward.
    """
    plain, keep = tensor_inputs_only(module, example, fused=True)
    given = [example[i] for i in keep]
    sites = sites_as_inputs(plain, given)
    given += sites
    if recorder is not None:
        recorder.takes(keep, len(sites))
    with use_runtime(runtime), compat.memory_budget(plan.memory_budget), few_collections():
        cut = cutting(plain.graph, runtime.blocks)
        config, key = _settings(plain.graph, given, runtime, plan, cut is not None)
        made = from_few(plain, given, config, plan, runtime.blocks, compat.code_of(cut), key)
        compiled = made.function(recorder) if made is not None else compat.compile_graph(
            plain, given, config, counts=counts_rows(plain.graph), later=later, cutting=cut, recorder=recorder)

    def run(*inputs: Any) -> Any:
        with _running(runtime):
            return compiled(*[inputs[i] for i in keep], *sites)

    return run


def stepped(module: fx.GraphModule, example: list[Any], runtime: GroupRuntime, plan: Plan,
            early: Collection[int] = ()) -> Stepped:
    """As `lower`, in steps: the gradients of the inputs at the positions `early` come first. All is compiled at once."""
    plain, keep = tensor_inputs_only(module, example, fused=True)
    sites = sites_as_inputs(plain, [example[i] for i in keep])

    def trace(plain: fx.GraphModule, given: list[Tensor], cut: compat.Cut) -> compat.TracedForward:
        with use_runtime(runtime), compat.memory_budget(plan.memory_budget), few_collections():
            into = cutting(plain.graph, runtime.blocks)
            config, _ = _settings(plain.graph, given, runtime, plan, into is not None)
            made = few_steps(plain, given, config, plan, runtime.blocks, cut, compat.compiling(into))
            return made or compat.compile_steps(plain, given, config, cut, counts_rows(plain.graph), into)

    return in_steps(plain, example, keep, early, trace, lambda: _running(runtime), plan, sites)


def _running(runtime: GroupRuntime) -> contextlib.AbstractContextManager[None]:
    """The context in which compiled code runs."""
    compat.follow_profiler()
    return use_runtime(runtime)


direct.register()
_digest(tuple(_sources()))
