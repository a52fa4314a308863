"""`ParallelModule`: what `parallelize` returns, and what a training loop holds."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fxpar import compat
from fxpar.errors import InputError, PlanError
from fxpar.program import Program
from fxpar.progress import stage
from fxpar.report.dump import readable
from fxpar.report.report import Report, report_of
from fxpar.report.timings import INITIALISING
from fxpar.run import alone, assigned, draws, optimizers, overflows, sums, whole
from fxpar.run.clip import Clipping
from fxpar.run.engine import DropoutSeeds, Engine
from fxpar.run.gathered import gathered
from fxpar.run.initialize import init_weights
from fxpar.run.loss import loss_of
from fxpar.run.repeated import StepRecordings
from fxpar.run.store import ParameterStore


class Replica(int):
    """The number of a replica, of `count`."""

    count: int

    def __new__(cls, index: int, count: int) -> Replica:
        made = super().__new__(cls, index)
        made.count = count
        return made

    @property
    def index(self) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[Replica], tuple[int, int]]:
        return Replica, (int(self), self.count)


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

    Under a plan with ``pp`` a rank has the parameters of its own pipeline stages (a tied one is on each stage that uses it), and
    all buffers, which are the same everywhere after each call. In the place of other parameters its modules have None:
    `parameters`, `named_parameters`, `state_dict` and an optimizer, made before or after, leave them out. `load_state_dict`
    passes over the names of other stages' parameters. `get_model_state_dict` of PyTorch, with ``full_state_dict=True``, gives
    each rank the full tensors of its own stages, so that rank 0 has not the whole model: `fxpar.save_checkpoint` and
    `fxpar.export_safetensors` write that. `mesh` is that of the ranks that hold the same stages.

    There `forward` runs the whole step, backward included, in the plan's microbatches, and returns the loss on every rank; other
    outputs are None, and without gradients (`eval_step`) they are on the ranks whose stage makes them. ``backward`` of the loss,
    or of what is computed from it, scales the gradients that are there already and hands them out: hooks of parameters run once
    a step, with the step's gradient. An error on one rank ends the step, on all ranks, with `FxparError`: those have to be
    started again.
    """

    accepts_loss_kwargs = False
    """For Hugging Face's Trainer: a loss is that of all replicas, and not to be multiplied by their number."""

    def __init__(self, store: ParameterStore, engine: Engine):
        super().__init__()
        model = store.model
        self.__dict__.update(_model=model, _modules=model._modules, _parameters=model._parameters,
                             _buffers=model._buffers, _non_persistent_buffers_set=model._non_persistent_buffers_set,
                             **{name: getattr(model, name) for name in compat.HOOKS})
        self.training = model.training
        self.plan, self.device = engine.plan, store.device
        self.parameter_store, self._engine = store, engine
        self._step_recordings = StepRecordings(engine.recordings, model.parameters)
        self._clipping = Clipping(store.bound, store.runtime, self._step_recordings.clipping)
        optimizers.watch(model if store.bound.across is not None else None)
        assigned.watch()
        sums.read_whole(store.bound)
        draws.watch()
        overflows.watch(store)
        self._sync, self._gathered = True, False
        for name in ("train_step", "clip_grad_norm_", "sum_over_parameters", "require_alike"):
            self.__dict__[name] = torch.compiler.disable(getattr(self, name), reason=whole.COMPILED)
        self.forward = whole.with_signature(self.forward, model)  # type: ignore[method-assign]
        self._made = True

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks that this module's parameters are DTensors on; under pp, those that hold the same stages."""
        return self.parameter_store.bound.device_mesh

    @property
    def replica(self) -> Replica:
        """Which data-parallel replica this rank belongs to, from 0: the part of the global batch that it is to pass in.

        The number is its `index`, too, and `count` how many replicas there are. See `fxpar.sampler`.
        """
        store = self.parameter_store
        dp = store.mesh.axes("dp")
        return Replica(store.bound.index(dp), store.mesh.size(*dp))

    @property
    def dropout_seeds(self) -> DropoutSeeds:
        """What dropout draws from, and how often it did."""
        return self._engine.seeds

    @property
    def seed(self) -> int:
        """What dropout draws from in this run; the same on every rank."""
        return self._engine.seeds.base

    @seed.setter
    def seed(self, value: int) -> None:
        self._engine.seeds.base = value

    def __getattr__(self, name: str) -> Any:
        """What is not this object's own is the model's; ``_programs``, those that are kept, is unless the model has it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__["_model"]
        value = getattr(model, name, self._engine.programs) if name == "_programs" else getattr(model, name)
        if inspect.ismethod(value) and isinstance(value.__self__, nn.Module) and not self.__dict__["_gathered"]:
            return whole.method(value, name, type(model).__name__)
        return value

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
        if self._gathered:
            raise InputError("the parallel module was called inside of `with module.gathered()`: call the plain model, which "
                             "that yields, or the module behind it")
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise InputError("a parallel module was called by torch.export or torch.jit.trace, and each rank has a part of it; "
                             "give them the plain model: with module.gathered(rank0_only=True) as model: ...")
        if compat.inside_of_transform():
            raise InputError("a parallel module was called inside of torch.func (vmap, grad, jvp), which cannot transform what "
                             "several ranks run; pass a batch, call backward or torch.autograd.grad, or transform the plain "
                             "model inside of `with module.gathered()`")
        return self._engine.run(args, kwargs, last=self._sync)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of this replica's batch, over the plan's microbatches; gradients are summed over ranks once.
        Returns the loss.

        Loss and gradients are those of the whole batch, as with one microbatch, whatever the loss divides by; the batch must
        divide by the number of microbatches. What is not linear in the batch (a load-balancing loss, batch norm) takes a
        microbatch's own sums for the batch's, and counts as the mean over microbatches: `report().notes` name its lines.
        Raises: as `forward`; `PlanError` for a model that cannot be computed in microbatches.
        """
        if self.plan.microbatches > 1 and self.plan.pp == 1:
            return self._engine.train(args, kwargs, last=self._sync)
        loss = loss_of(self(*args, **kwargs))
        loss.backward()
        return loss.detach()

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

        Under zero=0 and 1 gradients are kept aside, unsharded and not summed (``.grad`` does not have them), until the next
        backward outside sums them all; under zero=2 and 3 each backward reduces them to parts. Under zero=1 and 2 parameters are
        gathered once, and kept until then, or until an optimizer's step or a write in place to one of them (operators that
        write to lists of tensors, such as ``torch._foreach_mul_``, are noticed inside of an optimizer only).
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their joint norm over all ranks is at most `max_norm`; returns the norm before.

        Every element of every parameter counts once, however it is sharded or replicated. norm_type: 2, any p > 0, or inf.
        """
        store = self.parameter_store
        with store.control.watch.call("clip_grad_norm_"), compat.ranged("fxpar: clip_grad_norm_"):
            store.control.watch.note(f"clip_grad_norm_({float(max_norm)}, {float(norm_type)})")
            return self._clipping(store.counted(), max_norm, norm_type)

    def sum_over_parameters(self, function: Callable[[str, nn.Parameter], Any]) -> Tensor:
        """The sum of ``function(name, parameter)``, a number for each of the model's parameters: the same on all ranks, under
        every plan, and with gradients, to be added to a loss as a penalty. Tied parameters count once. All ranks call.

        ``loss + module.sum_over_parameters(lambda name, p: 0.01 * p.square().sum() if p.dim() > 1 else 0)``
        """
        store = self.parameter_store
        with store.control.watch.call("sum_over_parameters"):
            store.control.agree("sum_over_parameters", {"module": store.name})
            return sums.over_parameters(function, store)

    def init_weights(self, seed: int) -> None:
        """Fill parameters (and buffers) that are on the meta device as the model's own initialisation would, from `seed`."""
        store = self.parameter_store
        with store.control.watch.call("init_weights"):
            store.control.agree("init_weights", {"module": store.name, "seed": seed})
            store.control.together(lambda: self._init_weights(seed))

    def _init_weights(self, seed: int) -> None:
        store, begin = self.parameter_store, time.perf_counter()
        with stage("initialising parameters"), store.control.watch.busy("initialising"), store.all_parameters():
            init_weights(self._model, seed, store.layouts, store.bound, self.device, store.elsewhere)
        self._engine.newest().timings[INITIALISING] = time.perf_counter() - begin

    def require_alike(self) -> None:
        """Compare what several ranks hold alike: parameters that are not split over all of them, and buffers. All ranks call.

        Ranks do so by themselves now and then (`check_batches` of `fxpar.parallelize`), and before a checkpoint is written.
        Raises: `MismatchError`, on all ranks, with the name of one that differs.
        """
        store = self.parameter_store
        with store.control.watch.call("require_alike"):
            store.control.agree("require_alike", {"module": store.name})
            self._engine.require_alike()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, from DTensors or from whole tensors, which all ranks pass; what it has of parameters that other
        ranks' pipeline stages hold is left alone here. Ranks compare in the next call that all did so, and with the same."""
        store = self.parameter_store
        store.control.watch.note(f"load_state_dict of {store.name}: {whole.digest_of(store, state_dict)}")
        self._engine.filled_anew()
        return super().load_state_dict(whole.in_parts(store, dict(state_dict)), strict, assign)

    @contextlib.contextmanager
    def gathered(self, submodule: nn.Module | str | None = None, *, rank0_only: bool = False, offload: str | None = None,
                 write_back: bool = False) -> Iterator[Any]:
        """Inside of ``with module.gathered() as model:`` the plain model is there, with whole parameters, on all ranks: for
        generation, evaluation, saving, and whatever else is no training step.

        submodule: the part of the model that is gathered and yielded (a module, or its name), instead of all of it. rank0_only:
        rank 0 alone has it, and others get None; they wait for rank 0 at the end of the block. offload: a device to put it on
        ("cpu": parameters pass through the GPU one after the other). write_back: what rank 0 has at the end stays, on all
        ranks: values, what is trained, and parameters that were put in on all ranks, such as a longer embedding, which
        an optimizer that was made before does not know. Otherwise the model is behind the block what it was before.
        All ranks enter and leave the block together. Raises: `MismatchError` on ranks that wait if the block raised on another.
        """
        if self._gathered:
            raise InputError("the module is gathered already")
        control = self.parameter_store.control
        with control.watch.call("gathered"):
            part, device = control.together(lambda: (
                self._model if submodule is None or submodule is self else
                self._model.get_submodule(submodule) if isinstance(submodule, str) else submodule,
                self.device if offload is None else torch.device(offload)))
            where = next((path for path, m in self._model.named_modules() if m is part), type(part).__name__)
            control.agree("gathered", {"module": self.parameter_store.name, "submodule": where, "rank0_only": rank0_only,
                                       "offload": offload, "write_back": write_back})
        with gathered(self.parameter_store, part, rank0_only, device, write_back) as plain:
            self._gathered = True
            try:
                with control.watch.busy("a block of gathered()"):
                    yield plain
            finally:
                self._gathered = False

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module. Raises: `PlanError` for DistributedDataParallel, FSDP and others that would wrap this one."""
        alone.refuse_wrapping("ParallelModule")
        return super().named_modules(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """Another module of the same plan, on the same ranks, with parameters of its own (for a moving average of weights); what
        it runs is captured when it is called."""
        if self.plan.pp > 1:
            raise PlanError("pp", self.plan.pp, "has modules whose ranks hold other parameters, of which no copies can be made",
                            "pp=1, or an average of the parameters themselves: [p.detach().clone() for p in parameters()]")
        store = self.parameter_store.copied(memo)
        memo[id(self)] = new = ParallelModule(store, self._engine.copied(store))
        new.training = self.training
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a parallel module cannot be pickled (torch.save): each rank has a part of it, and process groups; "
                         "write fxpar.save_checkpoint(path, module), or save the plain model on rank 0: "
                         "with module.gathered(rank0_only=True, offload=\"cpu\") as model: model and torch.save(model, path)")

    def report(self) -> Report:
        """What the newest program that trains does: layouts, collectives, memory, the stages of a pipeline, and where the
        time went on the way to its first step (`timings`).

        Of several shapes it is the last that was new; where there was no training, an evaluation.
        """
        program = self._engine.newest()
        with self.parameter_store.control.watch.busy("making a report"):
            made = report_of(program, self._engine.stages(program))
        return dataclasses.replace(made, cuda_graphs=self._engine.recordings.told(program) + self._step_recordings.told(),
                                   tp_comm_overlap=self._engine.overlap_told(program))

    def newest_program(self) -> Program:
        """The program that `report` describes: another one when the module was called in a new way."""
        return self._engine.newest()

    def print_readable(self) -> str:
        """Print (and return) the local program that `report` describes, as annotated Python."""
        text = readable(self._engine.newest())
        print(text)
        return text
