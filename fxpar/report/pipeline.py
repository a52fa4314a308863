"""What a report says of a plan with pipeline parallelism: its stages, what crosses the cuts, what each pipeline rank holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fxpar.cost.clusters import Cluster
from fxpar.errors import PlanError
from fxpar.passes.strategies.stages import Stage
from fxpar.pipeline import drawing
from fxpar.pipeline.schedules import Schedule
from fxpar.pipeline.timeline import Timeline
from fxpar.report.memory import Peak, predict_stages
from fxpar.report.step import StepReport
from fxpar.report.text import GIB, MIB, ranges, table
from fxpar.report.traffic import Total
from fxpar.sharding.facts import full_value
from fxpar.sharding.mesh import KIND


@dataclass(frozen=True)
class StageRow:
    """One stage. Bytes and FLOPs are those of one rank.

    rank: the pipeline rank that holds it. first, last: the modules that make its first and its last activation; "" for the model
    itself. parameters: how many numbers its parameters have, over all ranks; bytes: of those that one rank stores. A parameter
    of several stages counts for each. flops: of a step, forward and backward, and forward again where the plan recomputes it;
    share: of those of all stages. sent, returned: bytes that cross the cut behind it for one microbatch: values on to the next
    stage, and their gradients back. crossing: both, of a step.
    """

    stage: int
    rank: int
    first: str
    last: str
    parameters: int
    bytes: int
    flops: int
    share: float
    sent: int
    returned: int
    crossing: int


@dataclass(frozen=True)
class PipelineRankRow:
    """What each rank at one place of the pipeline holds between steps, as `Report.memory` has it, and its stages."""

    rank: int
    stages: tuple[int, ...]
    memory: dict[str, int]


@dataclass
class PipelineReport:
    """The stages of a pipeline, and their schedule.

    stages: from the first to the last. ranks: of the pipeline. step: what a step takes.
    """

    schedule: Schedule
    stages: list[StageRow]
    ranks: list[PipelineRankRow]
    _cut: Sequence[Stage] = field(repr=False, compare=False)
    step: StepReport

    @property
    def cluster(self) -> Cluster | str:
        """What times are told for, a cluster or its name; to be set."""
        return self.step.cluster

    @cluster.setter
    def cluster(self, value: Cluster | str) -> None:
        self.step.cluster = value

    @functools.cached_property
    def peaks(self) -> list[Peak]:
        """The predicted peak of each pipeline rank (see `fxpar.report.memory.predict_stages`). Traced when it is first asked for:
        about a second a layer; of many equal layers, a few are traced. Raises as `Report.peak`."""
        return predict_stages([stage.program for stage in self._cut], self.schedule)

    @property
    def kept(self) -> list[int]:
        """For each pipeline rank, the most bytes that forwards keep for backwards to come."""
        return [peak.kept for peak in self.peaks]

    def timeline(self) -> Timeline:
        """When everything of a step runs on `cluster`, by the cost model (see `fxpar.cost.stages`).

        Raises `PlanError` for a cluster that does not exist, or does not compute in a dtype of the model.
        """
        return self.step.timeline()

    def activations(self) -> list[float] | None:
        """Bytes that the forward of one microbatch keeps at each stage, for the captions of drawings; None where that cannot be
        predicted."""
        try:
            return [float(self.peaks[rank].of_stages[stage]) for stage, rank in enumerate(self.schedule.owner)]
        except Exception:  # whatever stops Inductor must not hide the timeline
            return None

    def messages(self) -> Total:
        """What passes between stages in a step, on the pipeline rank that sends most."""
        sent = {rank: [(s.sent, s.returned, s.crossing) for s in self.stages if s.crossing and rank in
                       (s.rank, self.schedule.owner[s.stage + 1])] for rank in range(self.schedule.ranks)}
        most, count = max(sent.values(), key=lambda each: sum(s[2] for s in each)), self.schedule.microbatches
        messages = sum(count * (bool(a) + bool(b)) for a, b, _ in most)
        return Total(KIND, messages, *(count * sum(s[i] for s in most) for i in (0, 1)))

    def lines(self, peaks: Sequence[Peak] | None) -> list[str]:
        """The report as text. peaks: those of all ranks, or None where they are not known."""
        stages = [(str(s.stage), str(s.rank), s.first or "(the model)", s.last or "(the model)", f"{s.parameters / 1e6:.2f}",
                   f"{s.bytes / MIB:.2f}", f"{s.flops / 1e12:.4g}", f"{s.share:.1%}", f"{s.sent / MIB:.2f}",
                   f"{s.returned / MIB:.2f}", f"{s.crossing / MIB:.2f}") for s in self.stages]
        ranks = [(str(r.rank), ranges(r.stages), *(f"{r.memory[k] / GIB:.3f}" for k in ("parameters", "gradients", "optimizer")),
                  *([f"{peaks[r.rank].kept / GIB:.3f}", f"{peaks[r.rank].bytes / GIB:.3f}"] if peaks else ["-", "-"]))
                 for r in self.ranks]
        return [*self._times(), "",
                *table(("stage", "pp rank", "from", "to", "M parameters", "MiB a rank", "TFLOP a step", "share", "MiB sent",
                        "MiB returned", "MiB a step"), stages), "",
                *table(("pp rank", "stages", "GiB parameters", "gradients", "optimizer", "activations", "peak"), ranks)]

    def _times(self) -> list[str]:
        try:
            made = self.step.time()
        except PlanError as error:  # a dtype that the cluster does not compute in must not hide the rest of the report
            return [f"{self.schedule.name}: not timed ({error})"]
        on = made.cluster
        return [*drawing.caption(made.timeline), f"(step and bubble by the cost model, on {on.name}: {on.device})"]


def describe(schedule: Schedule, stages: Sequence[Stage], on_rank: dict[int, set[str]], sizes: dict[str, tuple[int, int]]
             ) -> PipelineReport:
    """The report of stages under a schedule.

    on_rank: the names of the parameters that each pipeline rank holds. sizes: name -> bytes that one rank stores of a parameter,
    and of a gradient of it (0 for one that is not trained).
    """
    count, total = schedule.microbatches, sum(stage.flops for stage in stages) or 1
    rows = [StageRow(s.index, schedule.owner[s.index], s.first, s.last, _numbers(s), s.parameter_bytes, s.flops * count,
                     s.flops / total, s.bytes_sent, returned, count * (s.bytes_sent + returned))
            for s in stages for returned in [s.bytes_returned if s.program.training else 0]]
    ranks = []
    for rank in range(schedule.ranks):
        parameters, gradients = (sum(sizes[name][i] for name in on_rank[rank]) for i in (0, 1))
        ranks.append(PipelineRankRow(rank, schedule.stages_of(rank),
                                     {"parameters": parameters, "gradients": gradients, "optimizer": 2 * gradients}))
    step = StepReport(schedule, [(s.program, s.bytes_sent) for s in stages], max(rank.memory["gradients"] for rank in ranks))
    return PipelineReport(schedule, rows, ranks, stages, step)


def uses(stage: Stage) -> dict[str, Any]:
    """Name -> placeholder of the parameters that a stage uses."""
    return {s.name: n for n, s in stage.program.source_of().items() if s.kind == "param" and n.users}


def _numbers(stage: Stage) -> int:
    return sum(math.prod(full_value(n).shape) for n in uses(stage).values())
