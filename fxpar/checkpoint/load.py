"""`load_checkpoint`: what any plan saved, into a model under any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from fxpar.checkpoint import folder, huggingface
from fxpar.checkpoint.optimizer import OptimizerLoad
from fxpar.checkpoint.part import Part
from fxpar.checkpoint.planners import LoadPlanner, joined
from fxpar.checkpoint.ranks import LocalModel, alike
from fxpar.checkpoint.save import SUMMARY, finish_running
from fxpar.checkpoint.target import ModelLoad, SavedTensor
from fxpar.errors import CheckpointError


def load_checkpoint(path: str | os.PathLike, module: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Fill the model, and the optimizer if one is given, with what `save_checkpoint` wrote.

    module: a `ParallelModule` under any plan (every rank calls; it may have been made on the meta device), or a plain
    module. Each rank reads the files that hold something of its part. Floating dtypes are converted to the model's.
    optimizer: made from the module's parameters; it need not have stepped. A folder of Hugging Face safetensors is loaded
    as by `load_safetensors`.
    Raises: `CheckpointError`, on all ranks alike: before anything is changed if there is no checkpoint, a file is missing or
    truncated, it is of another model, or it has no state for this optimizer.
    """
    finish_running()
    given = folder.resolved(path)
    model = LocalModel(module)
    found = alike(model.ranks, given, lambda: _look(given, model.ranks.rank))
    if found is None:
        if optimizer is not None:
            raise CheckpointError("safetensors hold no optimizer state", str(given), "load the model alone")
        huggingface.load_safetensors(given, module)
        return
    _Load(found, model, optimizer).run()


def _look(path: Path, rank: int) -> Path | None:
    """The folder to read from, or None if it has Hugging Face's files; rank 0 checks that all data files are whole."""
    found = folder.newest(path)
    if found is None and huggingface.files(path):
        return None
    if found is None:
        half = folder.saving(path).exists()
        raise CheckpointError("there is no checkpoint" + (", only a save that was interrupted" if half else ""), str(path),
                              "save one with fxpar.save_checkpoint")
    if rank == 0:
        folder.check_files(found, folder.read_metadata(found))
    return found


class _Load:
    """One load, step by step; all ranks take each step before any takes the next."""

    def __init__(self, where: Path, model: LocalModel, optimizer: Optimizer | None):
        self.where, self.model, self.optimizer = where, model, optimizer
        self.summary: dict[str, Any] = {}
        self.optimizer_load: OptimizerLoad | None = None

    def run(self) -> None:
        parts = alike(self.model.ranks, self.where, self._prepare)
        alike(self.model.ranks, self.where, lambda: self._read(parts))
        alike(self.model.ranks, self.where, self._install)

    def _prepare(self) -> dict[str, Part]:
        """Check everything that can be checked without changing the model, and make room for what it has not yet."""
        self.metadata: Metadata = folder.read_metadata(self.where)
        entries = self.metadata.state_dict_metadata
        saved = {n.removeprefix("model."): SavedTensor(tuple(e.size), e.properties.dtype) for n, e in entries.items()
                 if n.startswith("model.") and isinstance(e, TensorStorageMetadata)}
        self.model_load = ModelLoad(self.model, saved, self.where)
        if joined(SUMMARY) in entries:
            self.summary = self._read({}, [joined(SUMMARY)])[joined(SUMMARY)]
        parts = {f"model.{name}": part for name, part in self.model_load.parts.items()}
        if self.optimizer is not None:
            state = self.summary.get("optimizer")
            if state is None:
                raise CheckpointError("it was saved without an optimizer", str(self.where), "load the model alone")
            self.optimizer_load = OptimizerLoad(self.optimizer, self.model, state, self.metadata, self.where)
            parts |= self.optimizer_load.parts
        return parts

    @torch.no_grad()
    def _read(self, parts: dict[str, Part], objects: list[str] | None = None) -> dict[str, Any]:
        reader, planner = FileSystemReader(self.where), LoadPlanner(parts, objects or [])
        planner.set_up_planner({}, self.metadata)
        reader.set_up_storage_reader(self.metadata, is_coordinator=False)
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
        return planner.objects

    def _install(self) -> None:
        self.model_load.install()
        if self.optimizer_load is not None:
            self.optimizer_load.install()
        dropout = self.summary.get("dropout")
        if dropout is not None and self.model.is_parallel:
            module: Any = self.model.module
            module.dropout_seeds.base, module.dropout_seeds.calls = dropout["seed"], dropout["steps"]
