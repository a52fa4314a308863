"""scales: whether ranks began their backward passes with the same gradients of a loss.

A loss is that of the global batch, and the gradients of its parts on all ranks are summed. A rank that scales it otherwise (by
its own number of tokens, by another count of accumulated batches) weighs its part otherwise: all ranks train alike, and wrongly.
So the numbers that backward passes came with are compared in the first calls and every so often, as batches are.
"""

from __future__ import annotations

from torch import Tensor

from fxpar.backends.transport.control import Check, Control, Outcome
from fxpar.errors import MismatchError
from fxpar.run.arriving import Arriving, joined, norm_of, number_bits
from fxpar.run.batches import FIRST

MOST = 64
"""Backward passes between two calls of which numbers are kept."""


class ScaleChecks:
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`."""

    def __init__(self, control: Control, every: int):
        self.control, self.every = control, every
        self._calls = 0
        self._given: list[Tensor] = []
        self._sums: Arriving | None = None

    def tell(self, grad: Tensor) -> None:
        """A backward pass came to a loss with this gradient."""
        if len(self._given) < MOST and self.control.world > 1:
            self._given.append(grad.detach())

    def due(self) -> list[Check]:
        """What is to be compared in this call: what was told since the last one."""
        self._calls += 1
        given, self._given = self._given, []
        if not self.every or self.control.world == 1:
            return []
        if self._sums is None and (self._calls <= FIRST or self._calls % self.every == 0):
            self._sums = Arriving([number_bits(grad) for grad in given])
        if self._sums is None:
            return []
        sums = self._sums.here()
        return [Check(0, 1, None if sums is None else joined(sums))]

    def judge(self, outcomes: list[Outcome]) -> None:
        """Raises: `MismatchError`, on all ranks, if their numbers differ."""
        for outcome in outcomes:
            if outcome is None:
                continue
            assert self._sums is not None
            sums, self._sums = self._sums, None
            if None in outcome:
                everyone = self.control.exchange([norm_of(bits) for bits in sums.waited()])
                other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
                raise MismatchError(
                    f"ranks began the backward of a loss with different gradients: rank 0 with {everyone[0]}, rank {other} with "
                    f"{everyone[other]}; a loss is that of the global batch, the same on all ranks, and all must scale it alike "
                    "(weights of rows and counts of tokens belong into the model's loss)")
