"""votes: what ranks say when all decide whether something is recorded, and by what they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOST_BOUND = 2.0
"""Of the host's seconds: a GPU that takes longer does not wait for it. One that does takes longer than its host, too: what it
waits for is a part of its time, and so is what another rank's host has not started yet."""
GAIN = 0.97
"""Of the GPU's seconds without recordings: more than this is not worth their memory."""
MORE_MEMORY = 1.05
"""Of what was taken without recordings: more than this is too much, unless the device has plenty."""
PLENTY = 0.5
"""Of the device's memory: as long as no more than this is taken, it has plenty."""


@dataclass(frozen=True)
class Vote:
    """What a rank says when all decide. why: what speaks against it there; for ever: and always will. host, gpu: seconds of a
    step's forward and backward; most, taken: bytes of memory, before it was recorded and now; size: the device's."""

    why: str | None
    for_ever: bool
    host: float
    gpu: float
    most: int
    taken: int
    size: int


def first_against(votes: Sequence[Vote]) -> str | None:
    """What the first rank says that is against it."""
    return next((v.why for v in votes if v.why is not None), None)
