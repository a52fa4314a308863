"""What a report says of the time of a training step, by the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fxpar.cost.clusters import Cluster, cluster
from fxpar.cost.stages import StageLoad, StepTime, flops_by_dtype, step_time
from fxpar.errors import PlanError
from fxpar.passes.partition.phases import beside_computation, once_a_step
from fxpar.pipeline.schedules import Schedule
from fxpar.pipeline.timeline import Timeline
from fxpar.program import Program

CLUSTER = "dgx-h100"
"""What times are given for, where nobody says another one."""


@dataclass
class StepReport:
    """What a step takes. Of a plan without a pipeline, the schedule is that of one rank with one stage.

    programs: of each stage, and the bytes that it sends to the next for one microbatch. stored: bytes of the trained parameters
    on the rank that stores most. cluster: what times are told for, a cluster or its name.
    """

    schedule: Schedule
    programs: Sequence[tuple[Program, int]] = field(repr=False, compare=False)
    stored: int
    cluster: Cluster | str = CLUSTER
    _known: dict[Cluster, StepTime] = field(default_factory=dict, repr=False, compare=False)

    def time(self) -> StepTime:
        """Seconds, bubble and utilization on `cluster`, by the cost model (see `fxpar.cost.stages`).

        Raises `PlanError` for a cluster that does not exist, or does not compute in a dtype of the model.
        """
        on = cluster(self.cluster) if isinstance(self.cluster, str) else self.cluster
        if on not in self._known:
            self._known[on] = step_time(on, self.schedule, [self._load(*each) for each in self.programs], self.stored)
        return self._known[on]

    def timeline(self) -> Timeline:
        """When everything of a step runs. Raises as `time`."""
        return self.time().timeline

    def flops(self) -> int:
        """Operations of a step, forward and backward, of all ranks; what is computed again counts nothing."""
        return sum(self._by_dtype().values())

    def dtype(self) -> str:
        """The name of the dtype in which most is computed."""
        done = self._by_dtype()
        return max(done, key=lambda name: done[name], default="float32")

    def _by_dtype(self) -> dict[str, int]:
        return flops_by_dtype([program for program, _ in self.programs], self.schedule.microbatches)

    def _load(self, program: Program, sent: int) -> StageLoad:
        phases = self.schedule.stages > 1 or (program.training and self.schedule.microbatches > 1)
        once, beside = once_a_step(program) if phases else (set(), set()), beside_computation(program)
        return StageLoad(program, sent, *once, *beside, self.schedule.microbatches)

    def line(self) -> str:
        """The report as text."""
        try:
            made = self.time()
        except PlanError as error:  # a dtype that the cluster does not compute in must not hide the rest of the report
            return f"time of a step: not known ({error})"
        return (f"time of a step by the cost model, on {made.cluster.name} ({made.cluster.device}): {made.seconds:.4g} s, of it "
                f"{made.optimizer * 1e3:.3g} ms the optimizer; {made.flops / 1e12:.4g} TFLOP of all ranks, "
                f"{made.utilization:.1%} of their peak (MFU)")
