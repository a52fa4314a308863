"""`ParallelModule`: what `parallelize` returns, and what a training loop holds."""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.backends.transport import copies
from fxpar.backends.transport.base import copied_axes
from fxpar.backends.transport.runtime import Control, GroupRuntime
from fxpar.errors import CaptureError, InputError, MismatchError, UnsupportedOperator
from fxpar.model import identity
from fxpar.model import inputs as calls
from fxpar.model.hugging_face import say
from fxpar.model.state import PARTS, State
from fxpar.passes.capture.attributes import Left, put_back
from fxpar.plan import Plan
from fxpar.program import Microbatches, Program
from fxpar.report.dump import readable
from fxpar.report.report import Report, report_of
from fxpar.run import microbatches, programs, storage
from fxpar.run.accumulation import Accumulator
from fxpar.run.agreement import agree_on_call, agree_on_program
from fxpar.run.clip import clip_grad_norm
from fxpar.run.edges import Edges, whole
from fxpar.run.feed import Feed, Place
from fxpar.run.initialize import init_weights
from fxpar.run.numbers import Numbers
from fxpar.sharding.layout import Tiling
from fxpar.sharding.mesh import BoundMesh


@dataclass
class Compiled:
    """One captured call signature: its program, what it is given and what runs it."""

    program: Program
    feed: Feed
    run: Callable[..., Any]


class ParallelModule(nn.Module):
    """The user's model, running on every rank of the mesh. Made by `fxpar.parallelize`.

    `forward` takes what the model's takes, with the batch of this rank's data-parallel replica, and returns the model's
    own output type. A loss is that of the global batch, the same on every rank, and ``.grad`` is its gradient. Other
    outputs are this replica's part (a DTensor where tp shards it); a loss that you compute from them yourself is
    averaged over the replicas, as in DDP. Outputs may be fed into other parallel modules with the same replicas, through
    plain operators too: parameters of all of them get the gradients of one device. Parameters of plain modules in between
    get those of this replica's loss, to be averaged as in DDP. ``.grad`` of a tensor that you pass in is that of the
    global objective, what `torch.autograd.grad` returns for it the derivative of the number that you gave (fxpar/run/edges.py).

    Parameters are DTensors on `mesh`, under the original names. `plan` and `mesh` (a `DeviceMesh`) are attributes.
    """

    def __init__(self, model: nn.Module, plan: Plan, bound: BoundMesh, control: Control, device: torch.device,
                 compile_call: Callable[..., Program], lower: Callable[..., Callable], transport: str):
        super().__init__()
        self.__dict__.update(_model=model, _modules=model._modules, _parameters=model._parameters,
                             _buffers=model._buffers, _non_persistent_buffers_set=model._non_persistent_buffers_set,
                             **{name: getattr(model, name) for name in compat.HOOKS})
        self.training = model.training
        self.plan, self.device = plan, device
        self._bound, self._control, self._depends = bound, control, State(model)
        self._compile_call, self._lower, self._transport = compile_call, lower, transport
        self._runtime = GroupRuntime(bound)
        self._numbers = Numbers(device)
        self._edges = Edges(type(model).__name__, plan, bound, self._runtime)
        self._programs: dict[tuple, Program] = {}
        self._compiled: OrderedDict[tuple, Compiled] = OrderedDict()  # the least recently used first
        self._said: set[int] = set()  # numbers of programs
        self._tilings: dict[str, Tiling] = {}
        self._slots: dict[str, Place] = {}
        self._accumulator = Accumulator(plan, bound.mesh, self._lower_graph, self._state)
        self._left = Left()
        self._sync = True
        self._count = 1
        self._steps = 0
        self.seed = 0
        self._made = True

    @property
    def mesh(self) -> DeviceMesh:
        return self._bound.device_mesh

    @property
    def replica(self) -> int:
        """Which data-parallel replica this rank belongs to, from 0: the part of the global batch that it is to pass in."""
        return self._bound.index(self._bound.mesh.axes("dp"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is not this object's own is the model's: its forward reads it there."""
        if name == "training" or "_made" not in self.__dict__ or name in self.__dict__ or hasattr(ParallelModule, name):
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._model, name)

    def train(self, mode: bool = True) -> ParallelModule:
        self._model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParallelModule:
        kept = [(p, dict(p.__dict__)) for p in self.parameters()]
        super()._apply(fn, recurse)
        for p, attributes in kept:  # swapped for those of what `fn` made
            p.__dict__.update(attributes)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on this replica's batch. A new signature (shapes, dtypes, the state of the model: see
        `fxpar.model.state`) is captured once.

        Raises: `InputError` for arguments that do not fit; `MismatchError` on every rank if ranks were given
        different shapes; `CaptureError`, `UnsupportedOperator`, `PlanError` where the model or plan cannot be compiled.
        """
        named, compiled, settle = self._found(calls.canonical(self._model, args, kwargs))
        outs = self._run(compiled, named, self._next_seed())
        settle()
        self._update_buffers(compiled.program, outs)
        return self._outputs(compiled.program, outs)

    def _run(self, compiled: Compiled, named: dict[str, Any], seed: int) -> list[Any]:
        """The program's outputs, as they leave it."""
        program = compiled.program
        named, crossing = self._edges.enter(program, named)
        step = None
        if torch.is_grad_enabled():
            step = self._accumulator.step(program, self._sync, lambda: compiled.feed(named))
        feed = compiled.feed(named, step, seed)
        outs = compiled.run(*feed) if step is None else step.run(*feed, *step.inputs)
        return self._edges.leave(program, outs, crossing)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of this replica's batch, over the plan's microbatches; gradients are summed over ranks once.
        Returns the loss.

        Loss and gradients are those of the whole batch, as with one microbatch, whatever the loss divides by; the batch must
        divide by the number of microbatches. What is not linear in the batch (a load-balancing loss, batch norm) takes a
        microbatch's own sums for the batch's, and counts as the mean over microbatches: `report().notes` name its lines.
        Raises: as `forward`; `PlanError` for a model that cannot be computed in microbatches.
        """
        count, call = self.plan.microbatches, calls.canonical(self._model, args, kwargs)
        if count == 1:
            loss = loss_of(self(*args, **kwargs))
            loss.backward()
            return loss.detach()
        microbatches.require_divides(calls.leaves(call), self._batch_dims(calls.leaves(call)), count)
        with self._in_microbatches():
            named, compiled, settle = self._found(call)
        settle()
        program, seed = compiled.program, self._next_seed()

        def forward(microbatch: dict[str, Any], last: bool) -> list[Tensor]:
            outs = self._run(compiled, microbatch, seed)
            self._update_buffers(program, outs, None if last else program.microbatches)
            return outs

        parts = microbatches.parts(program, compiled.feed, named, seed, self._runtime)
        return microbatches.train(program, parts, forward, lambda outs: loss_of(self._outputs(program, outs)), self.no_sync)

    @contextlib.contextmanager
    def _in_microbatches(self) -> Iterator[None]:
        """Inside, calls are captured as steps over the plan's microbatches."""
        self._count = self.plan.microbatches
        try:
            yield
        finally:
            self._count = 1

    def _batch_dims(self, named: dict[str, Any]) -> dict[str, int | None]:
        """Input path -> batch dim, as the newest program that takes these inputs has them; nothing where there is none."""
        def dims(program: Program) -> dict[str, int | None]:
            return {s.name: n.meta.get("batch_dim") for n, s in program.source_of().items() if s.kind == "input"}

        return next((d for p in reversed(list(self._programs.values())) if (d := dims(p)).keys() == named.keys()), {})

    @torch.no_grad()
    def eval_step(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` without gradients."""
        return self(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients; what need not be communicated before the last microbatch is not.

        Accumulation by hand adds up the gradients of the losses that you call `backward` on: if you divide them by their number,
        that of the mean of the microbatches' losses. That is the loss of the whole batch where all of them divide by the same
        count, and not where each divides by one of its own (of labels that are not ignored): `train_step` has that of the
        whole batch for any loss.

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
        return tuple(a for a in mesh.axes("dp") if mesh.size(a) > 1)

    def _found(self, call: calls.Call) -> tuple[dict[str, Any], Compiled, Callable[[], None]]:
        """The leaves of a call as its program takes them, and what `_lookup` returns for it."""
        prepared = self._numbers.prepared(call)
        named = whole(calls.leaves(prepared))
        try:
            return named, *self._lookup(prepared, named)
        except (CaptureError, UnsupportedOperator):
            if not self._numbers.refused():
                raise
        return self._found(call)

    def _lookup(self, call: calls.Call, named: dict[str, Any]) -> tuple[Compiled, Callable[[], None]]:
        """What runs this call, whose leaves are `named`, and what to call after it was started.

        That ends the comparison of what the ranks were called with. On a GPU, where starting communication does not block, it
        runs beside the forward, but for a call that has to be compiled first.
        """
        captured = self._captured(named)
        key = (*captured, torch.is_grad_enabled())
        device = self.device.type
        settle = agree_on_call(self._control, key, lambda part: self._depends.names(part - 1))
        if key not in self._compiled or device != "cuda":
            settle()
            settle = _nothing
        if key not in self._compiled:
            if captured not in self._programs:
                if captured[PARTS] != next(reversed(self._programs))[PARTS]:
                    self._slots = programs.places(self._model, self._slots, self._tilings, self._bound.mesh)
                with agree_on_program(self._control) as made:
                    made.append(self._numbers.checked(self._compile_call(call, self._tilings, self._count)))
                    self._left.add(made[0], captured[:-1])
                self._make_room(captured)
                self._depends.add(made[0].reads)
                captured = self._captured(named)
                key = (*captured, torch.is_grad_enabled())
                self._programs[captured] = made[0]
            self._compiled[key] = self._compile(self._programs[captured], named)
        self._compiled.move_to_end(key)
        return self._compiled[key], settle

    def _captured(self, named: dict[str, Any]) -> tuple:
        """What a captured program depends on: the call's leaves, the state of the model (see `State.key`), autocast, and what
        earlier calls left in attributes."""
        device = self.device.type
        auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        steps = (("train_step's microbatches", self._count),) if self._count > 1 else ()
        return (*calls.signature(named), *steps), *self._depends.key(), auto, self._left.state()

    def _make_room(self, captured: tuple) -> None:
        """For another program: forget those of a model of other parts, or the least recently used one."""
        newest, count = next(reversed(self._programs)), len(self._programs)
        if count in {programs.MANY, programs.MOST} - self._said:
            self._said.add(count)
            say([programs.note(count, captured, newest, self._depends.changed)])
        forgotten = list(self._programs) if captured[PARTS] != newest[PARTS] else [
            programs.least_used(self._programs, self._compiled)] if count >= programs.MOST else []
        for key in forgotten:
            program = self._programs.pop(key)
            self._accumulator.drop(program)
            self._edges.drop(program)
            for grad in (True, False):
                self._compiled.pop((*key, grad), None)

    def adopt(self, program: Program, call: calls.Call) -> None:
        """Take the program of an example call, and its parameter layouts as the ones the parameters are stored in."""
        self._store(program)
        self._depends = State(self._model)
        self._depends.add(program.reads)
        self._left.add(program, self._captured(calls.leaves(call))[:-1])
        self._programs[self._captured(calls.leaves(call))] = program
        self._use_copy_engines()
        seeds = self._control.exchange(torch.initial_seed() & 0x7FFFFFFF)
        self.seed = seeds[0]

    def _compile(self, program: Program, named: dict[str, Any]) -> Compiled:
        self._runtime.prepare(program.module)
        feed = Feed(program, self._slots, self._accumulator, self.device)
        if program.microbatches is not None:
            named = microbatches.parts(program, feed, named, 0, self._runtime)[0]
        run = self._lower_graph(program.module, feed(named))
        if self.device.type == "cuda":
            gc.collect()  # what compiling leaves behind: now, and not in the middle of a step
        return Compiled(program, feed, run)

    def _lower_graph(self, module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        return self._lower(module, example, self._runtime, self.plan)

    def _store(self, program: Program) -> None:
        """Have DTensors in the layouts the program wants take the place of the model's parameters; parameters it never uses stay
        whole."""
        self._require_same_gradients()
        for node, source in program.source_of().items():
            if source.kind == "param":
                self._tilings[source.name] = node.meta["tiling"]
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for module_name, module in self._model.named_modules():
            for key, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    name = f"{module_name}.{key}" if module_name else key
                    tiles = self._tilings.setdefault(program.tied.get(name, name), tuple(() for _ in p.shape))
                    made[id(p)] = p, self._parameter(name, p, tiles)
                module._parameters[key] = made[id(p)][1]
            for key, b in module._buffers.items():
                if b is not None and not b.is_meta:
                    module._buffers[key] = self._of_rank_0(b)
            for table in (module._parameters, module._buffers):
                for key in table:
                    self._slots[f"{module_name}.{key}" if module_name else key] = (table, key)
        identity.take_over(list(made.values()))

    def _parameter(self, name: str, p: nn.Parameter, tiles: Tiling) -> nn.Parameter:
        def part(whole: Tensor) -> DTensor:
            return storage.distribute(whole, tiles, self._bound, self.device)

        new = storage.parameter(self._of_rank_0(p), tiles, self._bound, self.device)
        if p.grad is not None:
            new.grad = part(self._of_rank_0(p.grad))
        identity.inherit(p, new, name, part)
        return new

    def _require_same_gradients(self) -> None:
        """Raises `MismatchError` if parameters have gradients already on some ranks, and on others not."""
        everyone = self._control.exchange([n for n, p in self._model.named_parameters() if p.grad is not None])
        other = next((r for r, names in enumerate(everyone) if names != everyone[0]), None)
        if other is not None:
            name = min({*everyone[0]} ^ {*everyone[other]})
            one, none = (0, other) if name in everyone[0] else (other, 0)
            raise MismatchError(f"parameter {name!r} has a gradient on rank {one} and none on rank {none}: call `zero_grad()` "
                                "before `parallelize`")

    def _use_copy_engines(self) -> None:
        """Have parameters gathered and gradients scattered by copies between GPUs, where that can and may be."""
        plan, mesh = self.plan, self._bound.mesh
        stored = copied_axes(self._transport, plan, mesh)
        if not stored or not copies.available(self.device):
            return
        sizes = [(count * (plan.param_dtype or p.dtype).itemsize, count * (plan.reduce_dtype or p.dtype).itemsize)
                 for p in self.parameters() for count in [mesh.size(*stored) * compat.local_part(p).numel()]]
        parameter, gradient = max((s for s in sizes if s[1] <= copies.LARGEST), key=lambda s: s[1], default=(0, 0))
        self._runtime.transport = copies.transport_over(
            self._bound, stored, self._control, lambda group: copies.on_gpu(group, parameter, gradient))

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

    def _update_buffers(self, program: Program, outs: Any, before: Microbatches | None = None) -> None:
        """Buffers are kept whole on every rank, wherever their new values were computed. before: a step whose last microbatch is
        still to run: those alone that each microbatch takes from the one before."""
        with torch.no_grad():
            for sink, out, node in zip(program.tensor_sinks(), outs, program.outputs(), strict=True):
                if sink.kind != "buffer" or (before is not None and sink.name not in before.in_order):
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


def loss_of(outputs: Any) -> Tensor:
    """The loss in a model's output: `.loss`, or its only floating scalar. Raises `InputError` if there is none."""
    loss = getattr(outputs, "loss", None)
    scalars = [loss] if isinstance(loss, Tensor) else [
        t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()]
    if not scalars:
        raise InputError("train_step needs a loss: the model's output has no `.loss` and no floating-point scalar "
                         "(for Hugging Face models pass labels)")
    return scalars[0]
