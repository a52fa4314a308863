"""Hugging Face's `Trainer` around a parallel module: its losses, gradients and files are those of one process."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils.generic import can_return_loss, find_labels

from fxpar.checkpoint import export_safetensors, load_checkpoint, load_safetensors, save_checkpoint
from fxpar.checkpoint.ranks import on_one_rank
from fxpar.errors import InputError, PlanError
from fxpar.integrations.accelerate import STATE, Accelerator
from fxpar.run.module import ParallelModule

ALIKE = ("seed", "data_seed", "full_determinism", "num_train_epochs", "max_steps", "per_device_train_batch_size",
         "per_device_eval_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy",
         "learning_rate", "optim", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "logging_strategy", "logging_steps",
         "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps")
"""Arguments that have to be the same on all ranks: replicas with other seeds have rows of other orders, some of them twice."""
_Mixed: Any = object
"""Some class derived from `transformers.Trainer`."""


class OnReplicas(_Mixed):
    """What makes a class derived from Hugging Face's `Trainer` train a parallel module: ``class Mine(OnReplicas, SFTTrainer)``.

    model: what `fxpar.parallelize` returned. `per_device_train_batch_size` is that of a *replica*, all of whose ranks get the
    same rows. A loss is divided by the labels of all replicas and accumulation steps, gradients are clipped by their joint norm,
    predictions are gathered once from each replica, and rows that fill up the last batch of an evaluation do not count. A
    checkpoint has the plain model (`from_pretrained` reads it) and, in a folder "fxpar", what any plan can resume.
    """

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **options: Any):
        _check(model, args)
        super().__init__(model, args, *more, **options)
        plain = _plain(model)
        self.model_accepts_loss_kwargs = getattr(plain, "accepts_loss_kwargs", any(
            p.kind == inspect.Parameter.VAR_KEYWORD for p in inspect.signature(plain.forward).parameters.values()))
        self.label_names = find_labels(type(plain)) if self.args.label_names is None else self.args.label_names
        self.can_return_loss = can_return_loss(type(plain))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator: Any = Accelerator.of(self.accelerator, self.model)
        self.gather_function: Any = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object)

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.model.replica.count

    def floating_point_ops(self, inputs: Any) -> int:
        """This rank's share: the Trainer adds up those of all ranks."""
        return super().floating_point_ops(inputs) // (self.model.plan.tp * self.model.plan.cp)

    # ---- ranks ----

    def train(self, *args: Any, **options: Any) -> Any:
        control = self.model.parameter_store.control
        with control.watch.call("Trainer.train"):
            rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else "any number of"
            control.agree("Trainer.train", {name: getattr(self.args, name, None) for name in ALIKE} | {"rows": rows})
        return super().train(*args, **options)

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        with self.model.parameter_store.control.watch.waits("the Trainer's log"):
            super()._maybe_log_save_evaluate(*args, **options)

    # ---- losses ----

    @property
    def _own_loss(self) -> bool:
        """Whether the Trainer computes losses, from outputs of a replica's rows, and not the model, from those of all."""
        return self.label_smoother is not None or self.compute_loss_func is not None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.compute_loss_func is not None or (self._own_loss and "labels" not in inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._own_loss:
            return self._smoothed(model, dict(inputs), return_outputs, num_items_in_batch)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        return super().compute_loss(model, inputs, return_outputs)

    def _smoothed(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        """The loss of smoothed labels: as the Trainer's, which asks a model's class whether it shifts them."""
        labels, outputs = inputs.pop("labels"), model(**inputs)
        loss = self.label_smoother(outputs, labels, num_items_in_batch=num_items_in_batch,
                                   shift_labels=type(_plain(self.model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        if num_items_in_batch is not None:
            loss = loss * self.model.replica.count
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        if self.model.plan.pp > 1 and not prediction_loss_only:
            raise InputError("predictions of a pipeline are on the ranks of its last stage alone: evaluate the loss (without "
                             "compute_metrics, or with prediction_loss_only=True), or predict under a plan without pp")
        loss, logits, labels = super().prediction_step(model, self._counted(inputs), prediction_loss_only, ignore_keys)
        if loss is not None and self._own_loss:
            loss = self.accelerator.reduce(loss, "mean")
        return loss, pytree.tree_map_only(DTensor, DTensor.full_tensor, logits), labels

    def _counted(self, inputs: Any) -> Any:
        """The batch, without the labels of rows that accelerate repeats to fill up the last one."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if not state.end_of_dataloader or state.remainder <= 0 or not isinstance(labels, Tensor):
            return inputs
        rows = len(labels)
        real = min(max(state.remainder - self.model.replica.index * rows, 0), rows)
        if state.remainder == rows * self.model.replica.count:
            return inputs
        if labels.is_floating_point():
            filled = rows * self.model.replica.count - state.remainder
            raise InputError(f"{filled} rows are repeated to fill up the last batch of this evaluation, and labels of floating-"
                             "point numbers cannot say that they do not count: use a dataset that divides by the batches of all "
                             "replicas, or dataloader_drop_last=True")
        labels = labels.clone()
        labels[real:] = -100
        return {**inputs, "labels": labels}

    # ---- files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The plain model, as `save_pretrained` would write it (adapters alone, if it is peft's), and what belongs to it. All
        ranks call."""
        folder = Path(output_dir or self.args.output_dir)
        save_pretrained(folder, self.model)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

        self._write("save_model", folder, write)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_checkpoint(Path(output_dir) / STATE, self.model, self.optimizer.optimizer)
        self._write("the scheduler's save", Path(output_dir), lambda: torch.save(
            self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME))

    def _write(self, call: str, folder: Path, write: Callable[[], Any]) -> None:
        """What the rank that saves writes besides the model. Raises: `CheckpointError`, on all ranks alike."""
        on_one_rank(call, folder, self.model, write, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_pretrained(resume_from_checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_checkpoint(Path(checkpoint) / STATE, self.model, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        load_pretrained(self.state.best_model_checkpoint, self.model)


class Trainer(OnReplicas, transformers.Trainer):
    """Hugging Face's, for a model that `fxpar.parallelize` returned; see `OnReplicas`."""


def save_pretrained(path: str | os.PathLike, module: ParallelModule) -> None:
    """Write what `from_pretrained` reads: the plain model's safetensors and configs; of peft's the adapters. All ranks call."""
    if hasattr(module, "peft_config"):
        from fxpar.integrations.peft import save_adapters

        return save_adapters(path, module)
    export_safetensors(path, module)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        on_one_rank("save_pretrained", path, module, lambda: generation.save_pretrained(path), torch.distributed.get_rank() == 0)


def load_pretrained(path: str | os.PathLike, module: ParallelModule) -> None:
    """Fill a module with what `save_pretrained` wrote. All ranks call."""
    if hasattr(module, "peft_config"):
        from fxpar.integrations.peft import load_adapters

        return load_adapters(path, module)
    load_safetensors(path, module)


def _check(model: Any, args: Any) -> None:
    """Raises: `InputError`, `PlanError`, which say why this Trainer cannot train this model as one process would."""
    if not isinstance(model, ParallelModule):
        raise InputError(f"fxpar's Trainer trains what fxpar.parallelize returned, not {type(model).__name__}, and takes no "
                         "model_init: write model=fxpar.parallelize(model, plan)")
    plan = model.plan
    if plan.microbatches > 1 and plan.pp == 1:
        raise PlanError("microbatches", plan.microbatches, "has train_step run a step in parts, and the Trainer has parts of its "
                        "own", "TrainingArguments(gradient_accumulation_steps=...), which has the loss of the whole batch, too")
    if args is None:
        return
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise PlanError("average_tokens_across_devices", False, "would divide by the labels of one replica, and a loss is that "
                        "of all", "average_tokens_across_devices=True, the default")
    if args.train_sampling_strategy == "batch_rebalance":
        raise PlanError("train_sampling_strategy", args.train_sampling_strategy, "gives ranks batches of different shapes",
                        "another strategy")


def _plain(model: ParallelModule) -> Any:
    """The user's model; of peft's, the one that has adapters in it."""
    plain: Any = model.parameter_store.model
    return plain.get_base_model() if hasattr(plain, "get_base_model") else plain
