"""A model as one process holds it, alone or as a rank of many, and how ranks come to one verdict."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control, digest
from fxpar.backends.transport.watch import NoWatch
from fxpar.checkpoint.part import Part
from fxpar.errors import CheckpointError, MismatchError, brief
from fxpar.run.module import ParallelModule
from fxpar.sharding.layout import Sharding
from fxpar.sharding.mesh import Mesh

T = TypeVar("T")


class OneProcess:
    """The `Control` of a process that shares its model with no other."""

    world, group, rank, kinds = 1, None, 0, 1
    watch = NoWatch()

    def exchange(self, thing: object) -> list:
        return [thing]

    def kind_of(self, rank: int) -> int:
        return 0

    def agree(self, call: str, given: Mapping[str, Any]) -> None:
        pass


RankControl = Control | OneProcess


def alike(ranks: RankControl, where: str | os.PathLike, function: Callable[[], T]) -> T:
    """What `function` returns on this rank. If it failed on any, the failure of the first of those is raised on all,
    as a `CheckpointError`."""
    error: CheckpointError | None = None
    try:
        with ranks.watch.busy(f"at {where}"):
            made = function()
    except CheckpointError as e:
        error = e
    except Exception as e:
        error = CheckpointError(f"{type(e).__name__}: {e}", str(where))
        error.__cause__ = e
    failed = [(r, e) for r, e in enumerate(ranks.exchange(error)) if e is not None]
    if failed:
        ranks.watch.all_know()
    if error is not None:
        raise error
    if failed:
        rank, other = failed[0]
        raise CheckpointError(other.what, f"{other.where} (on rank {rank})", other.way_out)
    return made


def same(ranks: RankControl, where: Path, what: str, thing: Mapping[str, Any]) -> None:
    """Raise on every rank unless all of a kind have the same `thing` (by its repr), in the same order."""
    everyone = {(ranks.kind_of(rank), found) for rank, found in enumerate(ranks.exchange(digest(repr(thing))))}
    if len(everyone) == ranks.kinds:
        return
    first: dict[int, tuple[int, dict[str, str]]] = {}
    for rank, theirs in enumerate(ranks.exchange({name: repr(value) for name, value in thing.items()})):
        one, mine = first.setdefault(ranks.kind_of(rank), (rank, theirs))
        name = next((n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n)), None)
        if name is not None:
            ranks.watch.all_know()
            raise CheckpointError(f"ranks differ in {what}: of {name}, rank {one} has {mine.get(name, 'nothing')} and rank "
                                  f"{rank} {theirs.get(name, 'nothing')}", str(where),
                                  "every rank must make the same call with the same state")
    ranks.watch.all_know()
    raise CheckpointError(f"ranks differ in the order of {what}", str(where),
                          "give the optimizer the parameters in the same order on every rank")


@contextlib.contextmanager
def together(call: str, module: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Around a call that all ranks have to make, and to give the same. Raises: `CheckpointError` on all if they do not."""
    ranks: RankControl = OneProcess()
    if isinstance(module, ParallelModule):
        ranks, given = module.parameter_store.control, {**given, "module": module.parameter_store.name}
    with ranks.watch.call(call):
        try:
            ranks.agree(call, given)
        except MismatchError as error:
            ranks.watch.all_know()
            raise CheckpointError(str(error), given["path"]) from error
        yield


def on_one_rank(call: str, path: str | os.PathLike, module: nn.Module, function: Callable[[], Any], is_it: bool) -> None:
    """Have one rank call `function`, or some; all ranks call this. Raises: `CheckpointError`, on all alike."""
    with together(call, module, {"path": place(path)}):
        ranks: RankControl = module.parameter_store.control if isinstance(module, ParallelModule) else OneProcess()
        alike(ranks, path, lambda: function() if is_it else None)


def require_alike(model: LocalModel, where: Path) -> None:
    """Raise on every rank if copies of a parameter or buffer differ: a checkpoint has one of them."""
    if isinstance(model.module, ParallelModule):
        try:
            model.module.require_alike()
        except MismatchError as error:
            model.ranks.watch.all_know()
            raise CheckpointError(str(error), str(where)) from error


def place(path: Any) -> str:
    """A path that was given to a call, for ranks to compare: they may run in different folders."""
    try:
        return os.path.abspath(path)
    except (TypeError, ValueError):
        return brief(path)


class LocalModel:
    """What this process holds of a model: a `ParallelModule` under its plan, or all of a plain module.

    parameters: under their first names, ties once. buffers: the persistent ones, likewise. aliases: for each of
    both its names. elsewhere: names of parameters that ranks of other kinds hold, and this one does not.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.is_parallel = isinstance(module, ParallelModule)
        if isinstance(module, ParallelModule):
            store = module.parameter_store
            self.model: nn.Module = store.model
            self.mesh, self.rank, self.device = store.mesh, store.rank, store.device
            self.ranks: RankControl = store.control
            self._layouts: dict[str, Sharding] = store.layouts
            self._owners, self.kind, self.elsewhere = store.owners, store.bound.kind, store.elsewhere
        elif isinstance(module, nn.Module):
            self.model, self.mesh, self.rank = module, Mesh((), ()), 0
            self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
            self.ranks, self._layouts = OneProcess(), {}
            self._owners, self.kind, self.elsewhere = {}, 0, set()
        else:
            raise TypeError(f"a checkpoint is of a torch.nn.Module, not {type(module).__name__}")
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.aliases: dict[str, list[str]] = {}
        first = {id(p): n for n, p in self.parameters.items()}
        for name, p in module.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(first[id(p)], []).append(name)
        self.buffers: dict[str, Tensor] = {}
        self.slots: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._find_buffers()

    def _find_buffers(self) -> None:
        first: dict[int, str] = {}
        for path, owner in self.module.named_modules():
            for key, b in owner._buffers.items():
                if b is None:
                    continue
                name = f"{path}.{key}" if path else key
                main = first.setdefault(id(b), name)
                self.slots.setdefault(main, []).append((owner._buffers, key))
                if key not in owner._non_persistent_buffers_set:
                    self.buffers[main] = b
                    self.aliases.setdefault(main, []).append(name)

    def counts(self, name: str) -> bool:
        """Whether a parameter or buffer is to be written by ranks of this kind, of those that hold it."""
        owners = (self._owners[alias] for alias in self.aliases.get(name, [name]) if alias in self._owners)
        return next(owners, 0) == self.kind

    def sharding(self, name: str) -> Sharding:
        """How a parameter lies on the ranks; anything else is replicated."""
        for alias in self.aliases.get(name, ()):
            if alias in self._layouts:
                return self._layouts[alias]
        return tuple(() for _ in self.parameters[name].shape)

    def part(self, name: str, tensor: Tensor) -> Part:
        """A parameter, or a tensor that is kept like it, as this rank holds it."""
        if isinstance(tensor, DTensor) and not self.is_parallel:
            raise CheckpointError(f"parameter {name} is a DTensor that fxpar did not make", "of a plain module",
                                  "save modules of FSDP2 and the like with torch.distributed.checkpoint")
        local = compat.local_part(tensor) if isinstance(tensor, DTensor) else tensor.detach()
        return Part(tensor.shape, local, self.sharding(name), self.mesh, self.rank)

    def replicated(self, name: str, tensor: Tensor) -> Part:
        """A tensor of which every rank has all."""
        return Part(tensor.shape, tensor.detach(), tuple(() for _ in tensor.shape), self.mesh, self.rank)

    def parts(self) -> dict[str, Part]:
        """The model's state: its parameters and persistent buffers."""
        return {n: self.part(n, p) for n, p in self.parameters.items()} | {
            n: self.replicated(n, b) for n, b in self.buffers.items()}

    def require_real(self, where: Path) -> None:
        """Raises `CheckpointError` if a parameter or persistent buffer is on the meta device."""
        on_meta = [n for n, t in {**self.parameters, **self.buffers}.items() if t.is_meta]
        if on_meta:
            raise CheckpointError(f"{on_meta[0]} is on the meta device", str(where),
                                  "fill the model first, with init_weights(seed), a checkpoint, or to_empty(device=...)")

    def gather(self, part: Part) -> Tensor:
        """The full tensor, on every rank."""
        if not isinstance(self.module, ParallelModule):
            return part.local
        return self.module.parameter_store.unsharded(part.local, part.shape, part.sharding)


def to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, with memory of its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def listed(names: list[str]) -> str:
    """A few of the names, and how many there are."""
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
