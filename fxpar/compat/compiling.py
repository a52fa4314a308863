"""compiling: what AOTAutograd and Inductor make of one graph."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar.compat.caches import cache_settings
from fxpar.compat.cudagraphs import CodeRecorder, alone, boxed, recorded_by, recorded_output
from fxpar.compat.cut import Cutting
from fxpar.compat.generators import mend_states
from fxpar.compat.profiles import comments_on_cpus
from fxpar.compat.reductions import mend_reductions
from fxpar.compat.steps import Code, sizes_of_values, sizes_to_compile
from fxpar.progress import stage


def compile_graph(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any] | None = None,
                  backward_at_once: bool = False, counts: bool = False, later: Callable[[float], None] | None = None,
                  cutting: Cutting | None = None, recorder: CodeRecorder | None = None) -> Callable:
    """AOTAutograd and Inductor on a flat graph: a callable over the same flat inputs, with autograd.

    No Dynamo trace is made. `config` are Inductor settings for the forward and the backward of this graph alone; without those of
    `cache_settings` nothing is kept on disk. backward_at_once: the backward is compiled now, and not when it first runs.
    counts: see `sizes_of_values`. later: told the seconds of what is compiled after this has returned. cutting: what may cut a
    graph into pieces, of which equal ones are compiled once; the backward is compiled now, too. recorder: is put around what was
    compiled.
    """
    from torch._functorch import config as aot
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from fxpar.compat.pieces import compile_cut

    mend_reductions()
    mend_states()
    graphs = 2 if torch.is_grad_enabled() and any(x.requires_grad for x in inputs) else 1
    returned = False

    @functools.wraps(compile_fx_inner)
    def compile_one(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        which = "compiling the backward, 2 of 2" if options.get("is_backward") else f"compiling the forward, 1 of {graphs}"
        with stage(which), comments_on_cpus():
            made = compile_fx_inner(*args, **options) if cutting is None else compile_cut(cutting, *args, **options)
        if later is not None and returned:
            later(time.perf_counter() - begin)
        return recorded_output(made, recorder) if recorder is not None and returned else made

    at_once = backward_at_once or cutting is not None
    # Code of pieces is kept as a part of what AOTAutograd keeps: Inductor's own cache knows that of single graphs.
    options = {"bundled_autograd_cache": cutting is not None, "force_non_lazy_backward_lowering": at_once}
    with aot.patch(options), recorded_by(recorder), sizes_to_compile(inputs, counts) as inputs:
        compiled: Any = compile_fx(gm, inputs, compile_one, config_patches=cache_settings(None, ()) | (config or {}),
                                   ignore_shape_env=not counts)
    returned = True
    return compiled if recorder is None or graphs == 2 else alone(compiled, recorder)


def code_of(cutting: Cutting | None) -> Callable[..., tuple[Code, list[Any]]]:
    """What generates code for a graph that has been through all passes: see `compile_final`."""
    from fxpar.compat.pieces import compile_final

    mend_reductions()
    return functools.partial(compile_final, cutting)


def partition_eagerly(gm: fx.GraphModule, inputs: list[torch.Tensor], joint: Callable[[fx.Graph], None],
                      counts: bool = False, around: contextlib.AbstractContextManager[None] | None = None,
                      recorder: CodeRecorder | None = None) -> Callable:
    """AOTAutograd on a flat graph, without a compiler: a callable over the same flat inputs, with autograd.

    ``joint(graph)`` edits the joint graph before the min-cut partitioner splits it. counts: see `sizes_of_values`. around: the
    context of every forward and backward. recorder: is put around them.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(module: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint(module.graph)
        return min_cut_rematerialization_partition(module, joint_inputs, **options)

    def as_it_is(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            with around or contextlib.nullcontext():
                return gm(*args)

        return make_boxed_func(run)

    def backward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        made = as_it_is(gm, example_inputs)
        return made if recorder is None else boxed(recorder.backward(made))

    mend_states()
    with sizes_of_values(inputs, counts) as inputs, recorded_by(recorder):
        return aot_module_simplified(gm, inputs, fw_compiler=as_it_is, bw_compiler=backward, partition_fn=partition)
