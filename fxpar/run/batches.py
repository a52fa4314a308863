"""batches: whether the ranks of a replica were given the same values.

The ranks of one replica (along tp, cp and pp) each take their part of the batch that all of them were given; if they were given
different ones, they train on neither. A checksum of every tensor's bytes, in which their order counts, is compared in the first
calls and every so often. It is computed where the batch is. For a batch on a GPU it comes to the host on its own, and is compared
in the first call that finds it there on all ranks, so that the host never waits for the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxpar.backends.transport.control import Check, Control
from fxpar.errors import MismatchError
from fxpar.run.arriving import checksum
from fxpar.run.compared import FIRST, Compared
from fxpar.sharding.mesh import BoundMesh

_log = logging.getLogger("fxpar")


class BatchChecks(Compared):
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`."""

    def __init__(self, bound: BoundMesh, control: Control, every: int):
        dp = bound.mesh.axes("dp")
        super().__init__(control, every, bound.index(dp), bound.mesh.size(*dp))
        self._compared, self._same = 0, self.slots > 1
        self._paths: list[str] = []
        """Of the tensors whose numbers are compared: those of a call, but those that want gradients, which were computed."""

    def due(self, named: Mapping[str, Any]) -> list[Check]:
        """What is to be compared in this call, which takes the leaves `named`."""
        if self.slots == self.control.world and self.turns.calls == FIRST:
            return []  # there is nothing to compare but replicas, for a hint
        return self.checks(lambda: self._numbers(named))

    def _numbers(self, named: Mapping[str, Any]) -> list[Tensor]:
        tensors = {path: leaf for path, leaf in named.items() if isinstance(leaf, Tensor) and leaf.numel()
                   and not leaf.requires_grad and leaf.device.type in ("cpu", "cuda")}
        self._paths = list(tensors)
        return [checksum(t.detach()) for t in tensors.values()]

    def compared(self, outcome: list[int | None]) -> None:
        self._compared += 1
        self._same = self._same and len(set(outcome)) == 1 and bool(self._paths)
        if self._compared == FIRST and self._same and self.control.rank == 0:
            _log.warning("all %d replicas were given the same batch in each of the first %d calls; "
                         "fxpar.sampler(dataset, module) gives each a part of its own", self.slots, FIRST)

    def differ(self, mine: list[int]) -> None:
        sums = dict(zip(self._paths, mine, strict=True))
        first: dict[int, tuple[int, dict[str, int]]] = {}
        for rank, (replica, theirs) in enumerate(self.control.exchange((self.slot, sums))):
            one, known = first.setdefault(replica, (rank, theirs))
            path = next((path for path in known if known[path] != theirs[path]), None)
            if path is not None:
                raise MismatchError(
                    f"ranks were called with different values of input {path!r}: ranks {one} and {rank} belong to replica "
                    f"{replica} of {self.slots}, and each takes its part of what it is given; all ranks of a replica, along "
                    "tp, cp and pp, must pass the same: fxpar.sampler(dataset, module) gives each its replica's part, as does "
                    "DistributedSampler(dataset, module.replica.count, module.replica.index)")
        raise AssertionError("ranks differ in nothing")
