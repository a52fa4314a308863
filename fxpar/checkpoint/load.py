"""`load_checkpoint`: what any plan saved, into a model under any other."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from fxpar.checkpoint import folder, huggingface, staged
from fxpar.checkpoint.optimizer import OptimizerLoad, require_sound
from fxpar.checkpoint.planners import joined
from fxpar.checkpoint.ranks import LocalModel, alike, place, together
from fxpar.checkpoint.save import SUMMARY, finish_running
from fxpar.checkpoint.source import OpenedFolder, identity_of
from fxpar.checkpoint.target import ModelLoad, SavedTensor
from fxpar.errors import CheckpointError
from fxpar.progress import stage

ATTEMPTS = 50
"""How often a load begins anew because a save replaced the checkpoint; each time there is a whole one."""

_log = logging.getLogger("fxpar")


def load_checkpoint(path: str | os.PathLike, module: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Fill the model, and the optimizer if one is given, with what `save_checkpoint` wrote.

    path: the folder. module: a `ParallelModule` under any plan (every rank calls; it may have been made on the meta device), or
    a plain module. Each rank reads the files that hold something of its part. Floating dtypes are converted to the model's.
    optimizer: made from the module's parameters; it need not have stepped. A folder of Hugging Face safetensors is loaded
    as by `load_safetensors`.

    Nothing in the folder is run, and everything is read and checked, against its checksums, before the model is written to: for
    that each rank needs memory on the host for its part of the model. A folder that a save replaces meanwhile is read as it
    was, or as it is then, by all ranks alike. One without checksums, of an earlier version, is loaded with a logged warning.
    Raises: `CheckpointError`, on all ranks alike and before anything is changed: if there is no checkpoint, a file is
    missing or damaged, it is of another model, a value does not fit the model's dtype, or it has no state for this optimizer.
    """
    given = {"path": place(path), "optimizer": optimizer and type(optimizer).__name__}
    with stage(f"loading {path}"), together("load_checkpoint", module, given):
        finish_running()
        _load_newest(path, LocalModel(module), optimizer)


def _load_newest(path: str | os.PathLike, model: LocalModel, optimizer: Optimizer | None) -> None:
    given = alike(model.ranks, path, lambda: folder.resolved(path))
    for attempt in range(ATTEMPTS):
        source = alike(model.ranks, given, lambda: _look(given))
        with source or contextlib.nullcontext():
            try:
                _load(given, source, model, optimizer)
                return
            except CheckpointError:
                replaced = source is not None and _is_replaced(given, source)
                if not any(model.ranks.exchange(replaced)) or attempt == ATTEMPTS - 1:
                    raise


def _load(given: Path, source: OpenedFolder | None, model: LocalModel, optimizer: Optimizer | None) -> None:
    found = model.ranks.exchange(source and source.digest)
    if len(set(found)) > 1:
        raise CheckpointError("ranks found different checkpoints", str(given), "load when no save is under way")
    if source is not None:
        _Load(source, model, optimizer).run()
    elif optimizer is not None:
        raise CheckpointError("safetensors hold no optimizer state", str(given), "load the model alone")
    else:
        huggingface.load_safetensors(given, model.module)


def _look(path: Path) -> OpenedFolder | None:
    """The checkpoint, opened, or None if there are Hugging Face's files."""
    for attempt in range(ATTEMPTS):
        found, identity = folder.newest(path), _identity(path)
        if found is not None:
            try:
                return OpenedFolder(found)
            except CheckpointError as error:
                renamed = isinstance(error.__cause__, FileNotFoundError)  # it was there, and has its identity still
                if attempt == ATTEMPTS - 1 or (not renamed and _identity(path) == identity):
                    raise
        elif huggingface.files(path):
            return None
        elif not folder.previous(path).exists() and not path.exists():
            break
        time.sleep(0.001)  # the renames of a save take no longer
    half = folder.saving(path).exists()
    raise CheckpointError("there is no checkpoint" + (", only a save that was interrupted" if half else ""), str(path),
                          "save one with fxpar.save_checkpoint")


def _is_replaced(path: Path, source: OpenedFolder) -> bool:
    """Whether the newest checkpoint is another folder than the one that was opened."""
    for _ in range(ATTEMPTS):
        found = _identity(path)
        if found is not None:
            return found != source.identity
        time.sleep(0.001)  # it was looked for between the renames of a save
    return False


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Which folder the newest checkpoint is, whatever its name."""
    found = folder.newest(path)
    with contextlib.suppress(OSError):
        return None if found is None else identity_of(os.stat(found))
    return None


class _Load:
    """One load, step by step; all ranks take each step before any takes the next."""

    def __init__(self, source: OpenedFolder, model: LocalModel, optimizer: Optimizer | None):
        self.source, self.where, self.model, self.optimizer = source, source.folder, model, optimizer
        self.summary: dict[str, Any] = {}
        self.optimizer_load: OptimizerLoad | None = None

    def run(self) -> None:
        alike(self.model.ranks, self.where, self._prepare)
        alike(self.model.ranks, self.where, self._read)
        alike(self.model.ranks, self.where, self._install)

    def _prepare(self) -> None:
        """Check everything that can be checked without reading tensors, and make room for what is to be read."""
        if self.model.ranks.rank == 0:
            self.source.check_files()
            if not self.source.summed:
                _log.warning("checkpoint %s has no checksums (an earlier version wrote it): damage to its values would not be "
                             "noticed; save it again to have them", self.where)
        entries = self.source.metadata.state_dict_metadata
        saved = {n.removeprefix("model."): SavedTensor(tuple(e.size), e.properties.dtype) for n, e in entries.items()
                 if n.startswith("model.") and isinstance(e, TensorStorageMetadata)}
        self.model_load = ModelLoad(self.model, saved, self.where)
        if joined(SUMMARY) in entries:
            self.summary = self.source.value(joined(SUMMARY))
            require_sound(self.summary, self.where)
        self.staged = staged.stage({f"model.{name}": part for name, part in self.model_load.parts.items()})
        if self.optimizer is not None:
            state = self.summary.get("optimizer")
            if state is None:
                raise CheckpointError("it was saved without an optimizer", str(self.where), "load the model alone")
            self.optimizer_load = OptimizerLoad(self.optimizer, self.model, state, self.source.metadata, self.where)

    def _read(self) -> None:
        staged.read(self.source, {name: each.part for name, each in self.staged.items()})
        if self.optimizer_load is not None:
            staged.read(self.source, self.optimizer_load.parts)

    def _install(self) -> None:
        """Nothing is left that a checkpoint could be wrong about."""
        if self.optimizer_load is not None:
            self.optimizer_load.install()
        staged.fill(self.staged.values())
        self.model_load.install()
        dropout = self.summary.get("dropout")
        if dropout is not None and self.model.is_parallel:
            module: Any = self.model.module
            module.dropout_seeds.base, module.dropout_seeds.calls = dropout["seed"], dropout["steps"]
