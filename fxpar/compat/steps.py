"""steps: the forward and backward graphs that AOTAutograd makes, handed over, without the autograd function around them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxpar.compat.cut import Cutting, interpret_pieces
from fxpar.compat.generators import mend_states
from fxpar.compat.profiles import comments_on_cpus
from fxpar.compat.reductions import mend_reductions

Code = Callable[[list[Any]], Sequence[Any]]
"""A graph made ready to run: takes its inputs as a list, which it empties."""
Make = Callable[[fx.GraphModule, Sequence[Tensor], Sequence[int], int], tuple[Code, list[Tensor]]]
"""``make(graph, inputs, donated, gradients)`` makes a part of a backward ready: a graph over tensors like `inputs`, which may
overwrite those at the positions `donated`, and whose first `gradients` outputs are gradients. Also returns what its outputs are
like."""
Cut = Callable[[fx.GraphModule, list[Tensor], int, list[int], Make], None]
"""``cut(backward, inputs, saved, donated, make)`` is called with the backward graph, and makes its parts ready. inputs: tensors
like those it takes: first what the forward saved, so many of them, then the gradients of outputs. donated: which of those it
may overwrite."""


class SharedOutputs(Exception):
    """Outputs at these positions share memory with inputs or with other outputs, which AOTAutograd leaves to its function."""

    def __init__(self, positions: list[int]):
        super().__init__(positions)
        self.positions = positions


class NotInSteps(Exception):
    """AOTAutograd has more to do for the graph than to run it: it writes to its inputs, or has tensors of its own."""


@dataclass
class TracedForward:
    """A flat graph's forward.

    run: gives the outputs, and behind them what it saves for the backward, so many tensors. seeds: which outputs have a gradient,
    in the order in which the backward takes them.
    """

    run: Code
    seeds: list[int]
    saved: int


@contextlib.contextmanager
def sizes_of_values(inputs: list[Tensor], counts: bool = True) -> Iterator[list[Tensor]]:
    """Inside, a graph may be traced of which some sizes are `counts` of something, known only when it runs; yields fake inputs to
    trace it with, whose own sizes are fixed. Without such sizes, the inputs as they are."""
    if not counts:
        yield inputs
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(x, static_shapes=True) for x in inputs]


@contextlib.contextmanager
def sizes_to_compile(inputs: list[Tensor], counts: bool) -> Iterator[list[Tensor]]:
    """As `sizes_of_values`. Without such sizes all are fixed, in an environment of shapes: caches pass by graphs without one."""
    if counts:
        with sizes_of_values(inputs) as inputs:
            yield inputs
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield inputs


@contextlib.contextmanager
def faked(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, a graph over fixed sizes may be traced, and kept on disk; yields fake inputs like these, each with own memory."""
    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        with mode:
            made = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
                    for x in inputs]
        yield made


@contextlib.contextmanager
def as_traced() -> Iterator[None]:
    """Inside, operators do what graphs of AOTAutograd say: nothing is recorded, and nothing cast by autocast."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def trace_steps(gm: fx.GraphModule, inputs: list[Tensor], joint: Callable[[fx.Graph], None], cut: Cut,
                counts: bool = False) -> TracedForward:
    """As `partition_eagerly`, but the two graphs are handed over.

    ``joint(graph)`` edits the joint graph before the min-cut partitioner splits it. counts: see `sizes_of_values`. Raises:
    `SharedOutputs`, `NotInSteps`.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    mend_states()
    found: list[TracedForward] = []

    def partition(module: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint(module.graph)
        return min_cut_rematerialization_partition(module, joint_inputs, **options)

    def forward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(_traced(gm, len(inputs), _interpreted(gm)))
        return make_boxed_func(gm)

    def backward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        cut(gm, list(example_inputs), found[0].saved, [], lambda part, *_: (_interpreted(part), _values(part)))
        return make_boxed_func(gm)

    with (sizes_of_values(inputs, counts) as inputs,
          tracing(TracingContext(detect_fake_mode(inputs) or FakeTensorMode())), at_once()):
        aot_module_simplified(gm, _leaves(inputs), fw_compiler=forward, bw_compiler=backward, partition_fn=partition)
    return found[0]


@dataclass
class Making:
    """How the graphs of steps are made ready to run.

    forward: ``forward(module, example, options)`` gives code. part: ``part(options, module, example, donated, gradients)`` makes
    a part of a backward ready, see `Make`. options: those that Inductor has for the graph.
    """

    forward: Callable[[fx.GraphModule, Any, dict[str, Any]], Any]
    part: Callable[[dict[str, Any], fx.GraphModule, Sequence[Tensor], Sequence[int], int], tuple[Code, list[Tensor]]]


def compiling(cutting: Cutting | None = None) -> Making:
    """Inductor generates code. cutting: what may cut a graph into pieces, of which equal ones are compiled once."""
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner

    from fxpar.compat import graph_pass
    from fxpar.compat.pieces import compile_cut

    compile_one = compile_fx_inner if cutting is None else functools.partial(compile_cut, cutting)

    def forward(module: fx.GraphModule, example: Any, options: dict[str, Any]) -> Any:
        with comments_on_cpus():
            return compile_one(module, example, **options)

    def part(options: dict[str, Any], module: fx.GraphModule, example: Sequence[Tensor], donated: Sequence[int],
             gradients: int) -> tuple[Code, list[Tensor]]:
        visible = range(gradients if inductor_config.bw_outputs_user_visible else 0)
        module.graph.output_node().meta["user_visible_output_idxs"] = list(visible)
        values, context = _values(module), TracingContext.get()
        # What is overwritten, and seen, is no part of the key by which Inductor finds what it compiled before: a pass is.
        mark = graph_pass(lambda graph: None, key=f"part of a backward, may overwrite {list(donated)}, visible {list(visible)}")
        with (inductor_config.patch(post_grad_custom_pre_pass=mark), comments_on_cpus(),
              mock.patch.object(context.fw_metadata, "bw_donated_idxs", list(donated)),
              TracingContext.report_output_strides() as strides):
            code: Any = compile_one(module, list(example), **options | {"static_input_idxs": ()})
        return code, [x.new_empty_strided(x.shape, stride or x.stride())
                      for x, stride in zip(values, strides or [None] * len(values), strict=True)]

    mend_reductions()
    return Making(forward, part)


def interpreting(interpreter: type[fx.Interpreter], cutting: Cutting | None = None) -> Making:
    """As `compiling`, but `interpreter` runs the graphs for which code would have been generated, after all graph passes."""
    def run(module: fx.GraphModule, donated: Sequence[int] = ()) -> Code:
        pieces = None if cutting is None else cutting(module, (), donated)
        return _interpreted(module, interpreter) if pieces is None else interpret_pieces(pieces, interpreter)

    def forward(module: fx.GraphModule, example: Any, options: dict[str, Any]) -> Any:
        after_graph_passes(module, example, options.get("is_inference", False))
        return output_code(run(module))

    def part(options: dict[str, Any], module: fx.GraphModule, example: Sequence[Tensor], donated: Sequence[int],
             gradients: int) -> tuple[Code, list[Tensor]]:
        after_graph_passes(module, example)
        return run(module, donated), _values(module)

    return Making(forward, part)


def compile_steps(gm: fx.GraphModule, inputs: list[Tensor], config: dict[str, Any], cut: Cut,
                  counts: bool = False, cutting: Cutting | None = None) -> TracedForward:
    """As `compile_graph`, but what was compiled is handed over. Nothing is left to be compiled later.

    Raises: `SharedOutputs`, `NotInSteps`.
    """
    with sizes_to_compile(inputs, counts) as inputs:
        return _through_inductor(gm, inputs, config, cut, compiling(cutting), fixed=not counts)


def interpret_steps(gm: fx.GraphModule, inputs: list[Tensor], config: dict[str, Any], interpreter: type[fx.Interpreter],
                    cut: Cut, counts: bool = False, cutting: Cutting | None = None) -> TracedForward:
    """As `compile_steps`, but by `interpreting`."""
    with sizes_of_values(inputs, counts) as inputs:
        return _through_inductor(gm, inputs, config, cut, interpreting(interpreter, cutting))


def steps_of(forward: fx.GraphModule, backward: fx.GraphModule | None, outputs: int, seeds: list[int], donated: Sequence[int],
             options: Sequence[dict[str, Any]], cut: Cut, making: Making) -> TracedForward:
    """The steps of a forward and a backward graph as AOTAutograd makes them, where it would hand over the last of the two.

    outputs: how many of the forward's are the program's. seeds: see `TracedForward`. donated: positions of what the backward may
    overwrite. options: those that Inductor has for each graph.
    """
    results: Any = forward.graph.output_node().args[0]
    forward.graph.output_node().meta["user_visible_output_idxs"] = list(range(outputs))
    given = [n.meta["val"] for n in forward.graph.find_nodes(op="placeholder")]
    with TracingContext.report_output_strides() as reported:
        code: Any = making.forward(forward, given, {**options[0], "static_input_idxs": ()})
    saved = len(results) - outputs
    if backward is not None:
        values = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
        strides = list(reported or ())[outputs:] or [None] * saved
        like = [x if stride is None or x.stride() == tuple(stride) else x.new_empty_strided(x.shape, tuple(stride))
                for x, stride in zip(values[:saved], strides, strict=True)]
        cut(backward, [*like, *values[saved:]], saved, list(donated), functools.partial(making.part, options[1]))
    return TracedForward(lambda inputs: code(inputs), seeds, saved)


def after_graph_passes(module: fx.GraphModule, example: Sequence[Any], is_inference: bool = False) -> None:
    """Make of a graph, in place, what Inductor would generate code for."""
    from torch._inductor import compile_fx as inductor
    from torch._inductor.virtualized import V

    inductor.view_to_reshape(module)
    with torch.no_grad():
        mode = inductor.fake_tensor_prop(module, example)
    with V.set_fake_mode(mode):
        inductor._recursive_post_grad_passes(module, is_inference=is_inference)


def output_code(run: Callable[[list[Any]], Any]) -> Any:
    """``run(inputs)``, for `compile_fx` to take as generated code."""
    from torch._inductor.output_code import OutputCode

    class Code(OutputCode):
        def __init__(self) -> None:
            self._boxed_call = True

        def __call__(self, inputs: Any) -> Any:
            return run(inputs)

        def post_compile(self, *args: Any, **kwargs: Any) -> None: ...

        def set_triton_bundle(self, *args: Any, **kwargs: Any) -> None: ...

    return Code()


def _through_inductor(gm: fx.GraphModule, inputs: list[Tensor], config: dict[str, Any], cut: Cut, making: Making,
                      fixed: bool = False) -> TracedForward:
    """fixed: no size is a symbol, whatever environment of shapes there is."""
    from torch._inductor.compile_fx import compile_fx

    found: list[TracedForward] = []

    def inner(module: fx.GraphModule, example: Any, **options: Any) -> Any:
        if options.get("is_backward"):
            meta: Any = TracingContext.get().fw_metadata
            cut(module, list(example), found[0].saved, list(meta.bw_donated_idxs or []),
                functools.partial(making.part, options))
            return output_code(_never)
        made = _traced(module, len(inputs), lambda given: code(given))
        code = making.forward(module, example, options)
        found.append(made)
        return code

    with at_once():
        compile_fx(gm, _leaves(inputs), inner, config_patches={"fx_graph_cache": False, **config},
                   ignore_shape_env=fixed)
    return found[0]


def _never(inputs: list[Any]) -> Any:
    raise AssertionError("the parts of a backward run, not the backward")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Both graphs are made now, as the program says and not autocast, and not taken from a cache; random state is kept as a
    tensor."""
    from torch._functorch import config

    options = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True, "graphsafe_rng_functionalization": False}
    with torch.enable_grad(), torch._C._DisableAutocast(), config.patch(options):
        yield


def _leaves(inputs: list[Tensor]) -> list[Tensor]:
    """Each tensor by itself: AOTAutograd gives equal ones one place."""
    return [x.detach().requires_grad_(x.requires_grad) for x in inputs]


def _interpreted(module: fx.GraphModule, interpreter: type[fx.Interpreter] = fx.Interpreter) -> Code:
    return lambda given: interpreter(module).boxed_run(given)


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors that share memory, fake ones too."""
    return tensor.untyped_storage()._cdata


def _values(module: fx.GraphModule) -> list[Tensor]:
    results: Any = module.graph.output_node().args[0]
    return [n.meta["val"] for n in results]


def outputs_of(forward: fx.GraphModule, inputs: int) -> tuple[list[int], int]:
    """Which outputs of a forward graph that AOTAutograd made have a gradient; how many of the first are the program's.

    inputs: how many the program has. Raises: `SharedOutputs`; `NotInSteps` where the graph is not all that AOTAutograd has a
    forward do.
    """
    from torch._functorch._aot_autograd.schemas import OutputType

    meta: Any = TracingContext.get().fw_metadata
    own = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)
    shared = [i for i, info in enumerate(meta.output_info) if info.output_type not in own]
    if shared:
        raise SharedOutputs(shared)
    if meta.num_mutated_inp_runtime_indices or len(forward.graph.find_nodes(op="placeholder")) != inputs:
        raise NotInSteps
    return [i for i, info in enumerate(meta.output_info) if info.requires_grad], len(meta.output_info)


def _traced(forward: fx.GraphModule, inputs: int, run: Code) -> TracedForward:
    """Raises: as `outputs_of`."""
    (seeds, outputs), values = outputs_of(forward, inputs), _values(forward)
    sizes = sum(not isinstance(v, Tensor) for v in values[outputs:])
    return TracedForward(_sizes_first(run, outputs, sizes) if sizes else run, seeds, len(values) - outputs)


def _sizes_first(run: Code, outputs: int, sizes: int) -> Code:
    """The forward saves sizes behind tensors, the backward takes them before these."""
    def reordered(given: list[Any]) -> Sequence[Any]:
        made = list(run(given))
        return [*made[:outputs], *made[len(made) - sizes :], *made[outputs : len(made) - sizes]]

    return reordered
