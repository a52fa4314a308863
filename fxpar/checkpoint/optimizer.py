"""An optimizer's state by parameter name, whatever the optimizer: what its tensors are, and how they are put back.

A tensor of its parameter's shape is kept like the parameter, in parts; everything else (a count of steps) is replicated
on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.checkpoint.part import Part
from fxpar.checkpoint.planners import Key, joined
from fxpar.checkpoint.ranks import LocalModel, listed, to_cpu
from fxpar.errors import CheckpointError
from fxpar.run.module import ParallelModule
from fxpar.sharding import chunks

NOT_SAVED = ("params", "param_names")
OF_THE_RUN = ("foreach", "fused", "capturable", "differentiable")
"""Options that say how an optimizer computes, not what: the one that loads keeps its own."""


def names_of(optimizer: Optimizer, model: LocalModel, where: Path) -> list[list[str]]:
    """The names of the parameters of each group. Raises `CheckpointError` for one that is not the model's."""
    name = {id(p): n for n, p in model.parameters.items()}
    out = []
    for i, group in enumerate(optimizer.param_groups):
        foreign = next((p for p in group["params"] if id(p) not in name), None)
        if foreign is not None:
            raise CheckpointError(f"group {i} of the optimizer has a tensor of shape {tuple(foreign.shape)} that is no "
                                  "parameter of the model", str(where),
                                  "make the optimizer from the parameters of the module that parallelize returned")
        out.append([name[id(p)] for p in group["params"]])
    return out


def saved_state(optimizer: Optimizer, model: LocalModel, where: Path) -> tuple[dict[Key, Part], dict[str, Any]]:
    """The state's tensors, and a summary of all else: groups with their options, numbers, and which tensors there are."""
    groups = names_of(optimizer, model, where)
    parts: dict[Key, Part] = {}
    tensors: dict[str, list[str]] = {}
    values: dict[str, dict[str, Any]] = {}
    for name in (n for group in groups for n in group):
        for key, value in optimizer.state.get(model.parameters[name], {}).items():
            if isinstance(value, Tensor):
                parts["optimizer", name, key] = _part(model, name, key, value, where)
                tensors.setdefault(name, []).append(key)
            elif any(isinstance(leaf, DTensor) for leaf in pytree.tree_leaves(value)):
                raise CheckpointError(f"state {key!r} of parameter {name} nests sharded tensors", str(where),
                                      "optimizers whose state is flat can be saved")
            else:
                values.setdefault(name, {})[key] = value
    options = [{k: _detached(v) for k, v in g.items() if k not in NOT_SAVED} for g in optimizer.param_groups]
    return parts, {
        "class": type(optimizer).__name__,
        "defaults": sorted(optimizer.defaults),
        "groups": [{"parameters": g, "options": o} for g, o in zip(groups, options, strict=True)],
        "tensors": tensors,
        "values": values,
    }


def merged(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of those of all ranks, each of which speaks of the parameters that it holds: group by group, by name."""
    made = {**summaries[0], "groups": [], "tensors": {}, "values": {}}
    for summary in summaries:
        made["tensors"] |= summary["tensors"]
        made["values"] |= summary["values"]
        for i, group in enumerate(summary["groups"]):
            if i == len(made["groups"]):
                made["groups"].append({"parameters": [], "options": group["options"]})
            known = made["groups"][i]["parameters"]
            known += [n for n in group["parameters"] if n not in set(known)]
    return made


def _detached(option: Any) -> Any:
    return to_cpu(option) if isinstance(option, Tensor) else option


def _part(model: LocalModel, name: str, key: str, value: Tensor, where: Path) -> Part:
    parameter = model.parameters[name]
    if isinstance(value, DTensor):
        local = compat.local_part(value)
        if key != "step" and value.shape == parameter.shape and local.shape == compat.local_part(parameter).shape:
            return model.part(name, value)
        if all(p.is_replicate() for p in value.placements):
            return model.replicated(name, local)
        raise CheckpointError(f"state {key!r} of parameter {name} is sharded, but not like its parameter", str(where))
    return model.replicated(name, value)


class OptimizerLoad:
    """An optimizer's state on its way back. `parts`, by name in the file, is where the tensors are to be read to."""

    def __init__(self, optimizer: Optimizer, model: LocalModel, saved: dict[str, Any], metadata: Metadata, where: Path):
        """Raises: `CheckpointError` if the optimizer is of another kind, or has other parameters or groups."""
        self.optimizer, self.model = optimizer, model
        self.names = names_of(optimizer, model, where)
        self._check_kind(saved, where)
        self.options = _regrouped(self.names, saved["groups"], model.elsewhere, where)
        self.parts: dict[str, Part] = {}
        self.state: dict[str, dict[str, Callable[[], Any]]] = {}
        for name in (n for group in self.names for n in group):
            for key, value in saved["values"].get(name, {}).items():
                self.state.setdefault(name, {})[key] = functools.partial(_itself, value)
            for key in saved["tensors"].get(name, ()):
                self._make(name, key, metadata)

    def _check_kind(self, saved: dict[str, Any], where: Path) -> None:
        mine = type(self.optimizer).__name__
        if mine != saved["class"] and sorted(self.optimizer.defaults) != saved["defaults"]:
            raise CheckpointError(f"it has the state of {saved['class']}, not of {mine}", str(where),
                                  f"load into {saved['class']}, or load the model alone")

    def _make(self, name: str, key: str, metadata: Metadata) -> None:
        """An empty tensor for one that was saved, made as the optimizer would have made it."""
        entry = joined(("optimizer", name, key))
        shape, dtype = metadata.state_dict_metadata[entry].size, metadata.state_dict_metadata[entry].properties.dtype
        parameter = self.model.parameters[name]
        if key == "step" or shape != parameter.shape:
            local = torch.zeros(shape, dtype=dtype)
            self.parts[entry] = self.model.replicated(name, local)
            self.state.setdefault(name, {})[key] = functools.partial(_itself, local)
            return
        like = self.model.part(name, parameter)
        if dtype.is_floating_point and parameter.is_floating_point():
            dtype = parameter.dtype
        part = Part(shape, torch.empty(chunks.part_shape(like.runs), dtype=dtype, device=like.local.device), like.sharding,
                    like.mesh, like.rank)
        self.parts[entry] = part
        self.state.setdefault(name, {})[key] = functools.partial(self._as_parameter, part)

    def _as_parameter(self, part: Part) -> Tensor:
        module = self.model.module
        if isinstance(module, ParallelModule):
            return module.parameter_store.wrap(part.local, part.shape, part.sharding)
        return part.local

    def install(self) -> None:
        """Put state and options into the optimizer, as its `load_state_dict` does."""
        number = {n: i for i, n in enumerate(n for group in self.names for n in group)}
        state = {number[n]: {k: make() for k, make in made.items()} for n, made in self.state.items()}
        groups = []
        for group, names, saved in zip(self.optimizer.param_groups, self.names, self.options, strict=True):
            options = {k: v for k, v in group.items() if k not in NOT_SAVED}
            options |= {k: _like(v, options.get(k)) for k, v in saved.items() if k not in OF_THE_RUN}
            groups.append({**options, "params": [number[n] for n in names]})
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _itself(value: Any) -> Any:
    return value


def _like(saved: Any, mine: Any) -> Any:
    """A saved option as a tensor or a number, as the optimizer has it now."""
    if isinstance(mine, Tensor):
        return torch.as_tensor(saved, dtype=mine.dtype, device=mine.device)
    return saved.item() if isinstance(saved, Tensor) and isinstance(mine, int | float) else saved


def _regrouped(names: list[list[str]], saved: list[dict[str, Any]], elsewhere: set[str], where: Path) -> list[dict[str, Any]]:
    """The saved options of each group. Other groups of the same parameters are fine where those of one group had the
    same options. elsewhere: parameters that other ranks hold."""
    options = {n: (i, g["options"]) for i, g in enumerate(saved) for n in g["parameters"] if n not in elsewhere}
    mine = {n for group in names for n in group}
    for what, odd in (("were not saved", mine - options.keys()), ("it does not have", options.keys() - mine)):
        if odd:
            raise CheckpointError(f"the optimizer has other parameters than the one that was saved; {what}: "
                                  f"{listed(sorted(odd))}", str(where), "load the model alone")
    out: list[dict[str, Any]] = []
    for i, group in enumerate(names):
        found = {options[n][0]: options[n][1] for n in group}
        plain = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in o.items()} for o in found.values()]
        if any(p != plain[0] for p in plain):
            differ = sorted(k for k in plain[0] if any(p.get(k) != plain[0][k] for p in plain))
            raise CheckpointError(f"group {i} of the optimizer joins parameters that were saved with different "
                                  f"{', '.join(differ)}", str(where), "group the parameters as they were when they were saved")
        out.append(next(iter(found.values()), {}))
    return out
