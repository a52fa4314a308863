"""memory: what a rank holds over a step, as areas on top of each other, by kind."""

from __future__ import annotations

import math

from fxpar.pipeline.timeline import Span
from fxpar.report.html.svg import drawing, tag, words
from fxpar.report.memory import PARTS, Moment, Peak
from fxpar.report.text import GIB
from fxpar.report.words import size

ORDER = (
    ("parameters", "c0"),
    ("optimizer", "c0 light"),
    ("gradients", "c5"),
    ("inputs", "grey"),
    ("parameter copies", "c4"),
    ("activations", "c1"),
    ("temporaries", "c3"),
)
"""From the bottom up, with their colours."""
SAID = {
    "inputs": "batch and buffers",
    "optimizer": "optimizer state",
    "parameter copies": "gathered parameters",
    "temporaries": "temporary",
}
LEFT, RIGHT, TOP, HIGH, WIDTH = 64.0, 14.0, 16.0, 260.0, 1080.0


def drawn(peak: Peak, device: int, spans: tuple[Span, ...] | None = None, forward: float = 1 / 3) -> str:
    """peak: with its curve. device: bytes that a device has. spans: of a rank of a pipeline, when each of its actions runs.
    forward: without them, which part of the step's width the forward pass takes."""
    points = _points(peak.curve, spans, forward)
    if not points:
        return ""
    most = max(sum(parts.values()) for _, _, parts in points)
    top = device if most < device < 1.7 * most else most * 1.08
    step = 10 ** math.floor(math.log10(top / GIB)) if top >= GIB else top / GIB / 4
    step = next(s for s in (step / 4, step / 2, step, 2 * step, 4 * step) if top / GIB / s <= 7)
    scale, across = HIGH / top, WIDTH - LEFT - RIGHT
    parts = []
    for i in range(int(top / GIB / step) + 1):
        y = TOP + HIGH - i * step * GIB * scale
        parts.append(tag("path", class_="axis", d=f"M{LEFT} {y:.1f} H{WIDTH - RIGHT}"))
        parts.append(
            tag(
                "text",
                f"{i * step:g} GiB" if step >= 0.01 else size(i * step * GIB),
                class_="tick",
                x=LEFT - 8,
                y=y + 4,
                text_anchor="end",
            )
        )
    base = [0.0] * len(points)
    for part, colour in ORDER:
        upper = [b + values[part] for b, (_, _, values) in zip(base, points, strict=True)]
        if upper != base:
            line = _steps(points, upper, across, scale)
            under = _steps(points, base, across, scale)[::-1]
            path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in [*line, *under]) + " Z"
            parts.append(
                tag(
                    "path",
                    class_=f"area {colour}",
                    d=path,
                    data_t=f"{SAID.get(part, part)}: at most {size(max(v[part] for _, _, v in points))}",
                )
            )
        base = upper
    if most < device < 1.7 * most:
        y = TOP + HIGH - device * scale
        parts.append(tag("path", class_="limit", d=f"M{LEFT} {y:.1f} H{WIDTH - RIGHT}"))
        parts.append(
            tag("text", words(f"the device has {size(device)}"), class_="tick", x=WIDTH - RIGHT, y=y + 13, text_anchor="end")
        )
    parts += _phases(spans is not None)
    values = max(points, key=lambda p: sum(p[2].values()))[2]
    shown = [(colour, f"{SAID.get(part, part)} {size(values[part])}") for part, colour in ORDER if values[part]]
    entries = "".join(tag("span", tag("i", class_=f"swatch {colour}"), words(text)) for colour, text in reversed(shown))
    return tag("p", entries, class_="legend") + tag(
        "div", drawing(WIDTH, TOP + HIGH + 24, *parts, label="memory of a rank over a step"), class_="wide"
    )


def _points(
    curve: tuple[Moment, ...], spans: tuple[Span, ...] | None, forward: float
) -> list[tuple[float, float, dict[str, int]]]:
    """(from, to, bytes by part), in parts of the width."""
    if spans is not None:
        end = max((s.end for s in spans), default=1.0) or 1.0
        pairs = [(s, m) for s, m in zip(spans, curve, strict=True) if s.action.kind.computes]
        return [(s.start / end, s.end / end, dict(zip(PARTS, m.parts, strict=True))) for s, m in pairs]
    number = {phase: sum(m.phase == phase for m in curve) for phase in ("forward", "backward")}
    split = forward if number["backward"] else 1.0
    out, seen = [], {"forward": 0, "backward": 0}
    for m in curve:
        start, width = (0.0, split) if m.phase == "forward" else (split, 1 - split)
        i, seen[m.phase] = seen[m.phase], seen[m.phase] + 1
        out.append(
            (
                start + width * i / number[m.phase],
                start + width * (i + 1) / number[m.phase],
                dict(zip(PARTS, m.parts, strict=True)),
            )
        )
    return out


def _steps(
    points: list[tuple[float, float, dict[str, int]]], heights: list[float], across: float, scale: float
) -> list[tuple[float, float]]:
    """The corners of a line that is level over each point, and over the pause behind it."""
    ends = [*(p[0] for p in points[1:]), points[-1][1]]
    return [
        (LEFT + x * across, TOP + HIGH - h * scale)
        for p, end, h in zip(points, ends, heights, strict=True)
        for x in (p[0], end)
    ]


def _phases(pipeline: bool) -> list[str]:
    """What stands under the drawing."""
    y = TOP + HIGH + 17
    if pipeline:
        return [
            tag("text", "the rank's forwards and backwards of a step, as the schedule has them", class_="tick", x=LEFT, y=y)
        ]
    return [
        tag("text", "forward", class_="tick", x=LEFT, y=y),
        tag("text", "backward", class_="tick", x=WIDTH - RIGHT, y=y, text_anchor="end"),
    ]
