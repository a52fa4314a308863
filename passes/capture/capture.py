"""capture: the user's model -> a flat, functional ATen graph (`Program`), without running or copying it.

Uses `torch.export` in its training IR, so that `linear`, `scaled_dot_product_attention` and
`cross_entropy_loss` are still one operator each. Parameters are replaced by fake tensors while tracing:
a 70B model on the meta device is captured as readily as a small one on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.model.hugging_face import CACHE, LeftOut, as_trained, say, with_cache_left_out
from fxpar.model.inputs import leaves, require_dense_state
from fxpar.model.reads import Reads, everything, recorded
from fxpar.passes.canonical.dropout import expand_dropout
from fxpar.passes.capture.attributes import Recorded, recorded_attributes
from fxpar.passes.capture.batchnorm import expand_batch_norm
from fxpar.passes.capture.functions import expand_functions, recorded_functions
from fxpar.passes.capture.grouped import Traceable
from fxpar.passes.capture.layers import expand_layers, traced_once
from fxpar.passes.capture.regions import inline_regions
from fxpar.passes.capture.traced import TraceGuard, host_draws, inference_without_gradients, require_no_seeds
from fxpar.passes.rewrite import remove_unread
from fxpar.plan import Plan
from fxpar.program import Program, Sink, Source, is_library_file, user_line
from fxpar.sharding.mesh import Mesh

aten = torch.ops.aten

FAKE_RESULTS = 4096
"""Results of operators on fake tensors that are remembered from one capture to the next, at most: a layer has hundreds."""


def capture(
    model: nn.Module, plan: Plan, mesh: Mesh, args: tuple, kwargs: dict[str, Any], device: torch.device
) -> Program:
    """Trace `model(*args, **kwargs)` on the *global* batch.

    Takes: inputs whose shapes and dtypes are those of one device running everything (real, fake or
    meta; values are never read), and the device the program will run on.
    With the plan's `param_dtype`, floating-point parameters and inputs are traced in it; sources know the dtype that they
    are given in.
    Afterwards: the program has one placeholder per distinct parameter, buffer, constant and input (tied
    parameters share one; inputs that alias each other do not), no in-place operator, no nested graph,
    and ends in a flat tuple: the user's outputs, then the new values of the buffers it updates.
    The model is as it was.
    Raises: `CaptureError` naming the line of the user's model that cannot be traced.
    """
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _fake_input(mode, t, device, plan.param_dtype),
                                                    (args, kwargs))
    with _grouped_experts(model), as_trained(model, fake_kwargs) as (fake_kwargs, notes, cached), _fake_parameters(
            model, mode, device, plan.param_dtype) as originals:
        try:
            with recorded() as reads:
                exported, prefix, record = _export(model, originals, fake_args, fake_kwargs, reads)
        except CaptureError as error:
            if not type(error.__cause__).__module__.startswith("torch._dynamo."):
                raise
            reads = everything(model)  # what is traced by Dynamo (torch.cond) cannot be watched
            exported, prefix, record = _export(model, originals, fake_args, fake_kwargs, None)
        mapped = [n for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes
                  if compat.is_of_vmap(n.target)]
        if mapped and any(isinstance(c, compat.FakeTensor) for c in exported.constants.values()):
            raise CaptureError("torch.vmap with out_dims other than 0", user_line(mapped[-1]) or None,
                               "leave out_dims at 0, and move the dim behind it: torch.vmap(f)(x).movedim(0, dim)")
        if mapped:
            exported = _decomposed(exported)
        inline_regions(exported.graph_module)
        expand_layers(exported)
        expand_batch_norm(exported.graph)
        expand_dropout(exported.graph)
        if any(compat.mutates(n.target) for n in exported.graph.nodes):
            exported = _decomposed(exported)
            inline_regions(exported.graph_module)
        expand_functions(exported.graph_module)
    program = _program(exported, prefix, model, originals, record, plan, mesh)
    reads.of_model(model)
    reads.left_out([(w.holder, w.key) for w in program.writes] + [s.place for s in program.sources if s.place is not None])
    program.reads = reads
    _require_shapes(program.graph)
    _share_lines(program.graph)
    compat.forget_fake_results(FAKE_RESULTS)
    program.notes += notes
    if cached:
        _leave_cache_out(program, model)
    say(notes)
    given = leaves((args, kwargs))
    for source in program.sources:
        if source.kind == "input" and isinstance(source.value, torch.Tensor) and source.value.dtype != given[source.name].dtype:
            source.storage_dtype = given[source.name].dtype
    return program


def _fake_input(mode: compat.FakeTensorMode, t: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """dtype: of those that are computed with; a number that is a tensor, which decides of no other's dtype, keeps its own."""
    cast = dtype if t.is_floating_point() and t.dim() else None
    return compat.fake_like(mode, t, device, cast).requires_grad_(t.requires_grad)


def _decomposed(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without writes to tensors, and with what `torch.vmap` maps over as a dim like any other."""
    try:
        return exported.run_decompositions({aten.copy.default: _copy})
    except Exception as error:
        _require_shapes(exported.graph)
        raise _capture_error(error) from error


def _copy(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`aten.copy` has no derivative; what it means has one."""
    return src.to(dst.dtype).expand(dst.shape).clone()


EXPERTS = "_experts_implementation_internal"
SAME_EXPERTS = ("eager", "batched_mm", "sonicmoe", "deepgemm", None)
"""Hugging Face's implementations of experts that compute from the same weights what "grouped_mm" does."""


@contextlib.contextmanager
def _grouped_experts(model: nn.Module) -> Iterator[None]:
    """Inside, Hugging Face's experts are grouped products, which can be traced and split, whatever the model asks for."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), EXPERTS)}
    before = [(c, getattr(c, EXPERTS)) for c in configs.values()]
    try:
        for config, implementation in before:
            if implementation in SAME_EXPERTS:
                setattr(config, EXPERTS, "grouped_mm")
        yield
    finally:
        for config, implementation in before:
            setattr(config, EXPERTS, implementation)


@contextlib.contextmanager
def _fake_parameters(
    model: nn.Module, mode: compat.FakeTensorMode, device: torch.device, dtype: torch.dtype | None
) -> Iterator[dict[str, nn.Parameter]]:
    """Swap every parameter (and buffers on meta) for a fake one, ties kept; yields name -> the original."""
    originals: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    undo: list[tuple[dict, str, Any]] = []
    made: dict[int, Any] = {}
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, t in table.items():
                    if t is None or (table is module._buffers and not t.is_meta and t.device == device):
                        continue
                    if id(t) not in made:
                        made[id(t)] = _fake_tensor_of(t, mode, device, dtype)
                    undo.append((table, key, t))
                    table[key] = made[id(t)]
        yield originals
    finally:
        for table, key, t in undo:
            table[key] = t


def _fake_tensor_of(
    t: torch.Tensor, mode: compat.FakeTensorMode, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    if not isinstance(t, nn.Parameter):
        return compat.fake_like(mode, t, device) if t.is_meta else t.to(device)
    cast = dtype if dtype is not None and t.is_floating_point() else None
    return nn.Parameter(compat.fake_like(mode, t, device, cast), requires_grad=t.requires_grad)


def _export(model: nn.Module, originals: dict[str, nn.Parameter], args: tuple, kwargs: dict[str, Any],
            reads: Reads | None) -> tuple[torch.export.ExportedProgram, str, Recorded]:
    """The exported program, the prefix its names carry ("model." where autocast had to be moved inside), and what the forward
    left in attributes. reads: where what it looks at is kept; None: that cannot be seen. (Forward hooks of submodules are part
    of it; the model's own run around the program.)"""
    _refuse_hooks(model)
    require_dense_state(model)
    traced = TraceGuard({id(p): _place(model, name) for name, p in originals.items()})
    root, device, prefix = model, next((t.device.type for t in model.parameters()), "cpu"), ""
    if torch.is_autocast_enabled(device):
        model, prefix = _Autocast(model, device, torch.get_autocast_dtype(device)), "model."
    drawn = host_draws()
    try:
        with recorded_attributes(root, traced, reads is not None) as record, traced_once(root, traced, reads, record), \
                torch.autocast(device, enabled=False), torch.enable_grad(), compat.checkpoints_inlined(), \
                compat.unchecked_distributions(), compat.generators_watched(require_no_seeds), recorded_functions(), \
                inference_without_gradients(), compat.code_when_called(), compat.lines_looked_up_once(), compat.quiet_traces(), \
                _seen_by(root, traced, Traceable()):
            exported = torch.export.export(model, args, kwargs, strict=False)
    except CaptureError as error:
        raise CaptureError(error.what, error.where or _user_frame(error), error.way_out) from None
    except Exception as error:
        raise _capture_error(error) from error
    traced.require_nothing_kept()
    if drawn != host_draws():
        raise CaptureError("random numbers of Python's random or numpy in the forward: every step would use the same", None,
                           "make them outside of the model and pass them in, or switch off what draws them (a Hugging Face "
                           "config's mask_time_prob and mask_feature_prob, layerdrop)")
    return exported, prefix, record


@contextlib.contextmanager
def _seen_by(model: nn.Module, *modes: TorchFunctionMode) -> Iterator[None]:
    """Inside, these modes see the functions that the model's forward calls, as if they had been entered here; and not the tens of
    thousands that an export calls before and afterwards."""
    forward, depth = model.__dict__["forward"], compat.function_modes()

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with compat.modes_at(depth, *modes):
            return forward(*args, **kwargs)

    model.__dict__["forward"] = run
    try:
        yield
    finally:
        model.__dict__["forward"] = forward


def _refuse_hooks(model: nn.Module) -> None:
    """Raises: `CaptureError` for hooks of modules that a trace cannot carry."""
    for path, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if hooks:
            raise CaptureError(f"the backward hook {_name(hooks[0])} of {path or 'the model'} ({type(module).__name__})",
                               _line_of(hooks[0]), "remove it; a forward hook that calls register_hook on the output with a "
                               "function that is linear in the gradient is captured, and so is a custom autograd Function")
    if compat.has_global_hooks():
        raise CaptureError("hooks on all modules (torch.nn.modules.module.register_module_...)", None, "register hooks on the "
                           "modules that they are for")


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _line_of(hook: Any) -> str | None:
    code = getattr(hook, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path)._parameters, key


class _Autocast(nn.Module):
    """The model with the autocast that is active around it moved inside, where tracing sees it."""

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype):
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, self.dtype):
            return self.model(*args, **kwargs)


_BRANCH = "make the branch depend on Python values or shapes, use torch.where or torch.cond, or move this part out of the model"
_TYPE = "return tensors, tuples, dicts or dataclasses that torch.export.register_dataclass knows"
_INPUT = "pass tensors, tuples, lists, dicts, dataclasses or UserDicts of them, or teach torch.utils._pytree.register_pytree_node"
_OTHER = "see the chained error: the model, called like this on one device, has to run and be traceable by torch.export"

_CAUSES = {
    "GuardOnDataDependentSymNode": ("control flow that depends on the values of a tensor", _BRANCH),
    "DataDependentOutputException": ("a Python value read out of a tensor (.item(), bool(tensor))", _BRANCH),
    "DynamicOutputShapeException": ("an operator whose output shape depends on values (nonzero, boolean indexing)", _BRANCH),
    "internal functorch error": ("torch.vmap", "write the mapped dimension out, by broadcasting"),
    "Unsupported input type": ("an input of a type that torch.utils._pytree does not know", _INPUT),
    "which is not a known type": ("an output of a type that torch.utils._pytree does not know", _TYPE),
}


def _capture_error(error: Exception) -> CaptureError:
    """What stopped the trace, where in the user's code, and the way out."""
    kind, text = type(error).__name__, str(error)
    other = (f"{kind}: {text.splitlines()[0] if text else ''}", _OTHER)
    what, way_out = next((c for k, c in _CAUSES.items() if k == kind or k in text), other)
    found = re.search(r"(?:Found|Unsupported input type) <class '([^']+)'>", text)
    return CaptureError(f"{what}: {found[1]}" if found else what, where=_user_frame(error), way_out=way_out)


def _require_shapes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
        if any(not isinstance(n, int) for v in values for n in v.shape):
            raise CaptureError("an operator whose output shape depends on values (nonzero, boolean indexing)",
                               user_line(node) or None, "use torch.where, a product with the mask, or topk, whose shapes "
                               "are fixed; and for a loop over experts rows sorted by expert, and "
                               "torch.nn.functional.grouped_mm")


def _share_lines(graph: fx.Graph) -> None:
    """Have operators that come from the same lines hold one text of them, in all programs together."""
    for node in graph.nodes:
        lines = node.meta.get("stack_trace")
        if lines is not None:
            node.meta["stack_trace"] = sys.intern(lines)


def _user_frame(error: BaseException) -> str:
    """The innermost frame of the traceback that lies neither in torch nor in fxpar."""
    where, tb = "", error.__traceback__
    while tb is not None:
        name = tb.tb_frame.f_code.co_filename
        if not is_library_file(name) and not name.startswith(("<string>", "<eval_with_key>")):  # made by torch
            where = f"{name}:{tb.tb_lineno} in {tb.tb_frame.f_code.co_name}"
        tb = tb.tb_next
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(error))
    mine = [f for f in found if not is_library_file(f[0])]
    return f"{mine[-1][0]}:{mine[-1][1]} in {mine[-1][2]}" if mine else where


def _program(
    exported: torch.export.ExportedProgram,
    prefix: str,
    model: nn.Module,
    originals: dict[str, nn.Parameter],
    record: Recorded,
    plan: Plan,
    mesh: Mesh,
) -> Program:
    gm = exported.graph_module
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, p in originals.items():
        if first_name.setdefault(id(p), name) != name:
            tied[name] = first_name[id(p)]
    tied.update(_tied_buffers(model))
    sources = _sources(exported, prefix, originals, tied, record)
    sinks, out_spec = _sinks(exported, prefix, record)
    _flatten_output(gm, [s.kind == "mark" for s in sinks if s.kind != "literal"])
    sinks = [s for s in sinks if s.kind != "mark"]
    program = Program(gm, sources, sinks, out_spec, plan, mesh, model.training, tied=tied, writes=record.writes)
    _merge_tied(program)
    return program


def _tied_buffers(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {n: first[id(b)] for n, b in model.named_buffers(remove_duplicate=False) if first.setdefault(id(b), n) != n}


def _sources(
    exported: torch.export.ExportedProgram, prefix: str, originals: dict[str, nn.Parameter], tied: dict[str, str],
    record: Recorded,
) -> list[Source]:
    out = []
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    state: dict[str, Any] = {**dict(exported.named_buffers()), **exported.constants}
    paths = iter(_input_paths(exported))
    for node, spec in zip(placeholders, specs, strict=True):
        val, name = node.meta["val"], (spec.target or "").removeprefix(prefix)
        if spec.kind is InputKind.PARAMETER:
            p = originals[name]
            out.append(
                Source("param", tied.get(name, name), val, p.requires_grad, p.dtype if p.dtype != val.dtype else None)
            )
        elif spec.kind is InputKind.BUFFER:
            out.append(Source("buffer", tied.get(name, name), state.get(spec.target, val)))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            value = state[spec.target]
            out.append(Source("constant", spec.target, _checked(value, node), place=record.places.get(id(value))))
        elif spec.kind is InputKind.USER_INPUT:
            grad = isinstance(val, torch.Tensor) and val.requires_grad
            out.append(Source("input", next(paths), val, grad))
        else:
            raise CaptureError(
                f"an input of kind {spec.kind.name} ({spec.target})",
                where="",
                way_out="Pass plain tensors and Python values as inputs.",
            )
    return out


def _input_paths(exported: torch.export.ExportedProgram) -> list[str]:
    """A readable name per input leaf: "input_ids", "0", "batch.mask"."""
    spec = exported.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    paths = [p for tree in (args, kwargs) for p, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in p) for p in paths]


def _checked(value: Any, node: fx.Node) -> Any:
    """A constant of the trace, which is no value that every call makes anew."""
    if isinstance(value, torch.Tensor) and (value.requires_grad or isinstance(value, compat.FakeTensor)):
        made = "has no value" if isinstance(value, compat.FakeTensor) else "requires a gradient"
        user = next(iter(node.users), node)
        raise CaptureError(f"a tensor of shape {tuple(value.shape)} from outside of the forward, which {made}",
                           user_line(user) or None, "pass it as an input, register it as a parameter or buffer, or detach it")
    return value


def _sinks(exported: torch.export.ExportedProgram, prefix: str, record: Recorded) -> tuple[list[Sink], pytree.TreeSpec]:
    """What the outputs are, and how those of the model's own are arranged; the rest is what attributes hold, and marks."""
    spec = exported.call_spec.out_spec
    own = pytree.tree_structure(pytree.tree_unflatten(list(range(spec.num_leaves)), spec)[0])
    sinks, position = [], 0
    for out in exported.graph_signature.output_specs:
        if out.kind is OutputKind.BUFFER_MUTATION:
            sinks.append(Sink("buffer", (out.target or "").removeprefix(prefix)))
        elif out.kind is OutputKind.USER_OUTPUT:
            sinks.append(_sink(out.arg, position, position - own.num_leaves, record))
            position += 1
        else:
            made = next((n for n in exported.graph.nodes if n.name == out.arg.name), None)
            kind = "parameter" if out.kind is OutputKind.PARAMETER_MUTATION else "input"
            raise CaptureError(f"a forward that writes to the {kind} {out.target}", user_line(made) if made else None,
                               _RENORMALISE if made and made.target is torch.ops.aten.embedding_renorm.default else
                               "a forward may write to buffers alone: write to a copy, or outside of forward, between steps")
    return sinks, own


def _leave_cache_out(program: Program, model: nn.Module) -> None:
    """Have the outputs say that the cache is not among them."""
    program.out_spec, leaf = with_cache_left_out(model, program.out_spec)
    if leaf is not None:
        own = [i for i, s in enumerate(program.sinks) if s.kind in ("output", "literal")]
        program.sinks.insert(own[leaf] if leaf < len(own) else own[-1] + 1, Sink("literal", CACHE, LeftOut()))


_RENORMALISE = ("an embedding with max_norm=N scales its table's rows where it looks them up: leave max_norm out, and scale them "
                "between steps, `with torch.no_grad(): w.mul_(N / w.norm(dim=1, keepdim=True).clamp(min=N))`")


def _sink(arg: Any, position: int, beside: int, record: Recorded) -> Sink:
    if beside >= 0:
        name = record.names[beside]
        return Sink("mark", "") if name is None else Sink("attribute", name)
    return Sink("output", str(position)) if arg.name else Sink("literal", str(position), getattr(arg, "value", None))


def _flatten_output(gm: fx.GraphModule, drop: list[bool]) -> None:
    node = gm.graph.output_node()
    outs = [a for a in node.args[0] if isinstance(a, fx.Node)]
    node.args = (tuple(a for a, d in zip(outs, drop, strict=True) if not d),)
    remove_unread(gm.graph)


def _merge_tied(program: Program) -> None:
    """One placeholder per parameter: the aliases that export makes are replaced by the first."""
    kept: dict[tuple[str, str], fx.Node] = {}
    sources = []
    for node, source in zip(program.placeholders(), program.sources, strict=True):
        key = (source.kind, source.name)
        if source.kind in ("param", "buffer") and key in kept:
            node.replace_all_uses_with(kept[key])
            program.graph.erase_node(node)
            continue
        kept[key] = node
        sources.append(source)
    program.sources = sources
