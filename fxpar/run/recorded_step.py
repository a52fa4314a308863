"""recorded_step: whole steps of a rank of a pipeline as recordings, which all ranks play back together.

Forwards and backwards of all microbatches of all stages that a rank holds, and what it sends and receives between, are one code:

    ===============================  =======================================================================================
    the code's                       lies
    ===============================  =======================================================================================
    parameters, buffers              where they are, and is written to there
    microbatches' inputs, the seed   in memory of the recording, to which each step's are copied
    loss, outputs of an evaluation   in the pool, out of which they are copied
    gradients                        in the pool, lent to whoever gets them
    ===============================  =======================================================================================

Ranks of other stages hold other parameters, so that a user's program may well do something to one of them alone: keep a gradient,
give a parameter other memory. That is no error, as it is among ranks of one kind: before every step ranks find out whether any of
them cannot play back, and then none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxpar import compat
from fxpar.backends.transport.control import Check, Outcome, digest
from fxpar.program import Program
from fxpar.run.pool import Device, Recording
from fxpar.run.recording import MOVED, RecordedProgram, Recordings
from fxpar.run.step_feed import StepFeed

SEVERAL = "steps of stages that communicate within themselves, too, are recorded where it is asked for (cuda_graphs=True)"
"""Why "auto" records none of them: they were not played back on GPUs yet."""


class AllOrNone:
    """Whether what the ranks of a pipeline have recorded is played back in the next call: by all of them, or by none. why: why it
    is not. kinds: of ranks; where there is one only, there is no pipeline."""

    def __init__(self, recordings: Recordings, kinds: int):
        self.recordings, self.kinds = recordings, kinds
        self.why: str | None = None

    def record(self, program: Program, refused: str | None) -> RecordedStep | None:
        """What records steps of a program, with gradients or, where they are off now, without. refused: why it cannot be."""
        if self.recordings.off is not None or self.recordings.device is None:
            return None
        if self.recordings.wanted == "auto" and program.mesh.world_size > 1:
            refused = refused or SEVERAL
        return self.recordings.add(program, RecordedStep(self, self.recordings.device, refused))

    def due(self) -> list[Check]:
        """What ranks are to compare of the next call."""
        if self.kinds == 1:
            return []
        steps = self._steps()
        held = steps[0].obstacle() is not None if steps else False
        moved = [number for number, step in enumerate(steps) if step.has_moved()]
        return [Check(0, 1, int(held)), Check(0, 1, digest(repr(moved)))]

    def judge(self, outcomes: list[Outcome]) -> None:
        """What they have found. Where some have moved what others have not, that is given up, on all of them."""
        if not outcomes:
            return
        held, moved = (None if outcome is None else outcome[0] for outcome in outcomes)
        self.why = None if held == 0 else "a rank holds something of an earlier step, or is not to play anything back"
        if moved is None:
            for step in self._steps():
                step.give_up(MOVED)

    def _steps(self) -> list[RecordedStep]:
        return [p for p in self.recordings.recorded() if isinstance(p, RecordedStep)]


class RecordedStep(RecordedProgram):
    """The steps of one program on this rank, as they are run, recorded and played back."""

    together = True

    def __init__(self, of: AllOrNone, device: Device, refused: str | None):
        super().__init__(of.recordings, device, frozenset(), refused)
        self._of = of
        self._feed: StepFeed | None = None

    def run(self, code: compat.Code, feed: StepFeed, inputs: list[Tensor], returned: int) -> Sequence[Any]:
        """What `code` makes of `inputs`, the list that `feed` made, which is emptied. The first `returned` of it are copies, what
        comes behind is lent, where it is played back."""
        self._feed, self._fixed, self._returned = feed, feed.fixed, returned
        return self._run_forward(code, inputs)

    def obstacle(self) -> str | None:
        """Why this rank cannot play anything back now."""
        return self._occupied() or self._pool.obstacle()

    def has_moved(self) -> bool:
        """Whether something has moved that was to stay where it was."""
        return self._forward is not None and self._feed is not None and not self._forward.stays(self._feed.addresses())

    def _in_the_way(self, recorded: Recording, inputs: list[Any], obstacle: str | None) -> str | None:
        return self._of.why or (None if recorded.fits(inputs) else MOVED)

    def _handed_out(self, recorded: Recording, inputs: list[Any]) -> list[Any]:
        made = list(recorded.copies(inputs, recorded.places[: self._returned]))
        lent, storages = recorded.lend(inputs, self._returned)
        self._pool.lent += storages
        return made + lent
