"""A timeline, drawn: as text for terminals, and as SVG for documents and browsers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap

from fxpar.pipeline.schedules import Kind
from fxpar.pipeline.timeline import Span, Timeline

_FILL = {Kind.F: "-", Kind.B: "=", Kind.I: "~", Kind.W: "."}
_WORDS = {Kind.F: "forward", Kind.B: "whole backward", Kind.I: "gradients of inputs", Kind.W: "gradients of weights",
          Kind.UNSHARD: "gather parameters", Kind.REDUCE: "sum gradients"}


def text(timeline: Timeline, width: int = 120, kept: Sequence[float] | None = None) -> str:
    """A timeline in lines of at most `width` characters: one for each rank, then what the letters mean, and the caption.

    A bar begins with its kind and microbatch; that of a rank's second, fourth, ... stage with a small letter. A narrower
    bar has the letter alone; of those that share a column the first is shown. kept: as `Schedule.memory` takes it.
    Raises ValueError where `width` leaves no ten columns.
    """
    labels = [f"rank {rank} " for rank in range(len(timeline.spans))]
    margin = max(map(len, labels))
    columns = width - margin - 2
    if columns < 10:
        raise ValueError(f"a drawing needs a width of at least {margin + 12}, not {width}")
    scale = columns / (timeline.step or 1.0)
    lines = []
    for rank, spans in enumerate(timeline.spans):
        row = [" "] * columns
        for span in reversed(spans):
            if span.action.kind.computes:
                begin = min(round(span.start * scale), columns - 1)
                end = max(round(span.end * scale), begin + 1)
                row[begin:end] = _bar(span, _shade(timeline, rank, span), end - begin)
        lines.append(f"{labels[rank]:<{margin}}|{''.join(row)}|")
    legend = ", ".join(f"{kind.value}{_FILL[kind]} {_WORDS[kind]}" for kind in _drawn(timeline) if kind.computes)
    small = "; small letters: every other stage of a rank" if timeline.schedule.virtual_stages > 1 else ""
    below = [line for words in [legend + small, *caption(timeline, kept)] for line in wrap(words, width)]
    return "\n".join([*lines, *below])


def _shade(timeline: Timeline, rank: int, span: Span) -> int:
    """0 for a rank's first, third, ... stage, 1 for the others."""
    return timeline.schedule.stages_of(rank).index(span.action.stage) % 2


def _drawn(timeline: Timeline) -> list[Kind]:
    """The kinds that take time, in the order of the legend."""
    there = {span.action.kind for spans in timeline.spans for span in spans if span.seconds}
    return [kind for kind in _WORDS if kind in there]


def _bar(span: Span, small: int, width: int) -> str:
    kind = span.action.kind
    letter = kind.value.lower() if small else kind.value
    label = f"{letter}{span.action.microbatch}"
    return (label if len(label) <= width else letter).ljust(width, _FILL[kind])


def caption(timeline: Timeline, kept: Sequence[float] | None = None) -> list[str]:
    """What a timeline comes to, in sentences: the step's time, the bubble, what stages and ranks hold."""
    schedule = timeline.schedule
    lines = [f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches; "
             f"step {_seconds(timeline.step)}, bubble {timeline.bubble:.1%}",
             f"microbatches alive: {_listed('stage', schedule.alive())}"]
    if kept is not None:
        lines.append(f"activations: {_listed('rank', [f'{size / 2**30:.2f} GiB' for size in schedule.memory(kept)])}")
    return lines


def _listed(what: str, values: Sequence[object]) -> str:
    """"stage 0 to 3: 4, stage 4: 2": neighbours of one value together."""
    begins = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    ends = [begin - 1 for begin in begins[1:]] + [len(values) - 1]
    return ", ".join(f"{what} {begin}: {values[begin]}" if begin == end else f"{what}s {begin} to {end}: {values[begin]}"
                     for begin, end in zip(begins, ends))


def _seconds(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if value >= size), (1e-6, "us"))
    return f"{value / size:.4g} {unit}"


# ---- SVG ----

_COLOURS = {Kind.F: ("#4878b0", "#8fb0d8"), Kind.B: ("#c0703a", "#e0a878"), Kind.I: ("#c04848", "#e08f8f"),
            Kind.W: ("#4a9060", "#90c4a0"), Kind.UNSHARD: ("#9a9a9a",) * 2, Kind.REDUCE: ("#7858a8",) * 2}
"""Of a rank's first, third, ... stage, and of its second, fourth, ..."""
_ROW, _BAR, _THIN, _LEFT, _RIGHT, _TOP = 40, 24, 5, 64, 10, 14


def svg(timeline: Timeline, width: int = 1200, kept: Sequence[float] | None = None) -> str:
    """A timeline as an SVG document: a bar for each computation, with its microbatch; thin ones for gathers and sums.

    Bars of a rank's second, fourth, ... stage are lighter. Their tooltips say what they are, and when. kept: as
    `Schedule.memory` takes it, for the caption.
    """
    scale = (width - _LEFT - _RIGHT) / (timeline.step or 1.0)
    parts = []
    for rank, spans in enumerate(timeline.spans):
        y = _TOP + rank * _ROW
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width - _LEFT - _RIGHT}" height="{_BAR}" fill="#f0f0f0"/>')
        parts += [_rectangle(span, _shade(timeline, rank, span), y, scale) for span in spans if not span.action.kind.is_message]
    x, y = _LEFT, _TOP + len(timeline.spans) * _ROW + 6
    for kind in _drawn(timeline):
        if not kind.is_message:
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[kind][0]}"/>')
            parts.append(f'<text x="{x + 17}" y="{y + 10}">{_WORDS[kind]}</text>')
            x += 40 + 7 * len(_WORDS[kind])
    if timeline.schedule.virtual_stages > 1:
        parts.append(f'<text x="{x}" y="{y + 10}">lighter: every other stage of a rank</text>')
    lines = [line for words in caption(timeline, kept) for line in wrap(words, (width - _LEFT) // 7)]
    parts += [f'<text x="{_LEFT}" y="{y + 34 + 18 * i}">{escape(line)}</text>' for i, line in enumerate(lines)]
    height = y + 34 + 18 * len(lines)
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                      'font-family="sans-serif" font-size="12" fill="#202020">',
                      f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def _rectangle(span: Span, shade: int, y: int, scale: float) -> str:
    action = span.action
    x, wide = _LEFT + span.start * scale, span.seconds * scale
    top, high = (y, _BAR) if action.kind.computes else (y + _BAR + 2, _THIN)
    title = f"<title>{action}: {_seconds(span.start)} to {_seconds(span.end)}</title>"
    bar = (f'<rect x="{x:.2f}" y="{top}" width="{wide:.2f}" height="{high}" fill="{_COLOURS[action.kind][shade]}" '
           f'stroke="white" stroke-width="{min(0.5, wide / 10):.2f}">{title}</rect>')
    if not action.kind.computes or wide < 7 * len(str(action.microbatch)) + 2:
        return bar
    return bar + (f'<text x="{x + wide / 2:.2f}" y="{y + 16}" text-anchor="middle" fill="white" '
                  f'pointer-events="none">{action.microbatch}</text>')
