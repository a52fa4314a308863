"""drift: whether what several ranks hold, they hold alike.

Every step does the same to all copies of a parameter or buffer. What changes one copy alone (a write on one rank, another state
dict) has ranks compute with different weights from then on, and nobody notices. So ranks compare numbers of what they hold in
the first calls, every so often, and before a save: of floating-point numbers the norm and a weighted sum, in which signs and
order count, and of others a checksum. Where these differ, ranks exchange sketches of the copies, whose distance is that of the
copies: a step that one of them did not take hardly changes a norm. Copies that differ by little more than rounding are a warning,
as they may come from kernels that do not add up in the same order twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Check, Outcome
from fxpar.errors import MismatchError
from fxpar.run.arriving import Arriving, joined, norm_of, norms, sketch, weighted_sums
from fxpar.run.compared import Turns
from fxpar.run.store import ParameterStore
from fxpar.sharding import chunks
from fxpar.sharding.mesh import Axes

TOLERANCE = 1e-4
"""Of a norm, and of the distance of two copies, relative to it."""
Place = tuple[Axes, int, int, str]
"""Where copies of the same are: axes that split it, kind of ranks, part, and its name."""
Numbers = tuple[int, int]
"""Of a copy: the bits of its norm and of its weighted sum; or its checksum, and 0."""

_log = logging.getLogger("fxpar")


class DriftChecks:
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`. attributes: what its programs read besides
    parameters and buffers, by name, as it is now."""

    def __init__(self, store: ParameterStore, every: int, attributes: Callable[[], Mapping[str, Tensor]] = dict):
        self.store, self._turns, self._attributes = store, Turns(store.control, every), attributes
        self._sums: _Sums | None = None
        self._warned = False

    def due(self) -> list[Check]:
        """What is to be compared in this call."""
        if self._turns.begins(underway=self._sums is not None):
            self._sums = _Sums(self.store, self._attributes())
        return [] if self._sums is None else self._sums.checks()

    def begin_anew(self) -> None:
        """As in the first calls."""
        self._turns.calls, self._sums = 0, None

    def require_alike(self) -> None:
        """Compare now. Raises: as `judge`."""
        if self.store.control.world > 1:
            self._sums = _Sums(self.store, self._attributes())
            self._sums.arriving.waited()
            self.judge(self.store.control.compare_parts(0, self._sums.checks())[1])

    def judge(self, outcomes: list[Outcome]) -> None:
        """Raises: `MismatchError`, on all ranks, for copies that differ."""
        if self._sums is None or any(outcome is None for outcome in outcomes):
            return
        sums, self._sums = self._sums, None
        if not any(outcome is not None and None in outcome for outcome in outcomes):
            return
        everyone = self.store.control.exchange(sums.by_place())
        first: dict[Place, tuple[int, Numbers]] = {}
        differ: list[tuple[Place, int, int]] = []
        for rank, theirs in enumerate(everyone):
            for place, numbers in theirs.items():
                earlier, known = first.setdefault(place, (rank, numbers))
                if numbers != known:
                    differ.append((place, earlier, rank))
        sketches = self.store.control.exchange(sums.sketches({place for place, *_ in differ} & sums.by_place().keys()))
        worst, named = 0.0, ""
        for place, one, other in differ:
            apart, said = _apart(*((everyone[rank][place], *sketches[rank][place]) for rank in (one, other)))
            if apart >= worst:
                worst, named = apart, f"{place[3]!r} on ranks {one} and {other}{said}"
        if worst > TOLERANCE:
            raise MismatchError(
                f"ranks hold different values of what they should hold alike: {named}; every rank must do the same to a model "
                "(writes, state dicts, gradients), or load the last checkpoint on all")
        if not self._warned and self.store.control.rank == 0:
            self._warned = True
            _log.warning("copies of a parameter differ by rounding: %s", named)


def _apart(mine: tuple[Numbers, float, list[float]], theirs: tuple[Numbers, float, list[float]]) -> tuple[float, str]:
    """How far two copies are apart, relative to their norm, and what is said of norms. Of each: its numbers, how coarsely its
    dtype rounds, and its sketch."""
    (numbers, eps, sketched), (others, _, other) = mine, theirs
    if not eps:
        return math.inf, ""
    a, b = norm_of(numbers[0]), norm_of(others[0])
    norms = f" (norms {a:g} and {b:g})"
    if not math.isfinite(a - b):
        return math.inf, norms
    return max(abs(a - b), math.dist(sketched, other) * min(1.0, TOLERANCE / (4 * eps))) / max(a, b), norms


class _Sums:
    """Of what this rank holds, and others hold, too. groups: axes that split it -> names; on all ranks the same axes. held: by
    name, this rank's part."""

    def __init__(self, store: ParameterStore, attributes: Mapping[str, Tensor]):
        self.store, mesh = store, store.mesh
        split = [chunks.split_axes(sharding) for sharding in store.layouts.values()]
        all_axes = {tuple(a for a in mesh.names if a in one and mesh.size(a) > 1) for one in split} | {()}
        shared = [axes for axes in sorted(all_axes) if mesh.size(*axes) < mesh.world_size or not axes]
        self.groups: dict[Axes, list[str]] = {axes: [] for axes in shared}
        held = self.held = dict[str, Tensor]()
        for name, p in store.model.named_parameters():
            if isinstance(p, DTensor):
                axes = tuple(a for a, place in zip(mesh.names, p.placements, strict=True)
                             if not place.is_replicate() and mesh.size(a) > 1)
                if axes in self.groups:
                    self.groups[axes].append(name)
                    held[name] = compat.local_part(p)
        for name, b in (*store.model.named_buffers(), *attributes.items()):
            if not b.is_meta and name not in held:
                self.groups[()].append(name)
                held[name] = b
        self.names = [name for group in self.groups.values() for name in group]
        tensors = [held[name].detach() for name in self.names]
        self.arriving = Arriving([*norms(tensors), *weighted_sums(tensors)])

    def checks(self) -> list[Check]:
        """One for each group, also where this rank has nothing in it."""
        mesh, bound, here = self.store.mesh, self.store.bound, self.arriving.here()
        numbers = None if here is None else iter(self._of_each(here))
        made = []
        for axes, names in self.groups.items():
            number = None if numbers is None else joined([n for _ in names for n in next(numbers)])
            parts = mesh.size(*axes)
            made.append(Check(bound.kind * parts + bound.index(axes), bound.kinds * parts, number))
        return made

    def by_place(self) -> dict[Place, Numbers]:
        """(axes, kind, part, name) -> what is compared."""
        numbers, bound = dict(zip(self.names, self._of_each(self.arriving.waited()), strict=True)), self.store.bound
        return {(axes, bound.kind, bound.index(axes), n): numbers[n] for axes, names in self.groups.items() for n in names}

    def sketches(self, places: Iterable[Place]) -> dict[Place, tuple[float, list[float]]]:
        """How coarsely the dtype of what this rank holds there rounds, 0 for integers; and a sketch of it."""
        held = {place: self.held[place[3]].detach() for place in places}
        return {place: (torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0, sketch(t)) for place, t in held.items()}

    def _of_each(self, arrived: list[int]) -> list[Numbers]:
        return list(zip(arrived[: len(self.names)], arrived[len(self.names) :], strict=True))
