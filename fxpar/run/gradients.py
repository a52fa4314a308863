"""gradients: those of a rank's microbatches that are not reduced over replicas yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxpar import compat
from fxpar.passes.partition.phases import Boundary
from fxpar.run.reached import Reached


class UnreducedGradients:
    """Sums of gradients at boundaries (see `fxpar.passes.partition.phases`), by the keys of those.

    reduce: takes such sums to the gradients of the parameters; called at the end of a backward pass that reduced gradients, if
    some were left.
    """

    def __init__(self, reduce: Callable[[dict[str, Tensor]], None]):
        self.reduce = reduce
        self.pending: dict[str, Tensor] = {}
        self._reduced = False
        self._queued = False

    def hold(self, boundaries: Sequence[Boundary], grads: Sequence[Tensor | None]) -> None:
        """Add a microbatch's gradients."""
        for boundary, grad in zip(boundaries, grads, strict=True):
            if grad is not None:
                grad = grad.to(boundary.dtype)
                before = self.pending.get(boundary.key)
                self.pending[boundary.key] = grad if before is None else before + grad
        self._at_the_end(reduced=False)

    def reduced(self, along: dict[str, Tensor]) -> None:
        """A backward that reduces gradients has been through, and has reduced `along` with its own.

        What had been reduced before (the model was called twice since) is taken back at the end of the backward pass.
        """
        for key, tensor in along.items():
            mine = self.pending.get(key)
            if mine is tensor:
                del self.pending[key]
            else:
                self.pending[key] = -tensor if mine is None else mine - tensor
        self._at_the_end(reduced=True)

    def _at_the_end(self, reduced: bool) -> None:
        self._reduced |= reduced
        if not self._queued:
            self._queued = True
            compat.after_backward(self._finish)

    def _finish(self) -> None:
        """After a backward pass that reduced gradients none is left unreduced, in whatever order its parts ran."""
        reduced, self._reduced, self._queued = self._reduced, False, False
        if reduced and self.pending:
            pending, self.pending = self.pending, {}
            self.reduce(pending)


@dataclass
class Receipt:
    """What the backward of one microbatch tells `to`: the gradients of the values at these boundaries, which stay unreduced; or,
    if there are none, that it reduced its own and of those `along` what it came to."""

    to: UnreducedGradients
    boundaries: list[Boundary] = field(default_factory=list)
    along: list[tuple[Boundary, Tensor]] = field(default_factory=list)

    def __call__(self, grads: Sequence[Tensor | None], reached: Reached) -> None:
        if self.boundaries:
            self.to.hold(self.boundaries, reached.of_boundaries(grads, self.boundaries))
        else:
            self.to.reduced({b.key: tensor for b, tensor in self.along if reached.reduces(b)})
