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
    peft saves, one module after the other; the whole model only where peft computes what it saves (prompts).
    """
    model = _peft_model(module)
    with together("save_adapters", module, {"path": place(path)}):
        ranks = LocalModel(module).ranks
        names = alike(ranks, path, lambda: _saved_names(module, model))
    if names is None:
        with module.gathered(rank0_only=True, offload="cpu") as plain:
            if plain is not None:
                plain.save_pretrained(os.fspath(path))
        return
    state = _gathered(module, names)

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
        prompts = any(config.is_prompt_learning for config in model.peft_config.values())
        if not prompts:
            with module.parameter_store.all_parameters():
                for adapter, weights in found.items():
                    set_peft_model_state_dict(module, weights, adapter)
    if prompts:
        with module.gathered(write_back=True) as plain:
            for adapter, weights in found.items():
                set_peft_model_state_dict(plain, weights, adapter)


def _read(path: Path, module: ParallelModule, model: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file, which are those that the model has."""
    folder = path if adapter == "default" else path / adapter
    weights = load_peft_weights(str(folder), device="cpu")
    saved = _marks(module, model, adapter)[1]
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (weights, weights if saved is None else saved)]
    odd = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        raise CheckpointError(f"the model's adapter {adapter!r} and the one in the folder differ in {listed(odd)}", str(folder),
                              "make the model with the config in the folder: PeftModel.from_pretrained does")
    return weights


def _gathered(module: ParallelModule, names: list[str]) -> dict[str, Tensor]:
    """The whole tensors of these names, on the CPU of rank 0."""
    state: dict[str, Tensor] = {}
    keys: dict[str, list[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        keys.setdefault(owner, []).append(key)
    for owner in sorted(keys):
        with module.gathered(owner, rank0_only=True, offload="cpu") as part:
            if part is not None:
                tensors = {**part._parameters, **part._buffers}
                state |= {f"{owner}.{key}": tensors[key].detach().clone() for key in keys[owner]}
    return state


def _saved_names(module: ParallelModule, model: Any) -> list[str] | None:
    """The model's names of the tensors that peft saves; None if it computes what it saves from others."""
    names: set[str] = set()
    for adapter in model.peft_config:
        marks, saved = _marks(module, model, adapter)
        of = {id(mark): name for name, mark in marks.items()}
        if saved is None or any(id(t) not in of for t in saved.values()):
            return None
        names |= {of[id(t)] for t in saved.values()}
    return sorted(names)


def _marks(module: ParallelModule, model: Any, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """A tensor without values for each of the model's, by its name; and those that peft saves, by its own names, unless it runs
    a module for them."""
    store = module.parameter_store
    store.describe_absent()
    with store.all_parameters():
        marks = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
        prompts = model.peft_config[adapter].is_prompt_learning
        return marks, None if prompts else get_peft_model_state_dict(model, marks, adapter)


def _peft_model(module: ParallelModule) -> Any:
    model = module.parameter_store.model if isinstance(module, ParallelModule) else module
    if not isinstance(module, ParallelModule) or not isinstance(model, peft.PeftModel):
        raise InputError(f"this takes what fxpar.parallelize made of a PeftModel, not {type(model).__name__}")
    return model
