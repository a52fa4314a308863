"""engine: captures, compiles and runs the programs of a model, one for every kind of call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.backends import eager
from fxpar.backends.transport import copies
from fxpar.errors import CaptureError, InputError, MismatchError, UnsupportedOperator
from fxpar.garbage import few_collections
from fxpar.model import inputs as calls
from fxpar.model.hugging_face import say
from fxpar.model.padding import Padding
from fxpar.model.state import PARTS, TRAINED, State
from fxpar.ops.exchange import counts_rows
from fxpar.passes.capture.attributes import AttributeStates, put_back
from fxpar.passes.strategies.stages import Stage, cut_like, cut_stages
from fxpar.pipeline.schedules import Schedule, schedule
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.progress import stage
from fxpar.report.timings import STEP
from fxpar.run import microbatches, programs, storage
from fxpar.run.agreement import agree_on_call, agree_on_program
from fxpar.run.batches import BatchChecks
from fxpar.run.compared import CHECKED_EVERY, tell_all
from fxpar.run.drift import DriftChecks
from fxpar.run.edges import Edges, with_full_outputs
from fxpar.run.feed import Feed
from fxpar.run.loss import loss_of
from fxpar.run.numbers import Numbers
from fxpar.run.outputs import as_output
from fxpar.run.pipeline import Pipeline
from fxpar.run.recorded_step import AllOrNone
from fxpar.run.recording import COUNTED, Recordings, device_of, gradients_of, of_microbatches
from fxpar.run.scales import ScaleChecks
from fxpar.run.start import Start
from fxpar.run.steps import Steps
from fxpar.run.store import ParameterStore
from fxpar.run.transport import choose_transport, overlap_told
from fxpar.run.updates import OptimizerSteps
from fxpar.sharding.facts import local_value, sharding_at
from fxpar.sharding.layout import Sharding


@dataclass
class Compiled:
    """A program, what feeds it, what runs it, and its first run. pipeline: what runs whole steps of it, if it is cut into
    stages."""

    program: Program
    feed: Feed
    run: Callable[..., Any]
    start: Start
    pipeline: Pipeline | None = None


@dataclass
class DropoutSeeds:
    """What dropout draws from: one seed a forward, the same on every rank and under every plan.

    base: of the run. calls: forwards so far.
    """

    base: int = 0
    calls: int = 0

    def next(self) -> int:
        self.calls += 1
        return (self.base * 1_000_003 + self.calls) & 0x7FFFFFFFFFFFFFFF


class Engine:
    """Runs a model's programs on one rank.

    compile_call: of a function whose first argument is the model: ``(call, layouts, microbatches)`` -> the program of this
    rank, for parameters stored so. backend: a module of `fxpar.backends`, with its `lower` and `stepped`. transport,
    check_batches, padding, cuda_graphs: see `fxpar.parallelize`. programs: those that are kept, by what they depend on, newest
    last. recordings: of what they run.
    """

    def __init__(self, store: ParameterStore, plan: Plan, compile_call: functools.partial[Program],
                 backend: ModuleType, transport: str, check_batches: int = CHECKED_EVERY, padding: Padding | None = None,
                 cuda_graphs: bool | str = "auto"):
        self.store, self.plan, self.device = store, plan, store.device
        self._control, self._watch = store.control, store.control.watch
        self.programs: dict[tuple, Program] = {}
        self.compiled: OrderedDict[tuple, Compiled] = OrderedDict()  # the least recently used first
        self.seeds = DropoutSeeds()
        self._compile_call, self._backend, self._transport = compile_call, backend, transport
        self._padding = padding
        self._lower = functools.partial(backend.lower, runtime=store.runtime, plan=plan)
        self._in_steps = functools.partial(backend.stepped, runtime=store.runtime, plan=plan)
        self._first: Program | None = None
        self._stages: list[Stage] = []  # of the first program, which decides where parameters are
        self._depends = State(store.model)
        self._numbers = Numbers(self.device)
        once = backend is not eager or plan.recompute != "none" or plan.gathers_each_use
        self._scales = ScaleChecks(store.control, check_batches)
        self._edges = Edges(type(store.model).__name__, plan, store.bound, store.runtime, once, self._scales.tell)
        self._steps = Steps(plan, store.mesh, self._lower, store.tensor, functools.partial(of_microbatches, weakref.ref(self)))
        self._left = AttributeStates()
        self._said: set[int] = set()  # numbers of programs
        self._batches = BatchChecks(store.bound, store.control, check_batches)
        self._drift = DriftChecks(store, check_batches, self._attributes)
        self._optimizers = OptimizerSteps(self._watch)
        graphs, off = device_of(self.device), None
        if graphs is None or (backend is eager and self.device.type == "cuda"):
            off = "code that is compiled for a GPU is recorded, and this is none"
        unreduced = self._steps.gradients
        self.recordings = Recordings(cuda_graphs, graphs, store.control,
                                     lambda: [*gradients_of(store.model), *unreduced.pending.values()],
                                     functools.partial(copies.begin_anew, store.runtime), off, store.bound.communicates_over)
        self._all_or_none = AllOrNone(self.recordings, self.plan.pp)

    def copied(self, store: ParameterStore) -> Engine:
        """An engine that runs the model of another store as this one runs its own; it has captured nothing yet."""
        compile_call = functools.partial(self._compile_call.func, store.model, *self._compile_call.args[1:])
        store.runtime.blocks = self.store.runtime.blocks
        new = Engine(store, self.plan, compile_call, self._backend, self._transport, self._batches.turns.every, self._padding,
                     self.recordings.wanted)
        new.seeds = dataclasses.replace(self.seeds)
        return new

    def adopt(self, program: Program, call: calls.Call) -> None:
        """Take the program of an example call, and its layouts of parameters as the ones that they are stored in."""
        if self.plan.pp > 1:
            self._stages = cut_stages(program, self.plan.pp * self.plan.virtual_stages)
            self._first, owner = program, self._schedule().owner
            self.store.adopt([[s.program for s in self._stages if owner[s.index] == kind] for kind in range(self.plan.pp)])
        else:
            self.store.adopt([[program]])
        self._depends = State(self.store.model)
        self._depends.add(program.reads)
        named, count = calls.leaves(call), program.microbatches.count if program.microbatches else 1
        key = self._captured(call, named, count)
        of_kinds = agree_on_call(self._control, "parallelize", (*key, True, *self._circumstances({}, True)), self._names)()
        self._left.add(program, _of_all(key, of_kinds)[:-1])
        self.programs[_of_all(self._captured(call, named, count), of_kinds)] = program
        self.store.runtime.transport = choose_transport(self.store, self.plan, self._transport, program)
        self.seeds.base = self.store.control.exchange(torch.initial_seed() & 0x7FFFFFFF)[0]

    def run(self, args: tuple, kwargs: Mapping[str, Any], last: bool) -> Any:
        """The model's output for this replica's part of a batch. last: it is the last microbatch of its step."""
        with self._watch.call("forward"):
            if self.plan.pp > 1:
                return self._run_stages(*self._found("forward", args, kwargs, self.plan.microbatches, last))
            with compat.ranged("fxpar: call"):
                named, compiled, await_agreement = self._found("forward", args, kwargs, 1, last)
            seed = self.seeds.next()
            if self.recordings.decide_now(compiled.program):
                await_agreement()
                await_agreement = _nothing
            try:
                outs = self._run(compiled, named, seed, last)
            finally:  # if this rank was called with other things, that is why it failed
                await_agreement()
            with compat.ranged("fxpar: outputs"):
                self.store.update_buffers(compiled.program, outs)
                return self._outputs(compiled.program, outs)

    def _run_stages(self, named: dict[str, Any], compiled: Compiled, await_agreement: Callable[[], Any]) -> Any:
        """`run` under a plan with pipeline stages: forward and backward of the step's microbatches, or the forward alone."""
        await_agreement()
        program, pipeline, seed, grad = compiled.program, compiled.pipeline, self.seeds.next(), torch.is_grad_enabled()
        assert pipeline is not None
        if grad and pipeline.loss is None:
            raise InputError("a pipeline runs forward and backward in one go, so the model has to compute its loss: pass it "
                             "labels, or wrap it in a module that returns the loss; eval_step runs the forward alone")
        wanted = next((s.name for s in program.sources if s.kind == "input" and s.requires_grad), None)
        if grad and wanted is not None:
            raise InputError(f"input {wanted!r} wants a gradient, under pp={self.plan.pp}: a pipeline's backward runs within "
                             "its forward, before that of what computed the input; detach() it, put what computes it into the "
                             "model, or use a plan without pp")
        try:
            step, parts = pipeline.train if grad else pipeline.evaluate, self._parts(compiled, named, seed)
            made = compiled.start.run(lambda: step(parts, seed), STEP)
        except Exception as error:
            self._watch.fail_all(error)  # the other ranks wait for what this one was to send
            raise
        if grad and pipeline.loss is not None:
            made[pipeline.loss] = self._edges.leave_loss(made[pipeline.loss])
            self._tell_of_backward([made[pipeline.loss]])
        flat: list[Any] = []
        numbers = iter(range(len(program.tensor_sinks())))
        for sink in program.sinks:
            if sink.kind == "literal":
                flat.append(sink.constant)
            elif (number := next(numbers)) in made and sink.kind == "output":
                flat.append(self._as_output(made[number], microbatches.step_output_sharding(program, number)))
            elif sink.kind == "output":
                flat.append(None)
        put_back(program.writes, [])
        return pytree.tree_unflatten(flat, program.out_spec)

    def train(self, args: tuple, kwargs: Mapping[str, Any], last: bool) -> Tensor:
        """Forward and backward over the plan's microbatches; the loss of this replica's whole batch. last: gradients are reduced
        with those of the last microbatch.

        Raises: `InputError` for a batch that does not divide into microbatches.
        """
        with self._watch.call("train_step"):
            named, compiled, await_agreement = self._found("train_step", args, kwargs, self.plan.microbatches, last)
            await_agreement()
            program, seed = compiled.program, self.seeds.next()

            def forward(microbatch: dict[str, Any], is_last: bool) -> list[Tensor]:
                self._watch.alive()
                outs = self._run(compiled, microbatch, seed, last and is_last)
                self.store.update_buffers(program, outs, is_last)
                return outs

            return microbatches.train(program, self._parts(compiled, named, seed), forward,
                                      lambda outs: loss_of(self._outputs(program, outs)))

    def _run(self, compiled: Compiled, named: dict[str, Any], seed: int, last: bool) -> list[Tensor]:
        """The program's outputs, as they leave it."""
        program = compiled.program
        named, crossing = self._edges.enter(program, named)
        microbatch = None
        if torch.is_grad_enabled():
            microbatch = self._steps.microbatch(program, last, lambda: compiled.feed(named))
        run = compiled.run if microbatch is None else microbatch.run
        with compat.ranged("fxpar: inputs"):
            given = compiled.feed(named, microbatch, seed)
        with compat.ranged("fxpar: forward"):
            outs = compiled.start.run(lambda: self._edges.leave(program, run(*given), crossing, compiled.feed.reached.note))
        self._tell_of_backward(outs)
        return outs

    def _tell_of_backward(self, outs: list[Tensor]) -> None:
        """Have the watch told when a backward pass comes to what the user gets."""
        for node in dict.fromkeys(out.grad_fn for out in outs):
            if node is not None:
                node.register_prehook(functools.partial(self._watch.backward_begins, self.store.name, self.seeds.calls))

    def _parts(self, compiled: Compiled, named: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        """What each microbatch takes, by the names of the program's sources."""
        if compiled.program.microbatches is None:
            return [named]
        return microbatches.parts(compiled.program, compiled.feed, named, seed, self.store.runtime)

    def _require_divides(self, call: calls.Call, count: int) -> None:
        if count > 1:
            named = calls.leaves(call)
            microbatches.require_divides(named, self._batch_dims(named), count)

    def newest(self) -> Program:
        """The program that was captured last; of those that train, if there are any."""
        if not self.programs:
            raise InputError("this copy of a parallel module was not called yet: there is no program to report on")
        made = list(self.programs.values())
        return next((p for p in reversed(made) if p.training), made[-1])

    def stages(self, program: Program) -> list[Stage]:
        """What a program is cut into; nothing without a pipeline."""
        return self._stages if program is self._first or self.plan.pp == 1 else cut_like(program, self._stages)

    def _batch_dims(self, named: dict[str, Any]) -> dict[str, int | None]:
        """Input path -> batch dim, as the newest program that takes these inputs has them; nothing where there is none."""

        def dims(program: Program) -> dict[str, int | None]:
            return {s.name: local_value(n).batch_dim for n, s in program.source_of().items() if s.kind == "input"}

        return next((d for p in reversed(list(self.programs.values())) if (d := dims(p)).keys() == named.keys()), {})

    # ---- programs ----

    def _found(self, name: str, args: tuple, kwargs: Mapping[str, Any], count: int,
               last: bool) -> tuple[dict[str, Any], Compiled, Callable[[], Any]]:
        """The leaves of a call as its program takes them, and what `_lookup` returns for it. name: what is called. count: of
        microbatches."""
        name = f"{name} of {self.store.name}"
        call = self._call(name, args, kwargs)
        while True:
            with self._failing_together():
                self._require_divides(call, count)
                prepared = self._numbers.prepared(call)
                named = with_full_outputs(calls.leaves(prepared))
                key = *self._captured(prepared, named, count), torch.is_grad_enabled()
                due = [(self._batches.judge, self._batches.due(named, self._batch_dims)),
                       *((x.judge, x.due()) for x in (self._all_or_none, self._scales, self._drift))]
            compared = *key, *self._circumstances(calls.leaves(call), last)
            await_agreement = agree_on_call(self._control, name, compared, self._names, [one for _, some in due for one in some],
                                            functools.partial(tell_all, due))
            try:
                return named, *self._lookup(prepared, named, count, key, await_agreement)
            except (CaptureError, UnsupportedOperator):
                if not self._numbers.refused():
                    raise

    def _call(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> calls.Call:
        """A call in its canonical form. Where it is padded, all replicas' are as long as the longest."""
        with self._failing_together():
            self.store.require_filled()
            call = positional, batch = calls.canonical(self.store.model, args, kwargs)
            if self._padding is None:
                return call
            if positional:
                raise InputError("padding needs the names of inputs, and this model's forward takes them by position alone: pad "
                                 "them before the call (fxpar.pad)")
            lengths = self._padding.lengths(batch)
        lengths = self._control.longest(name, lengths)
        with self._failing_together():
            try:
                return calls.canonical(self.store.model, (), self._padding.padded(batch, lengths))
            except InputError as error:
                if self._padding.mask in (None, *batch):
                    raise
                raise InputError(f"{error} (the mask of what was padded; a causal model needs none: mask=None)") from error

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Around what one rank alone may fail at, in the place of a comparison: the others then raise, too."""
        try:
            yield
        except Exception as error:
            self._control.fail(error)
            raise

    def _circumstances(self, passed: Mapping[str, Any], last: bool) -> tuple:
        """What ranks are to have in common besides what a captured program depends on; see `PARTS` of `fxpar.run.agreement`."""
        watch, seeds = self._watch, self.seeds
        numbers = tuple([x for x in passed.values() if type(x) is float])
        return (numbers, not last, (seeds.base, seeds.calls), watch.taken(), watch.taken_backwards(), watch.failures,
                self._depends.have_gradients(), self._optimizers.taken(), self.recordings.held())

    def require_alike(self) -> None:
        """Raises: `MismatchError`, on all ranks, if copies of a parameter or buffer differ."""
        self._drift.require_alike()

    def filled_anew(self) -> None:
        """What ranks hold was written to, on all of them: they compare it in the next calls."""
        self._drift.begin_anew()

    def _attributes(self) -> dict[str, Tensor]:
        """Tensors that programs read and that are neither parameters nor buffers, as attributes hold them now."""
        places = [s.place for p in self.programs.values() for s in p.sources if s.place is not None]
        return {str(key): table[key] for table, key in places if isinstance(table[key], Tensor)}

    def _names(self, part: int) -> list[str]:
        return self._depends.names(part - 1)

    def _lookup(self, call: calls.Call, named: dict[str, Any], count: int, key: tuple,
                await_agreement: Callable[[], tuple[int, ...]]) -> tuple[Compiled, Callable[[], Any]]:
        """What runs this call, whose leaves are `named`, and what to call after it was started.

        That ends the comparison of what the ranks were called with. On a GPU, where starting communication does not block, it
        runs beside the forward, but for a call that has to be compiled first.
        """
        control, captured = self._control, key[:-1]
        of_kinds: tuple[int, ...] = ()
        late: Callable[[], Any] = functools.partial(self._agreed_late, await_agreement)
        if control.kinds > 1 or key not in self.compiled or self.device.type != "cuda":
            of_kinds, late = await_agreement(), tuple
        captured = _of_all(captured, of_kinds)
        key = (*captured, torch.is_grad_enabled())
        if key not in self.compiled:
            told = f"{'compiling for the' if captured in self.programs else 'new'} {_shape(named)}"
            if captured not in self.programs:
                if self.programs and captured[PARTS] != next(reversed(self.programs))[PARTS]:
                    self.store.relocate()
                self.store.describe_absent()
                with stage(told), agree_on_program(control) as made:
                    with self.store.all_parameters():
                        made.append(self._numbers.checked(self._compile_call(call, self.store.layouts, count)))
                    self._left.add(made[0], captured[:-1])
                self._make_room(captured)
                self._depends.add(made[0].reads)
                captured = _of_all(self._captured(call, named, count), of_kinds)
                key = (*captured, torch.is_grad_enabled())
                self.programs[captured] = made[0]
            with self._watch.busy("compiling"), stage(told):
                self.compiled[key] = self._compile(self.programs[captured], named)
        self.compiled.move_to_end(key)
        return self.compiled[key], late

    def _agreed_late(self, await_agreement: Callable[[], Any]) -> None:
        """The end of a comparison beside which communication was started already: if ranks differ, it waits in vain."""
        try:
            await_agreement()
        except MismatchError as error:
            self._watch.fail_all(error)
            raise

    def _captured(self, call: calls.Call, named: dict[str, Any], count: int) -> tuple:
        """What a captured program depends on: the call's leaves, the state of the model (see `State.key`), autocast, and what
        earlier calls left in attributes."""
        kind = self.device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        steps = (("microbatches", count),) if count > 1 else ()
        return (*calls.signature(named), *calls.structure(call), *steps), *self._depends.key(), auto, self._left.state()

    def _make_room(self, captured: tuple) -> None:
        """For another program: forget those of a model of other parts, or the least recently used one."""
        if not self.programs:
            return
        newest, count = next(reversed(self.programs)), len(self.programs)
        if count in {programs.MANY, programs.MOST} - self._said:
            self._said.add(count)
            say([programs.note(count, captured, newest, self._depends.changed)])
        forgotten = list(self.programs) if captured[PARTS] != newest[PARTS] else [
            programs.least_used(self.programs, self.compiled)] if count >= programs.MOST else []
        for key in forgotten:
            program = self.programs.pop(key)
            self._steps.drop(program)
            self._edges.drop(program)
            self.recordings.drop(program)
            for grad in (True, False):
                self.compiled.pop((*key, grad), None)

    def _compile(self, program: Program, named: dict[str, Any]) -> Compiled:
        self.store.runtime.prepare(program.module)
        feed = Feed(program, self.store.places, self._steps.gradients, self.device, self._edges.once)
        start = Start(program, named, len(self.programs))
        refused = COUNTED if counts_rows(program.graph) else None
        if self.plan.pp > 1:
            pipeline = start.lower(lambda later: Pipeline(program, self.stages(program), self._schedule(), self.store,
                                                          self._in_steps, self._all_or_none.record(program, refused)))
            return Compiled(program, feed, _nothing, start, pipeline)
        if program.microbatches is not None:
            named = microbatches.parts(program, feed, named, 0, self.store.runtime)[0]
        example = feed(named)
        recorded = self.recordings.of(program, refused)
        with few_collections() if self.device.type == "cuda" else contextlib.nullcontext():
            run = start.lower(lambda later: self._lower(program.module, example, later=later, recorder=recorded))
        return Compiled(program, feed, run, start)

    def _schedule(self) -> Schedule:
        plan = self.plan
        return schedule(plan.schedule, ranks=plan.pp, virtual_stages=plan.virtual_stages, microbatches=plan.microbatches,
                        unshard=plan.dp * plan.cp > 1)

    def overlap_told(self, program: Program) -> str | None:
        """See `fxpar.run.transport.overlap_told`."""
        return overlap_told(self.plan, self._backend is not eager, self.store.runtime.transport, program)

    # ---- outputs ----

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
                (flat if sink.kind == "output" else stored).append(self._as_output(out, sharding_at(node)))
        put_back(program.writes, stored)
        return pytree.tree_unflatten(flat, program.out_spec)

    def _as_output(self, out: Tensor, sharding: Sharding) -> Any:
        """This replica's output: a DTensor over the axes within the replica, if one of them splits it."""
        mesh, dp = self.store.mesh, self.store.mesh.axes("dp")
        split = {a for dim in sharding for piece in dim for a in piece.axes}
        if not split - {a for a in dp if mesh.size(a) > 1}:
            return out
        within = [a for a in mesh.names if a not in dp or mesh.size(a) == 1]
        places = [p for a, p in zip(mesh.names, storage.placements(sharding, mesh), strict=True) if a in within]
        device_mesh: DeviceMesh = self.store.bound.device_mesh
        return as_output(DTensor.from_local(out, device_mesh[tuple(within)] if len(within) < len(mesh.names) else device_mesh,
                                            places, run_check=False))


def _of_all(captured: tuple, of_kinds: tuple[int, ...]) -> tuple:
    """What a captured program depends on, with what is trained on ranks of all kinds, where there are several."""
    return (*captured[:TRAINED], (captured[TRAINED], of_kinds), *captured[TRAINED + 1 :]) if of_kinds else captured


def _shape(named: Mapping[str, Any]) -> str:
    """Of a call: that of its first tensor, for people."""
    first = next((tuple(x.shape) for x in named.values() if isinstance(x, Tensor)), ())
    return f"shape {first}"


def _nothing() -> None:
    pass
