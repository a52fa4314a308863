"""batches: whether the ranks of a replica were given the same values.

The ranks of one replica (along tp, cp and pp) each take their part of the batch that all of them were given; if they were given
different ones, they train on neither. A checksum of every tensor's bytes, in which their order counts, is compared in the first
calls and every so often. It is computed where the batch is. For a batch on a GPU it comes to the host on its own, and is compared
in the first call that finds it there on all ranks, so that the host never waits for the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxpar.backends.transport.control import Check, Control
from fxpar.errors import MismatchError
from fxpar.run.arriving import checksum, joined, norm_of, norms, weighted_sums
from fxpar.run.compared import FIRST, Compared
from fxpar.sharding.mesh import BoundMesh

ROUNDING = 0.02
"""Of the norm of a computed input, by which its copies on several ranks may be apart."""

_log = logging.getLogger("fxpar")


class BatchChecks(Compared):
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`.

    The rows of a batch are compared among the ranks of a replica, inputs without a batch among all ranks. Of an input that was
    computed with gradients, on each rank by itself, the norm and a weighted sum are compared, which may differ by rounding.
    """

    def __init__(self, bound: BoundMesh, control: Control, every: int):
        dp = bound.mesh.axes("dp")
        super().__init__(control, every, bound.index(dp), bound.mesh.size(*dp))
        self._compared, self._same = 0, self.slots > 1
        self._rows: list[str] = []
        self._common: list[str] = []
        """Of the tensors whose numbers are compared: those of rows, and those without."""
        self._computed: set[str] = set()

    def due(self, named: dict[str, Any], batch_dims: Callable[[dict[str, Any]], Mapping[str, int | None]]) -> list[Check]:
        """What is to be compared in this call, which takes the leaves `named`. batch_dims: of such leaves path -> dim, as far as
        it is known."""
        return self.checks(lambda: self._numbers(named, batch_dims(named)))

    def _numbers(self, named: Mapping[str, Any], dims: Mapping[str, int | None]) -> list[Tensor]:
        tensors = {path: leaf.detach() for path, leaf in named.items()
                   if isinstance(leaf, Tensor) and leaf.numel() and leaf.device.type in ("cpu", "cuda")}
        self._computed = {path for path in tensors if named[path].requires_grad and not named[path].is_leaf}
        self._common = [path for path, t in tensors.items() if dims.get(path, 0 if t.dim() else None) is None]
        self._rows = [path for path in tensors if path not in self._common]
        if self.slots == self.control.world and self.turns.calls > FIRST:
            self._rows = []  # there was nothing to compare but replicas, for a hint
        return [number for path in (*self._rows, *self._common) for number in self._numbers_of(path, tensors[path])]

    def _numbers_of(self, path: str, t: Tensor) -> list[Tensor]:
        return [*norms([t]), *weighted_sums([t])] if path in self._computed else [checksum(t)]

    def made_of(self, here: list[int] | None) -> list[Check]:
        count = sum(1 + (path in self._computed) for path in self._rows)
        rows = Check(self.slot, self.slots, None if here is None else joined(here[:count]))
        return [rows, Check(0, 1, None if here is None else joined(here[count:]))] if self._common else [rows]

    def compared(self, outcome: list[int | None]) -> None:
        self._compared += 1
        self._same = self._same and len(set(outcome)) == 1 and bool(self._rows)
        if self._compared == FIRST and self._same and self.control.rank == 0:
            _log.warning("all %d replicas were given the same batch in each of the first %d calls; "
                         "fxpar.sampler(dataset, module) gives each a part of its own", self.slots, FIRST)

    def differ(self, mine: list[int]) -> None:
        numbers = iter(mine)
        sums = {path: [next(numbers) for _ in range(1 + (path in self._computed))] for path in (*self._rows, *self._common)}
        first: dict[tuple[str, int], tuple[int, list[int]]] = {}
        for rank, (replica, theirs) in enumerate(self.control.exchange((self.slot, sums))):
            for path, found in theirs.items():
                one, known = first.setdefault((path, -1 if path in self._common else replica), (rank, found))
                if found != known and not (path in self._computed and _by_rounding(known, found)):
                    raise MismatchError(f"ranks were called with different values of input {path!r}: "
                                        + self._explained(path, one, rank, replica))

    def _explained(self, path: str, one: int, other: int, replica: int) -> str:
        if path in self._common:
            return (f"ranks {one} and {other} have others, and it has no batch dim: it is the same for all rows, and all ranks "
                    "must pass the same; what differs from row to row has a batch dim, which Plan(batch_dims) can name")
        return (f"ranks {one} and {other} belong to replica {replica} of {self.slots}, and each takes its part of what it is "
                "given; all ranks of a replica, along tp, cp and pp, must pass the same: fxpar.sampler(dataset, module) gives "
                "each its replica's part, as does DistributedSampler(dataset, module.replica.count, module.replica.index)")


def _by_rounding(known: list[int], found: list[int]) -> bool:
    """Whether two ranks computed nearly the same. Of each: its norm and weighted sum (of integers its checksum)."""
    (norm, total), (other, of_other) = map(norm_of, known), map(norm_of, found)
    size = max(abs(norm), abs(other))
    return abs(norm - other) <= ROUNDING * size and abs(total - of_other) <= ROUNDING * size
