"""`ParallelModule`: what `parallelize` returns, and what a training loop holds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fxpar import compat, storage
from fxpar import inputs as calls
from fxpar.accumulation import Accumulator
from fxpar.agreement import agree_on_call, agree_on_program
from fxpar.backends import copies
from fxpar.backends.runtime import Control, GroupRuntime
from fxpar.clip import clip_grad_norm
from fxpar.dump import readable
from fxpar.errors import InputError
from fxpar.feed import Feed, Place
from fxpar.initialize import init_weights
from fxpar.inspection import Report, report_of
from fxpar.mesh import BoundMesh
from fxpar.passes.attributes import Left, put_back
from fxpar.passes.layout import Tiling
from fxpar.plan import Plan
from fxpar.program import Program


@dataclass
class Compiled:
    """One captured call signature: its program, what it is given and what runs it."""

    program: Program
    feed: Feed
    run: Callable[..., Any]


class _Average(torch.autograd.Function):
    """A replica's part of an output: a loss computed from it outside the model counts for 1/dp of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, replicas: int) -> Tensor:
        ctx.replicas = replicas
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.replicas, None


class ParallelModule(nn.Module):
    """The user's model, running on every rank of the mesh. Made by `fxpar.parallelize`.

    `forward` takes what the model's takes, with the batch of this rank's data-parallel replica, and returns the model's
    own output type. A loss is that of the global batch, the same on every rank, and ``.grad`` is its gradient. Other
    outputs are this replica's part (a DTensor where tp shards it); a loss that you compute from them yourself is
    averaged over the replicas, as in DDP.

    Parameters are DTensors on `mesh`, under the original names. `plan` and `mesh` (a `DeviceMesh`) are attributes.
    """

    def __init__(self, model: nn.Module, plan: Plan, bound: BoundMesh, control: Control, device: torch.device,
                 compile_call: Callable[..., Program], lower: Callable[..., Callable]):
        super().__init__()
        self.__dict__.update(_model=model, _modules=model._modules, _parameters=model._parameters,
                             _buffers=model._buffers, _non_persistent_buffers_set=model._non_persistent_buffers_set,
                             **{name: getattr(model, name) for name in compat.HOOKS})
        self.training = model.training
        self.plan, self.device = plan, device
        self._bound, self._control = bound, control
        self._compile_call, self._lower = compile_call, lower
        self._runtime = GroupRuntime(bound)
        self._programs: dict[tuple, Program] = {}
        self._compiled: dict[tuple, Compiled] = {}
        self._tilings: dict[str, Tiling] = {}
        self._slots: dict[str, Place] = {}
        self._accumulator = Accumulator(plan, bound.mesh, self._lower_graph, self._state)
        self._left = Left()
        self._sync = True
        self._steps = 0
        self.seed = 0

    @property
    def mesh(self) -> DeviceMesh:
        return self._bound.device_mesh

    @property
    def replica(self) -> int:
        """Which data-parallel replica this rank belongs to, from 0: the part of the global batch that it is to pass in."""
        return self._bound.index(self._bound.mesh.strategies.get("dp", ()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def train(self, mode: bool = True) -> ParallelModule:
        self._model.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on this replica's batch. A new signature (shapes, dtypes, the mode of any submodule, which
        parameters are trained) is captured once.

        Raises: `InputError` for arguments that do not fit; `MismatchError` on every rank if ranks were given
        different shapes; `CaptureError`, `UnsupportedOperator`, `PlanError` where the model or plan cannot be compiled.
        """
        call = calls.canonical(self._model, args, kwargs)
        named = calls.leaves(call)
        compiled, settle = self._lookup(call, named)
        program = compiled.program
        step = None
        if torch.is_grad_enabled():
            step = self._accumulator.step(program, self._sync, lambda: compiled.feed(named))
        feed = compiled.feed(named, step, self._next_seed())
        outs = compiled.run(*feed) if step is None else step.run(*feed, *step.inputs)
        settle()
        self._update_buffers(program, outs)
        return self._outputs(program, outs)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward over the plan's microbatches; gradients are summed over ranks once. Returns the loss.

        The loss (and its gradient) is the mean over microbatches; dim 0 of every batched input must divide by their number.
        """
        n = self.plan.microbatches
        losses = []
        for i, part in enumerate(self._microbatches(args, kwargs, n)):
            with contextlib.nullcontext() if i == n - 1 else self.no_sync():
                loss = loss_of(self(**part)) / n
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _microbatches(self, args: tuple, kwargs: dict[str, Any], n: int) -> Iterator[dict[str, Any]]:
        call = calls.canonical(self._model, args, kwargs)
        named = calls.leaves(call)
        dims = self._batch_dims(call) if n > 1 else {}
        if n == 1:
            yield call[1] if not call[0] else dict(zip(named, call[0], strict=False))
            return
        for path, dim in dims.items():
            if dim is not None and named[path].shape[dim] % n:
                raise InputError(f"plan field `microbatches`={n}: must divide the replica's batch of {named[path].shape[dim]} "
                                 f"(input {path!r}); try a batch of {-(-named[path].shape[dim] // n) * n}")
        for i in range(n):
            part = {p: v.chunk(n, dims[p])[i] if dims.get(p) is not None else v for p, v in named.items()}
            spec = pytree.tree_structure(call[1])
            yield pytree.tree_unflatten([part[p] for p in named], spec)

    def _batch_dims(self, call: calls.Call) -> dict[str, int | None]:
        """Input path -> batch dim, as the newest program that takes these inputs has them."""
        names = calls.leaves(call).keys()

        def dims(program: Program) -> dict[str, int | None]:
            return {s.name: n.meta.get("batch_dim") for n, s in program.source_of().items() if s.kind == "input"}

        known = (d for p in reversed(list(self._programs.values())) if (d := dims(p)).keys() == names)
        return next(known, None) or dims(self._lookup(call, calls.leaves(call))[0].program)

    @torch.no_grad()
    def eval_step(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` without gradients."""
        return self(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients; what need not be communicated before the last microbatch is not.

        Under zero=0 and 1 gradients are kept aside, whole and unsummed (``.grad`` does not have them), until the next backward
        outside sums them all; under zero=2 and 3 each backward reduces them to parts. Under zero=1 and 2 parameters are
        gathered once, and kept until then, or until an optimizer's step or a write in place to one of them (operators that
        write to lists of tensors, such as ``torch._foreach_mul_``, are noticed inside of an optimizer only).
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def _dp_axes(self) -> tuple[str, ...]:
        mesh = self._bound.mesh
        return tuple(a for a in mesh.strategies.get("dp", ()) if mesh.size(a) > 1)

    def _lookup(self, call: calls.Call, named: dict[str, Any]) -> tuple[Compiled, Callable[[], None]]:
        """What runs this call, whose leaves are `named`, and what to call after it was started.

        That ends the comparison of what the ranks were called with. On a GPU, where starting communication does not block, it
        runs beside the forward, but for a call that has to be compiled first.
        """
        captured = self._captured(named)
        key = (*captured, torch.is_grad_enabled())
        device = self.device.type
        settle = agree_on_call(self._control, key, self._names)
        if key not in self._compiled or device != "cuda":
            settle()
            settle = _nothing
        if key not in self._compiled:
            if captured not in self._programs:
                with agree_on_program(self._control) as made:
                    made.append(self._compile_call(call, self._tilings))
                    self._left.add(made[0], captured[:-1])
                captured = self._captured(named)
                key = (*captured, torch.is_grad_enabled())
                self._programs[captured] = made[0]
            self._compiled[key] = self._compile(self._programs[captured], named)
        return self._compiled[key], settle

    def _captured(self, named: dict[str, Any]) -> tuple:
        """What a captured program depends on: the call's leaves, the mode of every submodule, which parameters are trained,
        autocast, and what forwards left in attributes."""
        modules = _parts(self._model)
        modes = tuple([module.training for _, module in modules])
        parameters = [p for _, module in modules for p in module._parameters.values() if p is not None]
        trained = tuple(compat.want_gradients(parameters))
        device = self.device.type
        auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return calls.signature(named), modes, trained, auto, self._left.state()

    def _names(self, part: int) -> list[str]:
        """Of the submodules, or the parameters, in the order of `_captured`."""
        paths = {id(module): path for path, module in self._model.named_modules()}
        modules = [(paths[i], module) for i, module in _parts(self._model)]
        return [path for path, _ in modules] if part == 1 else [
            f"{path}.{key}".strip(".") for path, module in modules for key, p in module._parameters.items() if p is not None]

    def adopt(self, program: Program, call: calls.Call) -> None:
        """Take the program of an example call, and its parameter layouts as the ones the parameters are stored in."""
        self._left.add(program, self._captured(calls.leaves(call))[:-1])
        self._programs[self._captured(calls.leaves(call))] = program
        self._store(program)
        self._use_copy_engines()
        seeds = self._control.exchange(torch.initial_seed() & 0x7FFFFFFF)
        self.seed = seeds[0]

    def _compile(self, program: Program, named: dict[str, Any]) -> Compiled:
        self._runtime.prepare(program.module)
        feed = Feed(program, self._slots, self._accumulator, self.device)
        run = self._lower_graph(program.module, feed(named))
        if self.device.type == "cuda":
            gc.collect()  # what compiling leaves behind: now, and not in the middle of a step
        return Compiled(program, feed, run)

    def _lower_graph(self, module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        return self._lower(module, example, self._runtime, self.plan)

    def _store(self, program: Program) -> None:
        """Replace the model's parameters by DTensors in the layouts the program wants; parameters it never uses stay whole."""
        for node, source in program.source_of().items():
            if source.kind == "param":
                self._tilings[source.name] = node.meta["tiling"]
        made: dict[int, nn.Parameter] = {}
        for module_name, module in self._model.named_modules():
            for key, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    name = f"{module_name}.{key}" if module_name else key
                    tiles = self._tilings.setdefault(program.tied.get(name, name), tuple(() for _ in p.shape))
                    made[id(p)] = storage.parameter(self._of_rank_0(p), tiles, self._bound, self.device)
                module._parameters[key] = made[id(p)]
            for key, b in module._buffers.items():
                if b is not None and not b.is_meta:
                    module._buffers[key] = self._of_rank_0(b)
            for table in (module._parameters, module._buffers):
                for key in table:
                    self._slots[f"{module_name}.{key}" if module_name else key] = (table, key)

    def _use_copy_engines(self) -> None:
        """Have parameters gathered and gradients scattered by copies between GPUs, where that can be."""
        plan, mesh = self.plan, self._bound.mesh
        stored = mesh.strategies.get("zero", ())
        if not stored or not copies.available(self.device) or not plan.overlap_param_gather or not plan.overlap_grad_reduce:
            return
        sizes = [(count * (plan.param_dtype or p.dtype).itemsize, count * (plan.reduce_dtype or p.dtype).itemsize)
                 for p in self.parameters() for count in [mesh.size(*stored) * compat.local_part(p).numel()]]
        parameter, gradient = max((s for s in sizes if s[1] <= copies.LARGEST), key=lambda s: s[1], default=(0, 0))
        self._runtime.copy_engines(stored, self._control, lambda group: copies.on_gpu(group, parameter, gradient))

    def _of_rank_0(self, t: Tensor) -> Tensor:
        """The same initial value on every rank, as DDP has it: ranks may have built the model from different seeds."""
        if t.is_meta:
            return t
        if t.device != self.device or not t.is_contiguous():
            t = t.detach().to(self.device).contiguous().requires_grad_(t.requires_grad)
        if torch.distributed.get_world_size() > 1 and t.numel():
            torch.distributed.broadcast(t.detach().reshape(-1).view(torch.uint8), 0)  # gloo knows no bool
        return t

    def _state(self, name: str) -> Tensor:
        """The parameter or buffer of that name, as the model has it now."""
        table, key = self._slots[name]
        return table[key]

    def _next_seed(self) -> int:
        """One seed per forward, the same on every rank and under every plan."""
        self._steps += 1
        return (self.seed * 1_000_003 + self._steps) & 0x7FFFFFFFFFFFFFFF

    def _update_buffers(self, program: Program, outs: Any) -> None:
        """Buffers are kept whole on every rank, wherever their new values were computed."""
        with torch.no_grad():
            for sink, out, node in zip(program.tensor_sinks(), outs, program.outputs(), strict=True):
                if sink.kind != "buffer":
                    continue
                tiles = node.meta["tiling"]
                if any(p.axes for dim in tiles for p in dim):
                    out = storage.whole(out, tiles, node.meta["global"].shape, self._bound, self._runtime)
                self._state(sink.name).copy_(out)

    def _outputs(self, program: Program, outs: Any) -> Any:
        flat: list[Any] = []
        stored: list[Any] = []
        made = iter(zip(outs, program.outputs(), strict=True))
        for sink in program.sinks:
            if sink.kind == "literal":
                flat.append(sink.constant)
                continue
            out, node = next(made)
            if sink.kind != "buffer":
                (flat if sink.kind == "output" else stored).append(self._as_output(out, node))
        put_back(program.writes, stored)
        return pytree.tree_unflatten(flat, program.out_spec)

    def _as_output(self, out: Tensor, node: Any) -> Any:
        mesh, dp = self._bound.mesh, self._dp_axes()
        tiles = node.meta["tiling"]
        split = {a for d in tiles for p in d for a in p.axes}
        if split & set(dp) and out.requires_grad:
            out = _Average.apply(out, mesh.size(*dp))
        inner = tuple(a for a in mesh.names if a in split and a not in dp)
        if not inner:
            return out
        places = [p for a, p in zip(mesh.names, storage.placements(tiles, mesh), strict=True) if a not in dp]
        names = tuple(a for a in mesh.names if a not in dp)
        sub = self.mesh[names] if len(names) < len(mesh.names) else self.mesh
        return DTensor.from_local(out, sub, places, run_check=False)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their joint norm over all ranks is at most `max_norm`; returns the norm before.

        Every element of every parameter counts once, however it is sharded or replicated. norm_type: 2, any p > 0, or inf.
        """
        return clip_grad_norm(list(self.parameters()), max_norm, norm_type, self._bound, self._runtime)

    def init_weights(self, seed: int) -> None:
        """Fill parameters (and buffers) that are on the meta device as the model's own initialisation would, from `seed`."""
        init_weights(self._model, seed, self._tilings, self._bound, self.device)

    def report(self) -> Report:
        """What the newest program does: layouts, collectives, memory."""
        return report_of(self._newest())

    def print_readable(self) -> str:
        """Print (and return) the newest local program as annotated Python."""
        text = readable(self._newest())
        print(text)
        return text

    def _newest(self) -> Program:
        return list(self._programs.values())[-1]


def _nothing() -> None:
    pass


def _parts(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The model and its submodules, with their ids; `nn.Module.modules` takes twice as long, at every step."""
    found: list[tuple[int, nn.Module]] = []
    pending: list[nn.Module] = [model]
    while pending:
        module = pending.pop()
        found.append((id(module), module))
        pending += [child for child in module._modules.values() if child is not None]
    return found


def loss_of(outputs: Any) -> Tensor:
    """The loss in a model's output: `.loss`, or its only floating scalar. Raises `InputError` if there is none."""
    loss = getattr(outputs, "loss", None)
    scalars = [loss] if isinstance(loss, Tensor) else [
        t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()]
    if not scalars:
        raise InputError("train_step needs a loss: the model's output has no `.loss` and no floating-point scalar "
                         "(for Hugging Face models pass labels)")
    return scalars[0]
