"""batches: whether the ranks of a replica were given the same values.

The ranks of one replica (along tp, cp and pp) each take their part of the batch that all of them were given; if they were given
different ones, they train on neither. A checksum of every tensor's bytes, in which their order counts, is compared in the first
calls and every so often. It is computed where the batch is. For a batch on a GPU it comes to the host on its own, and is compared
in the first call that finds it there on all ranks, so that the host never waits for the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from fxpar.backends.transport.control import Check, Control, Outcome
from fxpar.errors import MismatchError
from fxpar.run.arriving import Arriving, checksum, joined
from fxpar.sharding.mesh import BoundMesh

CHECKED_EVERY = 100
FIRST = 3
"""Calls that are checked at the beginning, of those that are checked at all."""
_log = logging.getLogger("fxpar")


class BatchChecks:
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`."""

    def __init__(self, bound: BoundMesh, control: Control, every: int):
        dp = bound.mesh.axes("dp")
        self.every, self.control = every, control
        self.replica, self.replicas = bound.index(dp), bound.mesh.size(*dp)
        self._calls, self._compared, self._same = 0, 0, self.replicas > 1
        self._sums: tuple[list[str], Arriving] | None = None
        """Of the tensors of a call, but those that want gradients, which were computed, by their paths."""

    def due(self, named: Mapping[str, Any]) -> list[Check]:
        """What is to be compared in this call, which takes the leaves `named`."""
        self._calls += 1
        alone = self.replicas == self.control.world  # then there is nothing to compare but the replicas, for a hint
        if not self.every or self.control.world == 1 or (alone and self._calls > FIRST):
            return []
        if self._sums is None and (self._calls <= FIRST or self._calls % self.every == 0):
            tensors = {path: leaf for path, leaf in named.items() if isinstance(leaf, Tensor) and leaf.numel()
                       and not leaf.requires_grad and leaf.device.type in ("cpu", "cuda")}
            self._sums = list(tensors), Arriving([checksum(t.detach()) for t in tensors.values()])
        if self._sums is None:
            return []
        sums = self._sums[1].here()
        return [Check(self.replica, self.replicas, None if sums is None else joined(sums))]

    def judge(self, outcomes: list[Outcome]) -> None:
        """Raises: `MismatchError`, on all ranks, if those of a replica were given different values."""
        for outcome in outcomes:
            if outcome is None:
                continue
            assert self._sums is not None
            sums, self._sums = self._sums, None
            if None in outcome:
                self._differ(dict(zip(sums[0], sums[1].waited(), strict=True)))
            self._compared += 1
            self._same = self._same and len(set(outcome)) == 1 and bool(sums[0])
            if self._compared == FIRST and self._same and self.control.rank == 0:
                _log.warning("all %d replicas were given the same batch in each of the first %d calls; "
                             "fxpar.sampler(dataset, module) gives each a part of its own", self.replicas, FIRST)

    def _differ(self, sums: dict[str, int]) -> NoReturn:
        first: dict[int, tuple[int, dict[str, int]]] = {}
        for rank, (replica, theirs) in enumerate(self.control.exchange((self.replica, sums))):
            one, mine = first.setdefault(replica, (rank, theirs))
            path = next((path for path in mine if mine[path] != theirs[path]), None)
            if path is not None:
                raise MismatchError(
                    f"ranks were called with different values of input {path!r}: ranks {one} and {rank} belong to replica "
                    f"{replica} of {self.replicas}, and each takes its part of what it is given; all ranks of a replica, along "
                    "tp, cp and pp, must pass the same: fxpar.sampler(dataset, module) gives each its replica's part, as does "
                    "DistributedSampler(dataset, module.replica.count, module.replica.index)")
        raise AssertionError("ranks differ in nothing")
