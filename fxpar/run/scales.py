"""scales: whether ranks began their backward passes with the same gradients of a loss.

A loss is that of the global batch, and the gradients of its parts on all ranks are summed. A rank that scales it otherwise (by
its own number of tokens, by another count of accumulated batches) weighs its part otherwise: all ranks train alike, and wrongly.
So the numbers that backward passes came with are compared in the first calls and every so often, as batches are.
"""

from __future__ import annotations

from torch import Tensor

from fxpar.backends.transport.control import Check, Control
from fxpar.errors import MismatchError
from fxpar.run.arriving import norm_of, number_bits
from fxpar.run.compared import Compared

MOST = 64
"""Backward passes between two calls of which numbers are kept."""


class ScaleChecks(Compared):
    """Of one module on one rank. every: see `check_batches` of `fxpar.parallelize`."""

    def __init__(self, control: Control, every: int):
        super().__init__(control, every)
        self._given: list[Tensor] = []

    def tell(self, grad: Tensor) -> None:
        """A backward pass came to a loss with this gradient."""
        if len(self._given) < MOST and self.control.world > 1:
            self._given.append(grad.detach())

    def due(self) -> list[Check]:
        """What is to be compared in this call: what was told since the last one."""
        given, self._given = self._given, []
        return self.checks(lambda: [number_bits(grad) for grad in given])

    def differ(self, mine: list[int]) -> None:
        everyone = self.control.exchange([norm_of(bits) for bits in mine])
        other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
        raise MismatchError(
            f"ranks began the backward of a loss with different gradients: rank 0 with {everyone[0]}, rank {other} with "
            f"{everyone[other]}; a loss is that of the global batch, the same on all ranks, and all must scale it alike "
            "(weights of rows and counts of tokens belong into the model's loss)")
