"""timings: where the time went on the way to a program's first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxpar.passes.pipeline import back, front

PARAMETERS, INITIALISING = "parameters", "initialising"
LOWERING, LOWERING_BACKWARD = "lowering", "lowering the backward"
FORWARD, BACKWARD, STEP = "first forward", "first backward", "first step"
"""Keys of `Program.timings`, besides "capture" and the names of passes."""
ORDER = ("capture", "canonical", "infer", "partition", PARAMETERS, INITIALISING, LOWERING, LOWERING_BACKWARD, FORWARD, BACKWARD,
         STEP)
"""The parts, in the order in which they come."""


@dataclass(frozen=True)
class Timings:
    """Seconds of the host, by part, in the order in which parts came; those that did not come yet are left out.

    "capture" traces the model; "canonical", "infer" and "partition" are the passes of `fxpar.passes.pipeline`, in three groups.
    "parameters" takes them to where they are stored, "initialising" fills those that were on the meta device. "lowering" is what
    the backend does before the program first runs, "lowering the backward" what it does then. "first forward", "first backward"
    and (of a pipeline) "first step" are the first run, without these; on GPUs, until its kernels are started.
    passes: seconds of each pass, in order.
    """

    parts: Mapping[str, float]
    passes: Mapping[str, float]

    @classmethod
    def of(cls, timings: Mapping[str, float]) -> Timings:
        """From `Program.timings`."""
        *canonical, infer = (name for name, _ in front())
        group = dict.fromkeys(canonical, "canonical") | {infer: "infer"} | {name: "partition" for name, _ in back()}
        parts: dict[str, float] = {}
        for name, seconds in timings.items():
            part = group.get(name, name)
            parts[part] = parts.get(part, 0.0) + seconds
        return cls({name: parts[name] for name in ORDER if name in parts}, {n: s for n, s in timings.items() if n in group})

    @property
    def ran(self) -> bool:
        """Whether there was a first step."""
        return not {FORWARD, STEP}.isdisjoint(self.parts)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{self.total:.2f} s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.parts.items())
