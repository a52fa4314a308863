"""host: what the host does in a training step, by kind, from a profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxpar.errors import InputError

KINDS = (
    ("gathers, scatters and sums: to start them", r"(all_gather|reduce_scatter|all_reduce|all_to_all|gather_parts)\w* over "),
    ("to wait for them", r"wait( for .*)?$"),
    ("products and kernels: to start them", r"(?!fxpar: )[^:]+: \w"),
    ("between these, in forward and backward", r"fxpar: (forward|backward)$|Compiled(Function)?Backward$"),
    ("comparing what the module is called with", r"fxpar: call$"),
    ("inputs, outputs and gradients handed over", r"fxpar: (inputs|outputs|gradients)$"),
    ("clipping", r"fxpar: clip_grad_norm_$"),
    ("the optimizer", r"Optimizer\.(step|zero_grad)#"),
)
"""What a range is counted as: of those whose pattern its name begins with, the first."""


@dataclass(frozen=True)
class HostTime:
    """What the host does in a step. parts: by kind, how often it does so, and for how many seconds; without what other kinds do
    inside. It is print()ed as a table."""

    parts: Mapping[str, tuple[float, float]]

    @property
    def total(self) -> float:
        """Seconds of all of them."""
        return sum(seconds for _, seconds in self.parts.values())

    def __str__(self) -> str:
        rows = [(kind, f"{count:.0f}", seconds) for kind, (count, seconds) in self.parts.items()]
        rows.append(("all of it", "", self.total))
        head = f"{'what the host does in a step':<45}{'times':>8}{'ms':>10}"
        return "\n".join([head, *(f"{kind:<45}{count:>8}{1e3 * seconds:>10.2f}" for kind, count, seconds in rows)])


def host_time(profile: Any, steps: int = 1) -> HostTime:
    """What the host does in a training step, by kind: starting gathers and kernels, waiting, comparing, clipping.

    profile: a ``torch.profiler.profile`` that has ended, under which a parallel module was trained. steps: how many steps it saw.
    A profiler makes the host slower, most where it does little: proportions say more than times.
    Raises: `InputError` for a profile without ranges of a parallel module.
    """
    found: dict[str, list[float]] = {kind: [0, 0.0] for kind, _ in KINDS}
    open_ranges: dict[Any, list[tuple[float, str]]] = {}
    events = [e for e in profile.events() if str(e.device_type).endswith("CPU")]
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        kind = _kind(event.name)
        if kind is None:
            continue
        begin, end = event.time_range.start, event.time_range.end
        around = open_ranges.setdefault(event.thread, [])
        while around and around[-1][0] <= begin:
            around.pop()
        if around:
            found[around[-1][1]][1] -= min(end, around[-1][0]) - begin
        found[kind][0] += 1
        found[kind][1] += end - begin
        around.append((end, kind))
    if not found[KINDS[3][0]][0]:
        raise InputError("the profile has no ranges of a parallel module: call one, forward and backward, while the profiler "
                         "records (torch.profiler.profile(activities=[ProfilerActivity.CPU]))")
    return HostTime({kind: (count / steps, microseconds / 1e6 / steps) for kind, (count, microseconds) in found.items()})


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS if re.match(pattern, name)), None)
