"""Every private torch API that fxpar touches, in one place, so that a torch release breaks one folder.

Supported: torch 2.11 to 2.15. tests/test_compat*.py have a test per entry.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from fxpar.compat.bundles import bundle_key, keep_bundle, kept_bundle
from fxpar.compat.caches import attention_priority, cache_counts, cache_settings, is_subgraph_call
from fxpar.compat.calls import CALLED, call_by, call_plainly, is_grouped_product, pack_rows
from fxpar.compat.compiling import code_of, compile_graph, partition_eagerly
from fxpar.compat.cudagraphs import (
    CodeRecorder,
    CudaGraphs,
    holders,
    keeps_graph,
    saves_elsewhere,
    storage_at,
    storage_number,
    tensor_in,
    unrecorded,
)
from fxpar.compat.cut import Cutting, GraphPiece, Pieces, interpret_final, interpret_pieces, is_counted
from fxpar.compat.data import assign_data_by, share_memory_by
from fxpar.compat.generators import generators_watched, is_random, mend_states
from fxpar.compat.groups import before_groups_end, default_store, process_groups
from fxpar.compat.handed import interpret_graph, lowered_graphs
from fxpar.compat.lowerings import lower_as_collective, lower_as_concatenation, lower_as_wait
from fxpar.compat.metadata import read_metadata
from fxpar.compat.numbers import (
    before_norms,
    in_full,
    mend_searches_for_nan,
    mend_sums_of_norms,
    mend_writes_to_plain_tensors,
    read_numbers_of,
)
from fxpar.compat.profiles import comments_on_cpus, follow_profiler, name_in_code, profiling, ranged, renamed
from fxpar.compat.quick import below_autograd, call_directly, when_finished
from fxpar.compat.quiet import (
    WRAPPERS,
    code_when_called,
    dispatch_modes,
    forget_fake_results,
    function_modes,
    graph_module,
    has_foreign_modes,
    inside_of_transform,
    lines_looked_up_once,
    modes_at,
    no_modes,
    no_torch_function,
    quiet_traces,
    unchecked_distributions,
    untraced,
)
from fxpar.compat.scaling import after_searches_for_inf
from fxpar.compat.stepping import goes_with, has_parts, local_parts, splits, step_elements_by
from fxpar.compat.steps import (
    Code,
    Cut,
    Make,
    Making,
    NotInSteps,
    SharedOutputs,
    TracedForward,
    as_traced,
    compile_steps,
    compiling,
    faked,
    interpret_steps,
    interpreting,
    sizes_of_values,
    sizes_to_compile,
    steps_of,
    storage_of,
    trace_steps,
)
from fxpar.compat.streams import AtOnce, Move, SideStream, empty_like_code
from fxpar.compat.strided import strided_shard
from fxpar.compat.symmetric import SymmetricSlots
from fxpar.compat.waits import start_compilers, waiting_once
from fxpar.compat.writes import CopiedPart, apply_by, call_on_parts, version, write_whole

__all__ = [
    "CALLED",
    "WRAPPERS",
    "AtOnce",
    "Code",
    "CodeRecorder",
    "CopiedPart",
    "CudaGraphs",
    "Cut",
    "Cutting",
    "FakeTensor",
    "FakeTensorMode",
    "GraphPiece",
    "Make",
    "Making",
    "Move",
    "NotInSteps",
    "Pieces",
    "SharedOutputs",
    "SideStream",
    "SymmetricSlots",
    "TracedForward",
    "after_searches_for_inf",
    "apply_by",
    "as_traced",
    "assign_data_by",
    "attention_priority",
    "autocast_region",
    "before_groups_end",
    "before_norms",
    "below_autograd",
    "bundle_key",
    "cache_counts",
    "cache_settings",
    "call_by",
    "call_directly",
    "call_on_parts",
    "call_plainly",
    "code_of",
    "code_when_called",
    "comments_on_cpus",
    "compile_graph",
    "compile_steps",
    "compiling",
    "default_store",
    "detect_fake_mode",
    "dispatch_modes",
    "empty_like_code",
    "fake_like",
    "faked",
    "follow_profiler",
    "forget_fake_results",
    "function_modes",
    "generators_watched",
    "goes_with",
    "graph_module",
    "has_foreign_modes",
    "has_parts",
    "holders",
    "in_full",
    "inside_of_transform",
    "interpret_final",
    "interpret_graph",
    "interpret_pieces",
    "interpret_steps",
    "interpreting",
    "is_counted",
    "is_grouped_product",
    "is_of_vmap",
    "is_pointwise",
    "is_random",
    "is_subgraph_call",
    "keep_bundle",
    "keeps_graph",
    "kept_bundle",
    "lines_looked_up_once",
    "local_parts",
    "lower_as_collective",
    "lower_as_concatenation",
    "lower_as_wait",
    "lowered_graphs",
    "mend_searches_for_nan",
    "mend_states",
    "mend_sums_of_norms",
    "mend_writes_to_plain_tensors",
    "modes_at",
    "mutates",
    "name_in_code",
    "no_grad_region",
    "no_modes",
    "no_torch_function",
    "pack_rows",
    "partition_eagerly",
    "process_groups",
    "profiling",
    "quiet_traces",
    "ranged",
    "read_metadata",
    "read_numbers_of",
    "renamed",
    "saves_elsewhere",
    "share_memory_by",
    "sizes_of_values",
    "sizes_to_compile",
    "splits",
    "start_compilers",
    "step_elements_by",
    "steps_of",
    "storage_at",
    "storage_number",
    "storage_of",
    "strided_shard",
    "tensor_in",
    "trace_steps",
    "unchecked_distributions",
    "unrecorded",
    "untraced",
    "version",
    "waiting_once",
    "when_finished",
    "write_whole",
]


def fake_like(mode: FakeTensorMode, t: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None,
              shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A fake tensor with `t`'s metadata on `device`, whatever device (meta included) `t` is on."""
    return FakeTensor(mode, _plain_meta(t, dtype, tuple(t.shape) if shape is None else shape), device)


def _plain_meta(t: torch.Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> torch.Tensor:
    if shape == tuple(t.shape):
        return torch.empty_strided(shape, t.stride(), dtype=dtype or t.dtype, device="meta")
    return torch.empty(shape, dtype=dtype or t.dtype, device="meta")


def is_pointwise(target: Any) -> bool:
    """Whether the operator computes each output element from the same input element. PyTorch says so by a tag, which before 2.12
    `leaky_relu` lacks."""
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target is torch.ops.aten.leaky_relu.default)


def is_of_vmap(target: Any) -> bool:
    """Whether a node's target is one of the functions by which an export writes down where `torch.vmap` begins and ends."""
    return getattr(target, "__module__", None) == "torch._functorch.predispatch"


def mutates(target: Any) -> bool:
    """Whether the operator writes to one of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def no_grad_region(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is wrap_with_set_grad_enabled


def autocast_region(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is wrap_with_autocast


@contextlib.contextmanager
def trunc_normal_as(function: Callable) -> Iterator[None]:
    """Inside, ``nn.init.trunc_normal_`` is ``function(original, tensor, ...)``: it reads what it draws, so it cannot be
    traced, and does nothing to a meta tensor."""
    original = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = functools.partial(function, original)
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = original


@contextlib.contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """Inside, a reentrant `torch.utils.checkpoint` is a plain call: its own forward runs without gradients, and a trace of it
    would be a program without a backward."""
    function: Any = torch.utils.checkpoint.CheckpointFunction
    function.apply = staticmethod(lambda run, preserve, *args: run(*args))
    try:
        yield
    finally:
        del function.apply


@contextlib.contextmanager
def functions_applied_by(apply: Callable) -> Iterator[None]:
    """Inside, ``F.apply(...)`` of every custom autograd Function F but PyTorch's own is ``apply(F, ...)``."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = cls.__module__.partition(".")[0] == "torch"
        return (original.__get__(None, cls) if own else functools.partial(apply, cls))(*args, **kwargs)

    function.apply = classmethod(applied)
    try:
        yield
    finally:
        function.apply = original


def has_setup_context(function: Any) -> bool:
    """Whether a custom autograd Function's forward takes no `ctx`."""
    return torch.autograd.function._is_setup_context_defined(function.setup_context)


def trace(function: Callable, inputs: list[torch.Tensor]) -> fx.GraphModule:
    """What a function does with fake tensors, autograd included, as a graph of ATen operators with ``meta["val"]``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with detect_fake_mode(inputs) or contextlib.nullcontext():
        return make_fx(function)(*inputs)


HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
         "_forward_pre_hooks_with_kwargs")
"""Where a module keeps the hooks that run around its forward."""


def has_global_hooks() -> bool:
    """Whether there are hooks that run around every module's forward or backward."""
    return any(getattr(torch.nn.modules.module, f"_global_{kind}_hooks") for kind in
               ("forward", "forward_pre", "backward", "backward_pre"))


@contextlib.contextmanager
def without_forward_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the hooks around this module's own forward do not run."""
    kept = {name: module.__dict__[name] for name in HOOKS}
    module.__dict__.update({name: type(table)() for name, table in kept.items()})
    try:
        yield
    finally:
        module.__dict__.update(kept)


def trace_facts(t: torch.Tensor) -> tuple | None:
    """What a trace may depend on of a fake tensor; None where there is more than can be said here: its shape is a symbol, or the
    trace can read its values, as it can those of other tensors."""
    if not isinstance(t, FakeTensor) or t.constant is not None or not all(type(n) is int for n in (*t.shape, *t.stride())):
        return None
    return type(t), tuple(t.shape), t.stride(), t.dtype, t.device, t.layout, t.requires_grad, t.is_leaf, t.storage_offset()


def trace_modes() -> tuple:
    """PyTorch's settings that a trace may depend on."""
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device(),
            *map(torch.is_autocast_enabled, kinds), *map(torch.get_autocast_dtype, kinds), torch.is_autocast_cache_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.overrides._len_torch_function_stack())


def memory(tensor: Any) -> torch.Tensor:
    """The tensor that a DTensor keeps its rank's part in, itself."""
    return tensor._local_tensor


def gradients(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """``grad`` of each, as `want_gradients`."""
    with torch._C.DisableTorchFunctionSubclass():
        return [t.grad for t in tensors]


def want_gradients(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """``requires_grad`` of each, without what a property of a DTensor costs."""
    with torch._C.DisableTorchFunctionSubclass():
        return [t.requires_grad for t in tensors]


def are_hooked(tensors: Sequence[Any]) -> bool:
    """Whether any of them has a hook on its gradient, or one that runs after it was accumulated."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(t._backward_hooks or t._post_accumulate_grad_hooks for t in tensors)


def move_hooks(old: Any, new: Any, before: Callable, after: Callable) -> None:
    """Have the hooks of `old` run for `new` instead: as ``before(hook)`` those on the gradient, as ``after(hook)`` those that
    run after it was accumulated. The handles that were given for them remove them from it."""
    for name, changed in (("_backward_hooks", before), ("_post_accumulate_grad_hooks", after)):
        hooks = getattr(old, name)
        if hooks is not None:
            hooks.update({key: changed(hook) for key, hook in hooks.items()})
            setattr(old, name, None)
            setattr(new, name, hooks)


def attach_hooks(tensors: Sequence[Any]) -> None:
    """Have the hooks of `tensors` run after ``torch.utils.swap_tensors`` (``module.half()``) gave those other memory: the
    objects keep their hooks, the memory that gradients arrive at has none."""
    with torch._C.DisableTorchFunctionSubclass():
        for t in tensors:
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                if getattr(t, name):
                    setattr(t, name, getattr(t, name))


def dtypes(tensors: Sequence[torch.Tensor]) -> list[torch.dtype]:
    """The dtype of each, as `want_gradients`."""
    with torch._C.DisableTorchFunctionSubclass():
        return [t.dtype for t in tensors]


def hooks(module: torch.nn.Module) -> tuple[dict, ...]:
    """The tables of a module's hooks that run before, in and after a forward or a backward, themselves."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def local_part(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor, detached, without the dispatch that `to_local` costs per parameter."""
    return tensor._local_tensor.detach()


def like_dtensor(local: torch.Tensor, like: Any) -> Any:
    """A local tensor as a DTensor with the mesh, placements, shape and order in memory of another (a contiguous one): fused
    optimizers go through parameter and gradient side by side as they lie there."""
    made: Any = DTensor.__new__(DTensor, local.contiguous(), like._spec, requires_grad=False)
    return made  # without its __init__, which does nothing, and takes longer


def after_backward(function: Callable[[], None]) -> None:
    """Call `function` at the end of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def backward_pass() -> int:
    """The number of the backward pass under way, -1 where there is none."""
    return torch._C._current_graph_task_id()


def fate(node: Any) -> str:
    """What the backward pass under way, from inside of which this is called, does with a node of its graph: "left out", "passed"
    (its gradient is used, or asked for) or, for that of a leaf, "accumulated" (in ``.grad``) or "asked for"."""
    try:
        runs = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for
        return "asked for"
    return ("accumulated" if hasattr(node, "variable") else "passed") if runs else "left out"


def graph_pass(function: Callable[[fx.Graph], None], *files: str, key: str = "") -> Any:
    """An Inductor graph pass whose compiled results may be cached as long as these source files and `key` do not change."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            function(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(files, key)

    return Pass()


def in_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph was traced in its backward pass."""
    return node.meta.get("partitioner_tag") == "is_backward"


@contextlib.contextmanager
def memory_budget(fraction: float | None) -> Iterator[None]:
    """Inside, the partitioner keeps at most about this fraction of what it would keep for the backward pass."""
    from torch._functorch import config
    from torch.utils import flop_counter

    if fraction is None:
        yield
        return
    count = flop_counter.sdpa_flop_count

    def grouped_too(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
        heads = query[1]  # torch < 2.12 refuses fewer heads of keys, which attention repeats
        return count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))

    with config.patch(activation_memory_budget=fraction), mock.patch.object(flop_counter, "sdpa_flop_count", grouped_too):
        yield


def collective_group(name: str) -> Any:
    """The group of which functional collectives know this name."""
    c10d: Any = torch._C._distributed_c10d
    return c10d._resolve_process_group(name)


def register_work(tensor: torch.Tensor, work: Any) -> None:
    """Have `wait_tensor` wait for `work` before `tensor` is used."""
    c10d: Any = torch._C._distributed_c10d
    c10d._register_work(tensor, work)


def register_group(group: Any, name: str) -> None:
    """Functional collectives find `group` by this name."""
    c10d: Any = torch._C._distributed_c10d
    c10d._register_process_group(name, group)


def unregister_group(name: str) -> None:
    """Undo `register_group`."""
    c10d: Any = torch._C._distributed_c10d
    c10d._unregister_process_group(name)
