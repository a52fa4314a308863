"""The device mesh: which axes there are, how ranks are numbered, and the process groups over them.

`Mesh` is pure arithmetic (it works for any world size on a laptop); `bind` turns it into a
`torch.distributed.DeviceMesh`. A strategy is a *group* of mesh axes: its axes are the finest split a
plan needs, so ``tp=8`` over 4 key/value heads is the two axes ``tp0=4, tp1=2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxpar.plan import Plan

Axes = tuple[str, ...]
STRATEGIES = ("dp", "cp", "ring", "a2a", "tp", "zero", "ep")
DEGREES = ("dp", "cp", "tp")
"""The strategies that have axes of their own; the others share theirs."""
KIND = "pp"
"""The axis, major to those of a mesh, along which ranks are of different kinds (see `BoundMesh`)."""
MICROBATCH = "mb"
"""An axis in time: along it lie the microbatches of a step, which one rank runs one after the other."""


@dataclass(frozen=True)
class Mesh:
    """Named axes, major to minor; the last one's ranks are neighbours.

    names, sizes: the axes and their degrees.
    strategies: the axes each strategy consists of, e.g. ``{"dp": ("dp",), "tp": ("tp0", "tp1")}``; those of "zero" are the
        axes of dp and cp over which parameters are stored in parts; "cp" is those of "ring", along which attention keeps its
        queries split, and then those of "a2a", along which it exchanges the sequence for heads; "ep" is the most minor axes of
        all, along which ranks have other experts.
    """

    names: Axes
    sizes: tuple[int, ...]
    strategies: dict[str, Axes] = field(default_factory=dict, hash=False)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def axes(self, strategy: str) -> Axes:
        """The axes of a strategy, major to minor; () where the plan does not use it. Raises KeyError for an unknown one."""
        if strategy not in STRATEGIES:
            raise KeyError(f"no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
        return self.strategies.get(strategy, ())

    @property
    def data(self) -> Axes:
        """The axes along which ranks compute with other data: with other rows of the batch (dp), other tokens (cp)."""
        return self.axes("dp") + self.axes("cp")

    def size(self, *axes: str) -> int:
        """Ranks along these axes together. Raises KeyError for an axis that the mesh does not have."""
        unknown = next((a for a in axes if a not in self.names), None)
        if unknown is not None:
            raise KeyError(f"no axis {unknown!r} in a mesh of {self}")
        return math.prod(self.sizes[self.names.index(a)] for a in axes)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` lies, axis by axis."""
        out = {}
        for name, size in zip(reversed(self.names), reversed(self.sizes), strict=True):
            rank, out[name] = divmod(rank, size)
        return {n: out[n] for n in self.names}

    def index(self, rank: int, axes: Axes) -> int:
        """The rank's index within the group over `axes` (first axis major)."""
        at, i = self.coordinate(rank), 0
        for a in axes:
            i = i * self.size(a) + at[a]
        return i

    def groups(self, axes: Axes) -> list[list[int]]:
        """All groups of ranks that differ only along `axes`, each in the order of `index`."""
        found: dict[tuple, list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinate(rank)
            found.setdefault(tuple(v for k, v in at.items() if k not in axes), []).append(rank)
        return [sorted(g, key=lambda r: self.index(r, axes)) for g in found.values()]

    def split(self, strategy: str, sizes: tuple[int, ...]) -> Mesh:
        """The same ranks with a one-axis strategy, and all others with its axis, split into finer axes of the given sizes."""
        (name,) = self.axes(strategy)
        return self.cut(name, sizes)

    def cut(self, name: str, sizes: tuple[int, ...]) -> Mesh:
        """The same ranks with one axis split into finer ones of the given sizes, in all strategies that have it."""
        if math.prod(sizes) != self.size(name):
            raise ValueError(f"{sizes} does not multiply to {name}={self.size(name)}")
        fine = tuple(f"{name if name[-1].isalpha() else name + '_'}{i}" for i in range(len(sizes)))
        at = self.names.index(name)
        return Mesh(
            self.names[:at] + fine + self.names[at + 1 :],
            self.sizes[:at] + tuple(sizes) + self.sizes[at + 1 :],
            {s: tuple(b for a in axes for b in (fine if a == name else (a,))) for s, axes in self.strategies.items()},
        )

    def __str__(self) -> str:
        return " x ".join(f"{n}={s}" for n, s in zip(self.names, self.sizes, strict=True)) or "1 rank"


def from_plan(plan: Plan) -> Mesh:
    """The mesh of a plan: dp major, then cp, tp minor (tp's ranks are neighbours on one host).

    Hybrid sharding has dp as the axes ``dp_replicate x dp_shard``; cp is ``cp0 x cp1`` where it is a ring of all-to-alls. Experts
    lie along the most minor axes, of which the last is cut in two where it is more than is left of ep: ``dp=8,tp=2,ep=4`` is
    ``dp0=4 x dp1=2 x tp=2``, with experts along dp1 and tp. Axes of degree 1 are left out, except that a plan of one rank keeps
    ``dp=1`` so that there is a mesh.
    """
    replicas = plan.dp_replicate if plan.stores_parts else 1
    sharded = plan.dp // replicas
    if replicas > 1 and sharded > 1:
        dp = [("dp_replicate", replicas), ("dp_shard", sharded)]
    else:
        dp = [("dp", plan.dp)] if plan.dp > 1 else []
    ring, a2a = _context(plan)
    tp = [("tp", plan.tp)] if plan.tp > 1 else []
    axes = dp + ring + a2a + tp or [("dp", 1)]
    names, sizes = zip(*axes, strict=True)
    zero = (dp[-1:] if sharded > 1 else []) + ring + a2a if plan.stores_parts else []
    of = {"dp": dp, "cp": ring + a2a, "ring": ring, "a2a": a2a, "tp": tp, "zero": zero}
    strategies = {name: tuple(n for n, _ in parts) for name, parts in of.items() if parts}
    return _folded(Mesh(names, sizes, strategies or {"dp": ("dp",)}), plan.ep)


def _folded(mesh: Mesh, ep: int) -> Mesh:
    """The mesh with `ep` ranks of its most minor axes as those of experts; `ep` divides the product of their degrees."""
    axes: list[str] = []
    for name in reversed(mesh.names):
        if ep == 1:
            break
        both = math.gcd(ep, mesh.size(name))
        if both == 1:
            continue
        if both < mesh.size(name):
            mesh = mesh.cut(name, (mesh.size(name) // both, both))
            name = next(n for n in reversed(mesh.names) if n not in axes)
        axes.insert(0, name)
        ep //= both
    return Mesh(mesh.names, mesh.sizes, {**mesh.strategies, "ep": tuple(axes)}) if axes else mesh


def _context(plan: Plan) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The axes of cp along which queries stay split, and those along which they are exchanged for heads."""
    if plan.cp == 1:
        return [], []
    if plan.cp_comm == "a2a":
        return [], [("cp", plan.cp)]
    if plan.cp_comm != "a2a+p2p":
        return [("cp", plan.cp)], []
    inner = next(n for n in range(math.isqrt(plan.cp), plan.cp + 1) if plan.cp % n == 0 and n > 1)
    return ([], [("cp", inner)]) if inner == plan.cp else ([("cp0", plan.cp // inner)], [("cp1", inner)])


def in_time(mesh: Mesh, microbatches: int) -> Mesh:
    """The mesh with an axis of microbatches, over which the batch is split before it is split over replicas.

    It is the most major axis of all: what dp holds of a batch can then be exchanged over dp within each microbatch.
    """
    if microbatches == 1:
        return mesh
    strategies = {**mesh.strategies, "dp": (MICROBATCH, *mesh.strategies.get("dp", ()))}
    return Mesh((MICROBATCH, *mesh.names), (microbatches, *mesh.sizes), strategies)


def of_ranks(mesh: Mesh) -> Mesh:
    """The mesh without its axis of microbatches: that of ranks."""
    kept = [(n, s) for n, s in zip(mesh.names, mesh.sizes, strict=True) if n != MICROBATCH]
    strategies = {k: tuple(a for a in axes if a != MICROBATCH) for k, axes in mesh.strategies.items()}
    return Mesh(tuple(n for n, _ in kept), tuple(s for _, s in kept), {k: axes for k, axes in strategies.items() if axes})


class BoundMesh:
    """A `Mesh` on running processes: its `DeviceMesh` and one process group per set of axes.

    kinds: how many kinds of ranks there are; ranks of one kind run the same program and hold parts of the same parameters, as
    those of one pipeline rank do. Each kind is one such mesh, of neighbouring ranks. kind: this rank's, from 0. rank: this
    rank's within the mesh of its kind.

    Groups are made in one fixed order on every rank, the first time a program needs them, because
    making a group is itself a collective.
    """

    def __init__(self, mesh: Mesh, device_type: str, kinds: int = 1):
        self.mesh, self.kinds = mesh, kinds
        self.kind, self.rank = divmod(torch.distributed.get_rank(), mesh.world_size)
        all_kinds = init_device_mesh(device_type, (kinds, *mesh.sizes), mesh_dim_names=(KIND, *mesh.names)) if kinds > 1 else \
            init_device_mesh(device_type, mesh.sizes, mesh_dim_names=mesh.names)
        self.device_mesh: DeviceMesh = all_kinds[mesh.names] if kinds > 1 else all_kinds
        self.across: torch.distributed.ProcessGroup | None = all_kinds.get_group(KIND) if kinds > 1 else None
        """The ranks at this one's place in the meshes of all kinds, in order."""
        for strategy, axes in mesh.strategies.items():
            if strategy in DEGREES and len(axes) > 1:
                self.device_mesh[axes]._flatten(strategy)
        self._groups: dict[Axes, torch.distributed.ProcessGroup] = {}
        self._exchange_groups: dict[Axes, torch.distributed.ProcessGroup] = {}
        self._among: dict[tuple[int, ...], torch.distributed.ProcessGroup] = {}

    def ordered(self, axes: Axes) -> Axes:
        return tuple(a for a in self.mesh.names if a in axes)

    def group(self, axes: Axes) -> torch.distributed.ProcessGroup:
        """The group of this rank over `axes`."""
        axes = self.ordered(axes)
        if axes not in self._groups:
            if len(axes) == 1:
                self._groups[axes] = self.device_mesh.get_group(axes[0])
            else:
                groups = [[kind * self.mesh.world_size + rank for rank in group]
                          for kind in range(self.kinds) for group in self.mesh.groups(axes)]
                self._groups[axes], _ = torch.distributed.new_subgroups_by_enumeration(
                    groups, group_desc=f"fxpar {'+'.join(axes)}")
        return self._groups[axes]

    def communicates_over(self, group: torch.distributed.ProcessGroup) -> bool:
        """Whether this is one of the groups that were made for the mesh."""
        made = [*self.device_mesh.get_all_groups(), *self._groups.values(), *self._exchange_groups.values(),
                *self._among.values(), self.across]
        return any(group is g for g in made)

    def among(self, kinds: tuple[int, ...]) -> torch.distributed.ProcessGroup:
        """The ranks at this one's place in the meshes of these kinds; to be called on all ranks, in the same order."""
        if kinds not in self._among:
            groups = [[kind * self.mesh.world_size + rank for kind in kinds] for rank in range(self.mesh.world_size)]
            made = [torch.distributed.new_group(group) for group in groups]
            self._among[kinds] = made[self.rank]
        return self._among[kinds]

    def made_groups(self) -> list[torch.distributed.ProcessGroup]:
        """The process groups of this rank that were made so far."""
        made = (self.across, *self._groups.values(), *self._exchange_groups.values(), *self._among.values())
        return [g for g in made if isinstance(g, torch.distributed.ProcessGroup)]  # it is no member of others

    def group_names(self) -> list[tuple[str, Axes, str]]:
        """The names of the groups over axes that were made so far, those by which rows go to experts apart, in order of axes."""
        kinds = (("group", self._groups), ("exchange", self._exchange_groups))
        return [(kind, axes, groups[axes].group_name) for kind, groups in kinds for axes in sorted(groups)]

    def exchange_group(self, axes: Axes) -> torch.distributed.ProcessGroup:
        """Another group of the same ranks, by which rows go to experts: what it does waits for no other collective, and on GPUs
        goes first."""
        axes = self.ordered(axes)
        if axes not in self._exchange_groups:
            groups = [[kind * self.mesh.world_size + rank for rank in group]
                      for kind in range(self.kinds) for group in self.mesh.groups(axes)]
            options = None
            if self.device_mesh.device_type == "cuda":
                options = torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            self._exchange_groups[axes], _ = torch.distributed.new_subgroups_by_enumeration(
                groups, pg_options=options, group_desc=f"fxpar exchange {'+'.join(axes)}")
        return self._exchange_groups[axes]

    def index(self, axes: Axes) -> int:
        return self.mesh.index(self.rank, axes)
