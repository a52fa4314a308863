"""store: a model's parameters in the layouts of a plan, on one rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar.backends.transport.runtime import Control, GroupRuntime
from fxpar.errors import InputError, MismatchError
from fxpar.model import identity
from fxpar.program import Program
from fxpar.run import storage
from fxpar.run.feed import Place
from fxpar.sharding.layout import Tiling
from fxpar.sharding.mesh import BoundMesh


class ParameterStore:
    """What this rank holds of a model, and where.

    model: the user's, whose parameters are DTensors once `adopt` was called. mesh, rank: see `BoundMesh`. layouts: how each
    parameter is split over the ranks, by its name. places: the table of a module, and the key in it, of every parameter and
    buffer, by its name.
    """

    def __init__(self, model: nn.Module, bound: BoundMesh, control: Control, device: torch.device):
        self.model, self.bound, self.control, self.device = model, bound, control, device
        self.mesh, self.rank = bound.mesh, bound.rank
        self.runtime = GroupRuntime(bound)
        self.layouts: dict[str, Tiling] = {}
        self.places: dict[str, Place] = {}

    def adopt(self, program: Program) -> None:
        """Have DTensors in the layouts that `program` wants take the place of the model's parameters. Every rank holds all of a
        parameter that the program never uses.

        Raises: `MismatchError` if parameters have gradients already on some ranks, and on others not.
        """
        self._require_same_gradients()
        for node, source in program.source_of().items():
            if source.kind == "param":
                self.layouts[source.name] = node.meta["tiling"]
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for path, module in self.model.named_modules():
            for key, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    name = _name(path, key)
                    tiles = self.layouts.setdefault(program.tied.get(name, name), tuple(() for _ in p.shape))
                    made[id(p)] = p, self._parameter(name, p, tiles)
                module._parameters[key] = made[id(p)][1]
            for key, b in module._buffers.items():
                if b is not None and not b.is_meta:
                    module._buffers[key] = self._of_rank_0(b)
            for table in (module._parameters, module._buffers):
                self.places |= {_name(path, key): (table, key) for key in table}
        identity.take_over(list(made.values()))

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, as the model has it now."""
        table, key = self.places[name]
        return table[key]

    def relocate(self) -> None:
        """The parts of the model have changed: find parameters and buffers where they are now.

        Raises: `InputError` for a parameter that was put in and has no layout.
        """
        names = {id(table[key]): name for name, (table, key) in self.places.items()
                 if name in self.layouts and isinstance(table.get(key), DTensor)}
        found: dict[str, Place] = {}
        for path, module in self.model.named_modules():
            for key, p in module._parameters.items():
                name = _name(path, key)
                found[name] = module._parameters, key
                tiles = self.layouts.get(names.get(id(p), name))
                if p is not None and (tiles is None or not isinstance(p, DTensor) or p.dim() != len(tiles)
                                      or list(p.placements) != storage.placements(tiles, self.mesh)):
                    raise InputError(
                        f"parameter {name!r} was put into the model after it was made parallel: it is not laid out over the "
                        "ranks; change the model first, and call fxpar.parallelize on the plain model (fxpar.save_checkpoint "
                        "and fxpar.load_checkpoint carry what was trained over)")
                if p is not None and tiles is not None:
                    self.layouts[name] = tiles
            found |= {_name(path, key): (module._buffers, key) for key in module._buffers}
        self.places = found

    def wrap(self, local: Tensor, shape: torch.Size, tiles: Tiling) -> DTensor:
        """This rank's part of a tensor of that global shape, as a DTensor."""
        return storage.wrap(local, shape, tiles, self.bound)

    def unsharded(self, local: Tensor, shape: torch.Size, tiles: Tiling) -> Tensor:
        """All of a tensor, on every rank, from the parts that they hold: a collective."""
        return storage.whole(local, tiles, shape, self.bound, self.runtime)

    @torch.no_grad()
    def update_buffers(self, program: Program, outs: list[Tensor]) -> None:
        """Put what a program made of buffers into them: every rank holds all of each, wherever it was computed."""
        for sink, out, node in zip(program.tensor_sinks(), outs, program.outputs(), strict=True):
            if sink.kind == "buffer":
                tiles = node.meta["tiling"]
                split = any(piece.axes for dim in tiles for piece in dim)
                self.tensor(sink.name).copy_(self.unsharded(out, node.meta["global"].shape, tiles) if split else out)

    def _parameter(self, name: str, p: nn.Parameter, tiles: Tiling) -> nn.Parameter:
        def part(full: Tensor) -> DTensor:
            return storage.distribute(full, tiles, self.bound, self.device)

        new = storage.parameter(self._of_rank_0(p), tiles, self.bound, self.device)
        if p.grad is not None:
            new.grad = part(self._of_rank_0(p.grad))
        identity.inherit(p, new, name, part)
        return new

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
        if torch.distributed.get_world_size() > 1 and t.numel():
            torch.distributed.broadcast(t.detach().reshape(-1).view(torch.uint8), 0)  # gloo knows no bool
        return t


def _name(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
