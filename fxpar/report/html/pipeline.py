"""pipeline: the schedule of a pipeline's stages, in the colours of the page."""

from __future__ import annotations

from fxpar.pipeline import drawing as drawings
from fxpar.pipeline.schedules import Kind
from fxpar.pipeline.timeline import Timeline
from fxpar.report.html.svg import bar, drawing, legend, tag, words
from fxpar.report.words import seconds

COLOURS = {Kind.F: "c0", Kind.B: "c1", Kind.I: "c1", Kind.W: "c2", Kind.UNSHARD: "c4", Kind.REDUCE: "c5"}
NAMES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "gradients of inputs",
    Kind.W: "gradients of weights",
    Kind.UNSHARD: "gather parameters",
    Kind.REDUCE: "sum gradients",
}
LEFT, ROW, BAR, TOP, WIDTH = 64.0, 36.0, 22.0, 22.0, 1080.0


READABLE = 45
"""Of how many bars side by side the numbers can be read. Of more, begin and end are drawn closer."""


def drawn(timeline: Timeline, kept: list[float] | None) -> str:
    """A line for each pipeline rank, with a bar for what it does with a microbatch; and what it comes to, in words."""
    schedule, step = timeline.schedule, timeline.step or 1.0
    there = {span.action.kind for spans in timeline.spans for span in spans if span.seconds and span.action.kind in COLOURS}
    entries = [(COLOURS[kind], NAMES[kind]) for kind in COLOURS if kind in there]
    more = [tag("span", "lighter: every other stage of a rank")] if schedule.virtual_stages > 1 else []
    out = [
        legend(entries).replace("</p>", "".join(more) + "</p>"),
        tag("div", _drawing(timeline, 0.0, step), class_="wide"),
        *(tag("p", words(line), class_="note") for line in drawings.caption(timeline, kept)),
    ]
    most = max(sum(s.action.kind.computes for s in spans) for spans in timeline.spans)
    if most > READABLE:
        part = step * READABLE / most
        for name, first in (("begin", 0.0), ("end", step - part)):
            out += [
                tag("h3", words(f"The {name} of the step, closer; numbers are those of microbatches")),
                tag("div", _drawing(timeline, first, first + part), class_="wide"),
            ]
    return "".join(out)


def _drawing(timeline: Timeline, first: float, last: float) -> str:
    """What runs from one second of the step to another."""
    scale, parts, schedule = (WIDTH - LEFT - 8) / (last - first), [], timeline.schedule
    for i in range(5):
        moment = first + (last - first) * i / 4
        x = LEFT + (moment - first) * scale
        parts.append(tag("path", class_="axis", d=f"M{x:.1f} {TOP - 6} V{TOP + ROW * len(timeline.spans)}"))
        parts.append(
            tag(
                "text",
                words(seconds(moment) if moment else "0"),
                class_="tick",
                x=x,
                y=TOP - 9,
                text_anchor="middle" if 0 < i < 4 else "start" if not i else "end",
            )
        )
    for rank, spans in enumerate(timeline.spans):
        y = TOP + rank * ROW
        parts.append(tag("text", f"pp rank {rank}", class_="lane", x=LEFT - 8, y=y + 15, text_anchor="end"))
        parts.append(tag("rect", class_="rail", x=LEFT, y=y, width=WIDTH - LEFT - 8, height=BAR))
        stages = schedule.stages_of(rank)
        for span in spans:
            action = span.action
            if action.kind not in COLOURS or not span.seconds or span.end <= first or span.start >= last:
                continue
            light = " light" if stages.index(action.stage) % 2 else ""
            what = f"{NAMES[action.kind]}, stage {action.stage}" + (
                f", microbatch {action.microbatch}" if action.microbatch is not None else ""
            )
            text = f"{what}\n{seconds(span.start)} to {seconds(span.end)}"
            x = LEFT + (max(span.start, first) - first) * scale
            wide = (min(span.end, last) - max(span.start, first)) * scale
            if action.kind.computes:
                parts.append(bar(x, y, wide, BAR, COLOURS[action.kind] + light, text, str(action.microbatch)))
            else:
                parts.append(bar(x, y + BAR + 2, wide, 4, COLOURS[action.kind], text))
    return drawing(WIDTH, TOP + ROW * len(timeline.spans), *parts, label=f"schedule {schedule.name}")
