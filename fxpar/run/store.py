"""store: a model's parameters in the layouts of a plan, on one rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.errors import InputError, MismatchError
from fxpar.model import identity
from fxpar.program import Program
from fxpar.run import alone, storage
from fxpar.run.feed import ModuleSlot
from fxpar.sharding.facts import full_value, sharding_at
from fxpar.sharding.layout import Sharding
from fxpar.sharding.mesh import BoundMesh


class ParameterStore:
    """What this rank holds of a model, and where.

    model: the user's, whose parameters are DTensors once `adopt` was called. name: of the module, on all ranks. mesh, rank: see
    `BoundMesh`. layouts: how each
    parameter is split over the ranks of a kind, by its name. places: the table of a module, and the key in it, of every parameter
    and buffer, by its name. owners: the kind of ranks that a parameter or buffer counts for, of those that hold it, where there
    are several kinds. elsewhere: names of parameters that ranks of other kinds hold, and this one does not.
    shared: name of a parameter that several kinds hold -> the group over which its gradients are to be summed.
    """

    def __init__(self, model: nn.Module, bound: BoundMesh, control: Control, device: torch.device, name: str | None = None):
        self.model, self.bound, self.control, self.device = model, bound, control, device
        self.name = control.name_of_module(type(model).__name__) if name is None else name
        self.mesh, self.rank = bound.mesh, bound.rank
        self.runtime = GroupRuntime(bound)
        self.layouts: dict[str, Sharding] = {}
        self.places: dict[str, ModuleSlot] = {}
        self.owners: dict[str, int] = {}
        self.elsewhere: set[str] = set()
        self._absent: list[tuple[dict[str, Any], str, str]] = []
        self._standing_in: dict[str, nn.Parameter] = {}
        self.shared: dict[str, dist.ProcessGroup] = {}
        self._tables: list[dict[str, Any]] = [{"not counted yet": None}]
        self._parts: tuple[list[str], list[Any]] = [], []
        self._counted: dict[nn.Parameter, bool] = {}
        self._unfilled: list[str] = []
        """Names of what was on the meta device, until a call finds it filled."""

    def adopt(self, programs: Sequence[Sequence[Program]]) -> None:
        """Have DTensors in the layouts that programs want take the place of the model's parameters.

        programs: those that each kind of ranks runs. A parameter that other kinds' programs use, and this rank's do not, is
        None on this rank; what no program uses, every rank holds all of.
        Raises: `MismatchError` if parameters have gradients already on some ranks, and on others not.
        """
        self._require_same_gradients()
        holders: dict[str, list[int]] = {}
        for kind, program in ((kind, program) for kind, its in enumerate(programs) for program in its):
            for node, source in program.source_of().items():
                if source.kind == "param":
                    self.layouts[source.name] = sharding_at(node)
                    if node.users and kind not in holders.setdefault(source.name, []):
                        holders[source.name].append(kind)
            self.owners |= {s.name: kind for s in program.sinks if s.kind == "buffer"}
        self.owners |= {name: kinds[0] for name, kinds in holders.items()}
        self.shared = {name: self.bound.among(tuple(kinds)) for name, kinds in holders.items() if len(kinds) > 1}
        tied = programs[0][0].tied
        made: dict[int, tuple[nn.Parameter, nn.Parameter | None]] = {}
        for path, module in self.model.named_modules():
            for key, p in module._parameters.items():
                if p is None:
                    continue
                name = _name(path, key)
                first = tied.get(name, name)
                mine = self.bound.kind in holders.get(first, [self.bound.kind])
                if id(p) not in made and mine and p.is_meta:
                    self._unfilled.append(name)
                if id(p) not in made and mine:
                    made[id(p)] = p, self._parameter(name, p, self.layouts.setdefault(first, tuple(() for _ in p.shape)))
                elif id(p) not in made:
                    self._help_others(p)
                    made[id(p)] = p, None
                    self._standing_in[first] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
                if not mine:
                    self.elsewhere.add(name)
                    self._absent.append((module._parameters, key, first))
                module._parameters[key] = made[id(p)][1]
            for key, b in module._buffers.items():
                if b is not None and b.is_meta:
                    self._unfilled.append(_name(path, key))
                elif b is not None:
                    module._buffers[key] = self._of_rank_0(b)
            for table in (module._parameters, module._buffers):
                self.places |= {_name(path, key): (table, key) for key in table}
        identity.take_over([(old, new) for old, new in made.values() if new is not None])
        identity.give_up([old for old, new in made.values() if new is None])
        alone.guard(self.model)

    def copied(self, memo: dict[int, Any]) -> ParameterStore:
        """A store of a copy of the model, on the same ranks and in the same layouts; of one kind of ranks."""
        new = ParameterStore(copy.deepcopy(self.model, memo), self.bound, self.control, self.device, f"a copy of {self.name}")
        new.layouts, new.owners = dict(self.layouts), dict(self.owners)
        for path, module in new.model.named_modules():
            for table in (module._parameters, module._buffers):
                new.places |= {_name(path, key): (table, key) for key in table}
        alone.guard(new.model)
        return new

    def counted(self) -> dict[nn.Parameter, bool]:
        """The parameters that this rank holds parts of, and whether they count for ranks of its kind: each does for one."""
        names, values = self._parts_now()
        if names != self._parts[0] or not all(map(is_, values, self._parts[1])):
            self._tables = [t for m in self.model.modules() for t in (m._modules, m._parameters)]
            self._parts = self._parts_now()
            self._counted = {p: self.owners.get(name, 0) == self.bound.kind for name, p in self.model.named_parameters()}
        return self._counted

    def _parts_now(self) -> tuple[list[str], list[Any]]:
        """Names and values in the tables of all modules that there were when parameters were counted last."""
        return list(chain.from_iterable(self._tables)), list(chain.from_iterable(map(dict.values, self._tables)))

    @contextlib.contextmanager
    def all_parameters(self) -> Iterator[None]:
        """Inside, meta tensors stand for the parameters that ranks of other kinds hold: the model can be traced."""
        for table, key, name in self._absent:
            table[key] = self._standing_in[name]
        try:
            with alone.unguarded(self.model):
                yield
        finally:
            for table, key, _ in self._absent:
                table[key] = None

    def describe_absent(self) -> None:
        """Have what stands for parameters that ranks of other kinds hold be of their dtype, and want gradients if they do.

        Raises: `MismatchError` if ranks of several kinds hold a parameter, and differ in that.
        """
        if self.bound.kinds == 1:
            return
        known: dict[str, tuple[int, Any]] = {}
        mine = {n: (p.shape, p.dtype, p.requires_grad) for n, p in self.model.named_parameters()}
        for rank, theirs in enumerate(self.control.exchange(mine)):
            for name, this in theirs.items():
                first, one = known.setdefault(name, (rank, this))
                if one != this:
                    raise MismatchError(f"parameter {name!r} is on ranks {first} and {rank}, with (dtype, requires_grad) "
                                        f"{one[1:]} on the one and {this[1:]} on the other: change it on all ranks that hold it")
        for name in self._standing_in:
            _, (shape, dtype, requires_grad) = known[name]
            self._standing_in[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, as the model has it now."""
        table, key = self.places[name]
        return table[key]

    def require_filled(self) -> None:
        """Raises: `InputError` for a parameter or buffer that was made on the meta device, and that nothing was written to."""
        for name in self._unfilled:
            tensor = self.tensor(name) if name in self.places else None
            local = compat.local_part(tensor) if isinstance(tensor, DTensor) else tensor
            if local is not None and (local.is_meta or storage.is_unfilled(local)):
                raise InputError(f"{name} was made on the meta device and has no values yet: fill the model with "
                                 "init_weights(seed), fxpar.load_checkpoint or fxpar.load_safetensors before it is called")
        self._unfilled.clear()

    def relocate(self) -> None:
        """The parts of the model have changed: find parameters and buffers where they are now.

        Raises: `InputError` for a parameter that was put in and has no layout.
        """
        names = {id(table[key]): name for name, (table, key) in self.places.items()
                 if name in self.layouts and isinstance(table.get(key), DTensor)}
        found: dict[str, ModuleSlot] = {}
        for path, module in self.model.named_modules():
            for key, p in module._parameters.items():
                name = _name(path, key)
                found[name] = module._parameters, key
                sharding = self.layouts.get(names.get(id(p), name))
                if p is not None and (sharding is None or not isinstance(p, DTensor) or p.dim() != len(sharding)
                                      or list(p.placements) != storage.placements(sharding, self.mesh)):
                    raise InputError(
                        f"parameter {name!r} was put into the model after it was made parallel: it is not laid out over the "
                        "ranks; change the model first, and call fxpar.parallelize on the plain model (fxpar.save_checkpoint "
                        "and fxpar.load_checkpoint carry what was trained over)")
                if p is not None and sharding is not None:
                    self.layouts[name] = sharding
            found |= {_name(path, key): (module._buffers, key) for key in module._buffers}
        self.places = found

    def wrap(self, local: Tensor, shape: torch.Size, sharding: Sharding) -> DTensor:
        """This rank's part of a tensor of that global shape, as a DTensor."""
        return storage.wrap(local, shape, sharding, self.bound)

    def unsharded(self, local: Tensor, shape: torch.Size, sharding: Sharding) -> Tensor:
        """All of a tensor, on every rank, from the parts that they hold: a collective."""
        return storage.unshard(local, sharding, shape, self.bound, self.runtime)

    @torch.no_grad()
    def update_buffers(self, program: Program, outs: list[Tensor], last: bool = True) -> None:
        """Put what a program made of buffers into them: every rank holds all of each, wherever it was computed.

        last: of the step's microbatches; before it, those buffers alone that each microbatch takes from the one before.
        """
        in_order = program.microbatches.in_order if program.microbatches is not None and not last else None
        for sink, out, node in zip(program.tensor_sinks(), outs, program.outputs(), strict=True):
            if sink.kind == "buffer" and (in_order is None or sink.name in in_order):
                sharding = sharding_at(node)
                split = any(piece.axes for dim in sharding for piece in dim)
                self.tensor(sink.name).copy_(self.unsharded(out, full_value(node).shape, sharding) if split else out)

    def _parameter(self, name: str, p: nn.Parameter, sharding: Sharding) -> nn.Parameter:
        def part(full: Tensor) -> DTensor:
            return storage.distribute(full, sharding, self.bound, self.device)

        new = storage.parameter(self._of_rank_0(p), sharding, self.bound, self.device)
        if p.grad is not None:
            new.grad = part(self._of_rank_0(p.grad))
        identity.inherit(p, new, name, part)
        return new

    def _help_others(self, p: nn.Parameter) -> None:
        """Take part in what the ranks do that hold a parameter, which this one does not."""
        self._of_rank_0(p)
        if p.grad is not None:
            self._of_rank_0(p.grad)

    def _require_same_gradients(self) -> None:
        everyone = self.control.exchange([n for n, p in self.model.named_parameters() if p.grad is not None])
        other = next((r for r, names in enumerate(everyone) if names != everyone[0]), None)
        if other is not None:
            name = min({*everyone[0]} ^ {*everyone[other]})
            one, none = (0, other) if name in everyone[0] else (other, 0)
            raise MismatchError(f"parameter {name!r} has a gradient on rank {one} and none on rank {none}: call `zero_grad()` "
                                "before `parallelize`")

    def _of_rank_0(self, t: Tensor) -> Tensor:
        """The same initial value on every rank, as DDP has it: ranks may have built the model from different seeds."""
        if t.is_meta:
            return t
        if t.device != self.device or not t.is_contiguous():
            t = t.detach().to(self.device).contiguous().requires_grad_(t.requires_grad)
        if dist.get_world_size() > 1 and t.numel():
            dist.broadcast(t.detach().reshape(-1).view(torch.uint8), 0)  # gloo knows no bool
        return t


def _name(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
