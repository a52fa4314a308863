"""Whether a plan fits into a device's memory, and what would make it fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fxpar.errors import FxparError, PlanError
from fxpar.plan import Plan
from fxpar.report.text import GIB

RESERVED = 0.025
"""The part of a device's memory that is not PyTorch's allocator's: the driver's, NCCL's, that of libraries. Two of 80 GiB."""
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1,
          "": 1}


def bytes_of(memory: int | float | str) -> int:
    """A number of bytes, or what a text says: "80GiB", "80 GB". Raises `PlanError` for what is neither."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower()) if isinstance(memory, str) else None
    if found is not None and found[2] in _UNITS and float(found[1]) > 0:
        return int(float(found[1]) * _UNITS[found[2]])
    if isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < float("inf"):
        return int(memory)
    raise PlanError("memory", memory, 'must be a number of bytes, or text such as "80GiB"', "80GiB")


def usable(memory: int) -> int:
    """What of a device's memory a step may take."""
    return int(memory * (1 - RESERVED))


@dataclass(frozen=True)
class Verdict:
    """peak: predicted bytes of a rank. memory: of its device, of which `usable` may be taken. plan: what was asked about.
    ways: changes of the plan that save memory, each with what is changed before it, and the peak then; they end with the first
    that fits, if one does. Empty where the plan fits."""

    plan: Plan
    peak: int
    memory: int
    ways: tuple[tuple[str, int], ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak <= usable(self.memory)

    def __str__(self) -> str:
        room = usable(self.memory) / GIB
        of = f"{self.memory / GIB:.1f} GiB, of which a step may take {room:.1f}"
        if self.fits:
            return f"fits: {self.peak / GIB:.1f} GiB in {of}; {room - self.peak / GIB:.1f} GiB are left"
        text = f"does not fit: {self.peak / GIB:.1f} GiB in {of}"
        if not self.ways:
            return (f"{text}; no ZeRO level, number of microbatches or recomputation is left to try: more ranks of tp, pp or cp "
                    "split the rest")
        tried = ", ".join(f"{change} {size / GIB:.1f} GiB" for change, size in self.ways)
        if self.ways[-1][1] <= usable(self.memory):
            return f"{text}; {self.ways[-1][0]} fits ({tried})"
        return f"{text}; nor do these, one added to the other ({tried}): more ranks of tp, pp or cp split the rest"


def verdict(plan: Plan, peak: int, memory: int, peak_of: Callable[[Plan], int]) -> Verdict:
    """Whether a plan with this peak fits; if not, what does, in the order in which one should try: ZeRO, smaller microbatches,
    recomputation. peak_of: the peak under another plan; an `FxparError` says that there is none."""
    ways: list[tuple[str, int]] = []
    if peak > usable(memory):
        for change, other in _changes(plan):
            try:
                ways.append((change, peak_of(other)))
            except FxparError:
                continue
            if ways[-1][1] <= usable(memory):
                break
    return Verdict(plan, peak, memory, tuple(ways))


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    changed: list[str] = []
    steps: list[dict[str, object]] = []
    if plan.dp * plan.cp > 1:
        steps += [{"zero": level} for level in (1, 3) if level > plan.zero]
    steps.append({"microbatches": 2 * plan.microbatches})
    order = ("none", "selective", "full")
    if plan.recompute in order:
        steps += [{"recompute": policy} for policy in order[order.index(str(plan.recompute)) + 1:]]
    for step in steps:
        plan = replace(plan, **step)  # type: ignore[arg-type]
        (name, value), = step.items()
        changed = [*(c for c in changed if not c.startswith(f"{name}=")), f"{name}={value}"]
        yield ",".join(changed), plan
