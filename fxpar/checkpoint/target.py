"""Where a model's tensors are read to: which saved tensor fits which, and what a meta model still lacks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxpar.checkpoint.part import Part
from fxpar.checkpoint.ranks import LocalModel, listed
from fxpar.errors import CheckpointError
from fxpar.run import initialize


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file. dtype: None if it is one that this torch does not know."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class ModelLoad:
    """A model that is about to be filled. `parts`: by the name in the file, where each tensor is to be read to."""

    def __init__(self, model: LocalModel, saved: dict[str, SavedTensor], where: Path, spare: Collection[str] = ()):
        """spare: names in the file that the model need not have.

        Raises: `CheckpointError` if names, shapes or kinds of numbers differ, or the model cannot be filled.
        """
        self.model = model
        names = _match(model, saved, where, spare)
        parts = self._room(where)
        _check_shapes(parts, names, saved, where)
        self.parts = {names[n]: part for n, part in parts.items()}
        self.made |= _missing_buffers(model, where)

    def _room(self, where: Path) -> dict[str, Part]:
        """The model's parts, with memory for buffers that are on meta."""
        self.made: dict[str, Tensor] = {}
        on_meta = next((n for n, p in self.model.parameters.items() if p.is_meta), None)
        if on_meta is not None:
            raise CheckpointError(f"the model's parameter {on_meta} is on the meta device", str(where),
                                  "call model.to_empty(device=...) first, or parallelize it")
        parts = self.model.parts()
        for name, buffer in self.model.buffers.items():
            if buffer.is_meta:
                self.made[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.model.device)
                parts[name] = self.model.replicated(name, self.made[name])
        return parts

    def install(self) -> None:
        """Give the model the buffers that were made for it."""
        for name, buffer in self.made.items():
            for table, key in self.model.slots[name]:
                table[key] = buffer


def _match(model: LocalModel, saved: dict[str, SavedTensor], where: Path, spare: Collection[str]) -> dict[str, str]:
    """The name in the file of every tensor of the model: its first name, or another that it is tied to."""
    names = {n: next((a for a in model.aliases[n] if a in saved), n) for n in (*model.parameters, *model.buffers)}
    missing = [n for n, s in names.items() if s not in saved]
    extra = sorted(saved.keys() - set(names.values()) - set(spare) - model.elsewhere)
    said = [f"{what}: {listed(odd)}" for what, odd in (("it lacks tensors of the model", missing),
                                                       ("it has tensors that the model lacks", extra)) if odd]
    if said:
        raise CheckpointError(f"it is of another model: {'; '.join(said)}", str(where),
                              "build the model that was saved")
    return names


def _check_shapes(parts: dict[str, Part], names: dict[str, str], saved: dict[str, SavedTensor], where: Path) -> None:
    for name, part in parts.items():
        there = saved[names[name]]
        if there.shape != tuple(part.shape):
            raise CheckpointError(f"it is of another model: {name} has shape {there.shape} there and {tuple(part.shape)} in the "
                                  "model", str(where), "build the model that was saved")
        if there.dtype is None or not torch.can_cast(there.dtype, part.local.dtype):
            raise CheckpointError(f"{name} is {there.dtype or 'of an unknown dtype'} there and {part.local.dtype} in the model, "
                                  "which would lose what it says", str(where), "build the model with the saved dtype")


def _missing_buffers(model: LocalModel, where: Path) -> dict[str, Tensor]:
    """Values of buffers that are on meta and in no file, as the model's own initialisation makes them."""
    missing = [n for n, slots in model.slots.items() if n not in model.buffers and slots[0][0][slots[0][1]].is_meta]
    if not missing:
        return {}
    values = _initial_buffers(model.model, missing)
    left = next((n for n in missing if n not in values), None)
    if left is not None:
        raise CheckpointError(f"buffer {left} is on the meta device, no checkpoint has it (it is not persistent), and the "
                              "model's own initialisation does not fill it", str(where), "build the model on the CPU")
    return {n: v.to(model.device) for n, v in values.items()}


def _initial_buffers(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The buffers of these names as the model's own initialisation makes them; fewer if it does not fill all."""
    made: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        tape = initialize._Tape()
        fresh = dict(initialize._initialize(model, tape).named_buffers(remove_duplicate=False))
        for name in names:
            value = tape.play(fresh[name]) if fresh[name].is_meta else fresh[name]
            if value is not None and not (value.is_floating_point() and value.isnan().any()):
                made[name] = value
    return made
