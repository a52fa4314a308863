"""evaluate: plans partitioned for real, with the step, its terms and the peak as `fxpar.inspect` has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fxpar.choose.space import Estimate
from fxpar.compiler import Captured
from fxpar.cost.clusters import Cluster
from fxpar.errors import FxparError
from fxpar.plan import Plan
from fxpar.report.report import Report, inspect
from fxpar.report.verdict import usable

Captures = Callable[[Plan], Captured]
"""A plan -> the model on the batch of its step, captured."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was partitioned for all of its ranks.

    rows: of the batch of a step. estimate: what the formulas say of it. terms: what the seconds of its step are for, by the cost
    model (`StepTime.terms`). memory: bytes of a rank at its peak, by what they are for: as `Report.peak` has them if `traced`, or
    else by the formulas. utilization: MFU. bubble: of the pipeline.
    """

    plan: Plan
    rows: int
    estimate: Estimate
    terms: dict[str, float]
    memory: dict[str, float]
    traced: bool
    utilization: float
    bubble: float
    report: Report = field(repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())

    @property
    def peak(self) -> float:
        """Bytes of a rank."""
        return sum(self.memory.values())

    @property
    def pace(self) -> float:
        """Seconds for one row of the batch: what plans are compared by."""
        return self.seconds / self.rows

    def fits(self, memory: int) -> bool:
        """Whether a step takes no more than it may of a device's memory."""
        return self.peak <= usable(memory)


def partitioned(capture: Captures, estimate: Estimate, cluster: Cluster, rows: int) -> Candidate | FxparError:
    """A plan, partitioned and cut into its stages; or the error that says why it cannot be."""
    try:
        report = inspect(capture(estimate.plan), estimate.plan)
        report.step.cluster = cluster
        made = report.step.time()
    except FxparError as error:
        return error
    return Candidate(estimate.plan, rows, estimate, dict(made.terms), dict(estimate.memory), False, made.utilization,
                     made.timeline.bubble if estimate.plan.pp > 1 else 0.0, report)


def traced(candidate: Candidate) -> Candidate:
    """The same with the peak that `fxpar.inspect` predicts. Raises what PyTorch raises for a model that Inductor cannot
    compile."""
    parts = {name: float(size) for name, size in candidate.report.peak.parts.items()}
    return replace(candidate, memory=parts, traced=True)
