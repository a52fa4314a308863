"""gathered: the plain model, whole, for as long as a block of code lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxpar import compat
from fxpar.errors import InputError, MismatchError
from fxpar.progress import stage
from fxpar.run import alone, storage
from fxpar.run.store import ParameterStore
from fxpar.sharding.layout import Piece, Sharding
from fxpar.sharding.mesh import Mesh

Table = dict[str, Any]


@dataclass
class _HeldTensor:
    """A parameter or buffer: its names and where each is held (several, if it is tied), what is held there, and for a while.

    held: None where ranks of another kind hold it. meta: its shape and dtype.
    """

    names: list[str]
    held: Any
    meta: Tensor
    places: list[tuple[Table, str]] = field(default_factory=list)
    plain: Any = None

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.meta, nn.Parameter)

    def put(self, value: Any) -> None:
        for table, key in self.places:
            table[key] = value


@contextlib.contextmanager
def gathered(store: ParameterStore, part: nn.Module, rank0_only: bool, device: torch.device, write_back: bool) -> Iterator[Any]:
    """Inside, `part` of the store's model has plain parameters, whole ones; yields it. A collective of all ranks.

    rank0_only: ranks other than 0 keep what they have, and get None. device: where parameters and buffers are meanwhile.
    write_back: what rank 0 has after the block is there on all ranks; parameters that were put in are laid out like those whose
    names they have. One parameter at a time is in memory besides those that are kept.
    Raises: `MismatchError` on ranks whose block ended, if another's raised; `InputError` if modules or parameters were put in,
    and are not to be kept (the model is as it was), or cannot be.
    """
    mine = not rank0_only or store.control.rank == 0
    slots = _slots(store, part)
    with stage("gathering parameters"):
        _gather(store, slots, device, mine)
    tables = [(t, dict(t)) for m in part.modules() for t in (m._modules, m._parameters, m._buffers)] if mine else []
    changed: list[_HeldTensor] = []
    try:
        if mine:
            for slot in slots:
                slot.put(slot.plain)
        with alone.unguarded(store.model):
            yield part if mine else None
        changed = _changed(store, part, slots) if mine else []
    except Exception as error:
        _put_back(tables)
        store.control.exchange(f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        _put_back(tables)
        raise
    if write_back and mine:
        for slot in slots:
            for table, key in slot.places:
                if table.get(key) is slot.plain:
                    table[key] = slot.held
    else:
        _put_back(tables)
    with store.control.watch.call("the end of gathered"):
        errors = store.control.exchange(None)
    rank, failed = next(((r, e) for r, e in enumerate(errors) if e is not None), (0, None))
    if failed is not None:
        _put_back(tables)
        raise MismatchError(f"a block of `with module.gathered()` failed on rank {rank}: {failed}")
    if write_back:
        try:
            _require_alike(store, changed)
        except Exception:
            _put_back(tables)
            raise
        with stage("writing parameters back"):
            _write_back(store, slots, changed)
    elif changed:
        raise InputError(f"{changed[0].names[0]!r} was put into the model inside of `with module.gathered()`, and taken out "
                         "again behind it (a config that changed with it: not); write gathered(write_back=True) for it to stay")


def _slots(store: ParameterStore, part: nn.Module) -> list[_HeldTensor]:
    """The parameters and buffers of a part of the model, each once; in the same order on all ranks."""
    paths = {id(m): path for path, m in store.model.named_modules()}
    if id(part) not in paths:
        raise InputError(f"gathered() takes a part of the model, and this {type(part).__name__} is none")
    store.describe_absent()
    found: dict[int, _HeldTensor] = {}
    with store.all_parameters():
        first = {id(t): n for n, t in (*store.model.named_parameters(), *store.model.named_buffers())}
        for module in part.modules():
            for table in (module._parameters, module._buffers):
                for key, t in table.items():
                    if t is not None:
                        slot = found.setdefault(id(t), _HeldTensor([first[id(t)]], t, t))
                        slot.places.append((table, key))
                        slot.names.append(_name(paths[id(module)], key))
    for slot in found.values():
        if slot.is_parameter and slot.names[0] in store.elsewhere:
            slot.held = None
    return list(found.values())


def _name(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


@torch.no_grad()
def _gather(store: ParameterStore, slots: list[_HeldTensor], device: torch.device, keep: bool) -> None:
    """Make the plain tensors, on ranks that keep them."""
    bound = store.bound
    for slot in slots:
        if not slot.is_parameter:
            slot.plain = slot.held.to(device, copy=True) if keep else None
            continue
        owner = store.owners.get(slot.names[0], 0)
        if bound.kind == owner:
            local = compat.local_part(slot.held)
            full = store.unsharded(local, slot.meta.shape, store.layouts[slot.names[0]])
            full = full.clone() if full is local else full
        else:
            full = torch.empty(slot.meta.shape, dtype=slot.meta.dtype, device=store.device)
        if bound.across is not None:
            _broadcast(full, owner * bound.mesh.world_size + bound.rank, bound.across)
        if keep:
            slot.plain = nn.Parameter(full.to(device), slot.meta.requires_grad)
            slot.plain.__dict__.update(slot.meta.__dict__)


def _changed(store: ParameterStore, part: nn.Module, slots: list[_HeldTensor]) -> list[_HeldTensor]:
    """Parameters that the block put in, and those whose shape it changed."""
    paths = {id(m): path for path, m in store.model.named_modules()}
    same = {id(slot.plain) for slot in slots if slot.plain is not None and slot.plain.shape == slot.meta.shape}
    new: dict[int, _HeldTensor] = {}
    for module in part.modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in same:
                slot = new.setdefault(id(p), _HeldTensor([], None, p, plain=p))
                slot.places.append((module._parameters, key))
                slot.names.append(_name(paths[id(module)], key))
    return list(new.values())


def _put_back(tables: list[tuple[Table, Table]]) -> None:
    for table, before in tables:
        table.clear()
        table.update(before)


def _require_alike(store: ParameterStore, changed: list[_HeldTensor]) -> None:
    """Raises: `MismatchError` or `InputError`, on all ranks, for parameters that were put in and cannot be kept."""
    everyone = store.control.exchange([(slot.names, tuple(slot.plain.shape)) for slot in changed])
    if any(of_rank != everyone[0] for of_rank in everyone):
        raise MismatchError("ranks put different parameters into the model inside of `with module.gathered()`: change parts of "
                            "the model on all ranks (rank0_only=False), and alike")
    if changed and store.bound.kinds > 1:
        raise InputError(f"{changed[0].names[0]!r} was put into a model that a pipeline runs, whose ranks have parts of it; "
                         "change the plain model, and parallelize it anew")


@torch.no_grad()
def _write_back(store: ParameterStore, slots: list[_HeldTensor], changed: list[_HeldTensor]) -> None:
    """Write what rank 0's block left to every rank's parts."""
    trained = store.control.exchange([slot.plain is not None and slot.plain.requires_grad for slot in slots])[0]
    gone = {id(slot.plain) for slot in changed}
    for slot, wants in zip(slots, trained, strict=True):
        if slot.plain is not None and id(slot.plain) in gone:
            continue
        full = _of_rank_0(store, slot)
        if slot.held is not None and slot.is_parameter:
            slot.held.copy_(storage.distribute(full, store.layouts[slot.names[0]], store.bound, store.device))
            slot.held.requires_grad_(wants)
        elif slot.held is not None:
            slot.held.copy_(full)
    for slot in changed:
        old = next((store.layouts[n] for n in slot.names if n in store.layouts), tuple(() for _ in slot.meta.shape))
        sharding = _fitted(old, slot.meta.shape, store.mesh)
        full = nn.Parameter(_of_rank_0(store, slot), slot.plain.requires_grad)
        slot.put(storage.parameter(full, sharding, store.bound, store.device))
        store.layouts.update(dict.fromkeys(slot.names, sharding))


def _of_rank_0(store: ParameterStore, slot: _HeldTensor) -> Tensor:
    """What rank 0's block left, on every rank."""
    given = slot.plain if slot.plain is not None else torch.empty(slot.meta.shape, dtype=slot.meta.dtype, device=store.device)
    full = given.detach().to(store.device).contiguous()
    if store.control.world > 1:
        _broadcast(full, 0, None)
    return full


def _fitted(sharding: Sharding, shape: torch.Size, mesh: Mesh) -> Sharding:
    """The sharding of a parameter of another shape: each dim is split over the axes that split it before, if it divides."""
    out = []
    for i, size in enumerate(shape):
        axes = tuple(a for piece in (sharding[i] if len(sharding) == len(shape) else ()) for a in piece.axes)
        out.append((Piece(size, axes),) if axes and size % mesh.size(*axes) == 0 else ())
    return tuple(out)


def _broadcast(t: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
    if t.numel():
        dist.broadcast(t.reshape(-1).view(torch.uint8), source, group)
