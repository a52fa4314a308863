"""accelerate: its `Accelerator`, for which replicas are processes."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fxpar.backends.transport.control import Control, watch
from fxpar.checkpoint import export_safetensors, load_checkpoint, save_checkpoint
from fxpar.errors import FxparError, InputError, PlanError
from fxpar.run.module import ParallelModule

STATE = "fxpar"
"""The folder, in one that `save_state` writes, that has the model and the optimizer."""


class Accelerator(accelerate.Accelerator):
    """accelerate's, for one module that `fxpar.parallelize` returned, with its optimizer, schedulers and data loaders.

    What accelerate does by process is done by replica: ranks of a replica get the same rows, `gather` and `reduce` take each
    replica once, `num_processes` and `process_index` are its number and count, and a scheduler steps once for each.
    `is_main_process` is rank 0. A loss that the model computes is that of all replicas already.
    """

    _module: ParallelModule | None = None
    _control: Control | None = None
    """By which ranks wait for each other while they save or load."""

    @classmethod
    def of(cls, accelerator: accelerate.Accelerator, module: ParallelModule) -> Accelerator:
        """One in the state of another accelerator, for this module."""
        made = cls.__new__(cls)
        made.__dict__.update(accelerator.__dict__)
        made._take(module)
        return made

    def _take(self, module: nn.Module) -> None:
        """Check that this accelerator can work with a module; from now on, its replicas are what counts."""
        if not isinstance(module, ParallelModule):
            raise InputError(f"fxpar's Accelerator prepares what fxpar.parallelize returned, and this {type(module).__name__} is "
                             "a plain module: parallelize it, or prepare it with an accelerator of its own")
        if self._module not in (None, module):
            raise InputError("this Accelerator has a parallel module already: use another one for each")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.state.num_processes != world:
            raise InputError(f"accelerate counts {self.state.num_processes} processes, and there are {world}: on CPUs it has to "
                             "be told that it may use them (Accelerator(cpu=True), TrainingArguments(use_cpu=True))")
        kind = self.distributed_type.name
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or self.parallelism_config is not None:
            raise PlanError("model", "ParallelModule", "is parallel already, and accelerate is configured to make it so "
                            f"({kind})", "an accelerate configuration without FSDP, DeepSpeed, Megatron-LM, parallelism_config")
        if self.mixed_precision not in (None, "no") and not (
                self.mixed_precision == "bf16" and module.plan.param_dtype == torch.bfloat16):
            raise PlanError("param_dtype", module.plan.param_dtype, "decides in which precision the module computes, and "
                            f"accelerate was told mixed_precision={self.mixed_precision!r}", "mixed_precision='no' (bf16=False) "
                            "and Plan(param_dtype='bf16', reduce_dtype='fp32')")
        self._module = module
        mesh = module.parameter_store.mesh
        self._first_ranks = mesh.groups(mesh.axes("dp"))[0]

    @property
    def module(self) -> ParallelModule:
        """The parallel module that was prepared. Raises: `InputError` before that."""
        if self._module is None:
            raise InputError("which replica this rank belongs to is not known yet: prepare the parallel module first, or "
                             "together with what depends on it")
        return self._module

    @property
    def num_processes(self) -> int:
        return super().num_processes if self._module is None else self._module.replica.count

    @property
    def process_index(self) -> int:
        return super().process_index if self._module is None else self._module.replica.index

    # ---- preparing ----

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        for module in args:
            if isinstance(module, nn.Module):
                self._take(module)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
        self._take(model)
        if not any(model is known for known in self._models):
            self._models.append(model)
        return model

    def prepare_data_loader(self, data_loader: Any, device_placement: bool | None = None,
                            slice_fn_for_dispatch: Any = None) -> Any:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        if self.dispatch_batches:
            raise InputError("dispatch_batches=True has rank 0 read all data and cut it into parts for ranks, of which those of "
                             "a replica need the same: leave it out")
        replica, config = self.module.replica, self.dataloader_config
        prepared = prepare_data_loader(
            data_loader, self.device, num_processes=replica.count, process_index=replica.index, split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=self.rng_types.copy(), dispatch_batches=False, even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler, data_seed=config.data_seed, non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader)
        self._dataloaders.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        if getattr(scheduler, "_is_accelerate_prepared", False):
            return super().prepare_scheduler(scheduler)
        prepared = _ReplicaScheduler(scheduler, self._optimizers, self.step_scheduler_with_optimizer,
                                     1 if self.split_batches else self.module.replica.count)
        self._schedulers.append(prepared)
        return prepared

    # ---- a step ----

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """The module's own clipping. Raises: `InputError` for less than all of its parameters."""
        given = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        missing = next((n for n, p in self.module.named_parameters() if p.requires_grad and id(p) not in given), None)
        if missing is not None:
            raise InputError(f"clip_grad_norm_ was given parameters without {missing}: a parallel module clips all gradients by "
                             "their joint norm; pass model.parameters()")
        return self.module.clip_grad_norm_(max_norm, norm_type)

    # ---- over replicas ----

    def gather(self, tensor: Any) -> Any:
        """As accelerate's, of each replica once; of an output that lies in parts on a replica's ranks the whole."""
        with watch().waits("Accelerator.gather"):
            gathered = super().gather(pytree.tree_map_only(DTensor, DTensor.full_tensor, tensor))
        if self._module is None or len(self._first_ranks) == self.state.num_processes:
            return gathered
        return recursively_apply(self._of_replicas, gathered)

    def _of_replicas(self, of_ranks: Tensor) -> Tensor:
        parts = of_ranks.chunk(self.state.num_processes)
        return torch.cat([parts[rank] for rank in self._first_ranks])

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        tensors = all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(input_data))
        if (use_gather_object or not tensors) and self.num_processes != self.state.num_processes:
            raise InputError("gather_for_metrics gathers tensors once from each replica, and objects only from each rank, which "
                             f"would repeat those of {self.module.plan}: pass tensors")
        return super().gather_for_metrics(input_data, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        tensor = pytree.tree_map_only(DTensor, DTensor.full_tensor, tensor)
        if self._module is None or len(self._first_ranks) == self.state.num_processes or reduction not in ("sum", "mean"):
            return super().reduce(tensor, reduction, scale)

        def reduced(t: Tensor) -> Tensor:
            every = self.gather(t.unsqueeze(0))
            return every.sum(0) if reduction == "sum" else every.mean(0)

        return recursively_apply(reduced, tensor, error_on_other_type=True)

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        state = copy.copy(accelerate.PartialState())
        state.num_processes, state.process_index = self.num_processes, self.process_index
        with state.split_between_processes(inputs, apply_padding=apply_padding) as mine:
            yield mine

    # ---- saving ----

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> str:
        """As accelerate's; the model and its optimizer are a checkpoint of fxpar in it, which any other plan can load."""
        optimizer = self._optimizer()
        with self._on_all_ranks("save_state"), self._without_model():
            folder = super().save_state(output_dir, safe_serialization, **options)
        save_checkpoint(Path(folder) / STATE, self.module, optimizer)
        return folder

    def load_state(self, input_dir: str | None = None, load_kwargs: dict | None = None, **options: Any) -> None:
        if input_dir is None:
            input_dir = self._newest()
        load_checkpoint(Path(input_dir) / STATE, self.module, self._optimizer())
        with self._on_all_ranks("load_state"), self._without_model():
            super().load_state(input_dir, load_kwargs, **options)

    def _newest(self) -> str:
        """The folder of the last `save_state` that was given none."""
        named = self.project_configuration.automatic_checkpoint_naming
        folders = {int(path.name.rpartition("_")[2]): path
                   for path in Path(self.project_dir or "", "checkpoints").glob("checkpoint_*") if named}
        if not folders:
            raise InputError("load_state needs the folder that save_state returned; without one it takes the newest that was "
                             "saved under ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True), and there is "
                             "none")
        return str(folders[max(folders)])

    @contextlib.contextmanager
    def _on_all_ranks(self, call: str) -> Iterator[None]:
        """Around what each rank does by itself. Raises: its own error on a rank that fails, and `FxparError` on all others."""
        control = self.module.parameter_store.control
        with control.watch.call(call):
            self._control = control
            try:
                with control.watch.busy(call):
                    yield
            except FxparError:  # another rank's, which all know
                raise
            except Exception as error:
                control.fail(error)
                raise
            finally:
                self._control = None
            control.together(lambda: None)

    def wait_for_everyone(self) -> None:
        if self._control is None:
            with watch().waits("Accelerator.wait_for_everyone"):
                super().wait_for_everyone()
        else:
            self._control.together(lambda: None)

    def _optimizer(self) -> torch.optim.Optimizer | None:
        if len(self._optimizers) > 1:
            raise InputError(f"save_state and load_state take one optimizer, and {len(self._optimizers)} were prepared: use "
                             "fxpar.save_checkpoint for each")
        return self._optimizers[0].optimizer if self._optimizers else None

    @contextlib.contextmanager
    def _without_model(self) -> Iterator[None]:
        """Inside, accelerate knows of no model and no optimizer, of which a rank has a part."""
        before = {name: getattr(self, name) for name in ("_models", "_optimizers")}
        self.__dict__.update(_models=[], _optimizers=[])
        try:
            yield
        finally:
            self.__dict__.update(before)

    def save_model(self, model: nn.Module, save_directory: str | os.PathLike, max_shard_size: Any = None,
                   safe_serialization: bool = True) -> None:
        """The plain model's safetensors, as `fxpar.export_safetensors` writes them. All ranks call."""
        if not safe_serialization or max_shard_size is not None:
            raise InputError("save_model of a parallel module writes safetensors; fxpar.export_safetensors has them in several "
                             "files, of max_file_bytes each")
        export_safetensors(save_directory, model)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
        """The plain model's, whole and on the CPU, on rank 0; {} elsewhere. All ranks call."""
        if not isinstance(model, ParallelModule):
            return super().get_state_dict(model, unwrap)
        with model.gathered(rank0_only=True, offload="cpu") as plain:
            return {} if plain is None else {name: t.detach().clone() for name, t in plain.state_dict().items()}


class _ReplicaScheduler(AcceleratedScheduler):
    """Steps `times` times where accelerate's steps once for each process."""

    def __init__(self, scheduler: Any, optimizers: Any, step_with_optimizer: bool, times: int):
        super().__init__(scheduler, optimizers, step_with_optimizer, split_batches=True)
        self._times = times

    def step(self, *args: Any, **kwargs: Any) -> None:
        often = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self._times if often else 1):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", self.scheduler._step_count):
                super().step(*args, **kwargs)
