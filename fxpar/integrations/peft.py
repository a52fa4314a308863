"""peft: adapters of a parallel module, under their own names and in peft's own files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from fxpar.checkpoint.ranks import LocalModel, alike, listed, place, together
from fxpar.errors import CheckpointError, InputError
from fxpar.run.module import ParallelModule


def save_adapters(path: str | os.PathLike, module: ParallelModule) -> None:
    """Write what `PeftModel.save_pretrained` would, the adapters and their configs, for `PeftModel.from_pretrained` to read.

    path: a folder that all ranks share. module: what `fxpar.parallelize` made of a `PeftModel`; all ranks call. Rank 0 gets what
    peft saves, one module after the other, and nothing of the base model that peft does not ask for.
    """
    model = _peft_model(module)
    with together("save_adapters", module, {"path": place(path)}):
        ranks = LocalModel(module).ranks
        names = alike(ranks, path, lambda: _saved_names(module, model))
    state: dict[str, Tensor] = {}
    for owner in sorted({name.rpartition(".")[0] for name in names}):
        with module.gathered(owner, rank0_only=True, offload="cpu") as part:
            if part is not None:
                own = {**part._parameters, **part._buffers}
                state |= {name: own[name.rpartition(".")[2]].detach().clone() for name in names
                          if name.rpartition(".")[0] == owner}

    def write() -> None:
        if ranks.rank == 0:
            with module.parameter_store.all_parameters():
                model.save_pretrained(os.fspath(path), state_dict=state)

    alike(ranks, path, write)


def load_adapters(path: str | os.PathLike, module: ParallelModule) -> None:
    """Fill the adapters of a module with those of a folder that `save_adapters` or peft wrote. All ranks call.

    Raises: `CheckpointError`, on all ranks alike and before anything is changed, if it has not these adapters.
    """
    model = _peft_model(module)
    with together("load_adapters", module, {"path": place(path)}):
        ranks = LocalModel(module).ranks
        found = alike(ranks, path, lambda: {adapter: _read(Path(path), module, model, adapter) for adapter in model.peft_config})
        with module.parameter_store.all_parameters():
            for adapter, weights in found.items():
                set_peft_model_state_dict(module, weights, adapter)


def _read(path: Path, module: ParallelModule, model: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file, which are those that the model has."""
    folder = path if adapter == "default" else path / adapter
    weights = load_peft_weights(str(folder), device="cpu")
    wanted = {name: tuple(t.shape) for name, t in _marks(module, model, adapter)[1].items()}
    odd = sorted(name for name in {*weights, *wanted}
                 if name not in weights or wanted.get(name, tuple(weights[name].shape)) != tuple(weights[name].shape))
    odd += sorted(weights.keys() - wanted.keys())
    if odd:
        raise CheckpointError(f"the model's adapter {adapter!r} and the one in the folder differ in {listed(odd)}", str(folder),
                              "make the model with the config in the folder: PeftModel.from_pretrained does")
    return weights


def _saved_names(module: ParallelModule, model: Any) -> list[str]:
    """The model's names of the tensors that peft saves; of all, if it computes what it saves from others."""
    names: set[str] = set()
    for adapter in model.peft_config:
        marks, saved = _marks(module, model, adapter)
        of = {id(mark): name for name, mark in marks.items()}
        if any(id(t) not in of for t in saved.values()):
            return sorted(marks)
        names |= {of[id(t)] for t in saved.values()}
    return sorted(names)


def _marks(module: ParallelModule, model: Any, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A tensor without values for each of the model's by its name, and those that peft saves by its own names."""
    store = module.parameter_store
    store.describe_absent()
    with store.all_parameters():
        marks = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
        return marks, get_peft_model_state_dict(model, marks, adapter)


def _peft_model(module: ParallelModule) -> Any:
    model = module.parameter_store.model if isinstance(module, ParallelModule) else module
    if not isinstance(module, ParallelModule) or not isinstance(model, peft.PeftModel):
        raise InputError(f"this takes what fxpar.parallelize made of a PeftModel, not {type(model).__name__}")
    return model
