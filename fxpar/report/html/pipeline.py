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


def drawn(timeline: Timeline, kept: list[float] | None) -> str:
    """A line for each pipeline rank, with a bar for what it does with a microbatch; and what it comes to, in words."""
    scale, parts, schedule = (WIDTH - LEFT - 8) / (timeline.step or 1.0), [], timeline.schedule
    there = {span.action.kind for spans in timeline.spans for span in spans if span.seconds and span.action.kind in COLOURS}
    for i in range(5):
        x = LEFT + timeline.step * i / 4 * scale
        parts.append(tag("path", class_="axis", d=f"M{x:.1f} {TOP - 6} V{TOP + ROW * len(timeline.spans)}"))
        parts.append(
            tag(
                "text",
                words(seconds(timeline.step * i / 4) if i else "0"),
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
            if action.kind not in COLOURS or not span.seconds:
                continue
            light = " light" if stages.index(action.stage) % 2 else ""
            what = f"{NAMES[action.kind]}, stage {action.stage}" + (
                f", microbatch {action.microbatch}" if action.microbatch is not None else ""
            )
            text = f"{what}\n{seconds(span.start)} to {seconds(span.end)}"
            x, wide = LEFT + span.start * scale, span.seconds * scale
            if action.kind.computes:
                parts.append(bar(x, y, wide, BAR, COLOURS[action.kind] + light, text, str(action.microbatch)))
            else:
                parts.append(bar(x, y + BAR + 2, wide, 4, COLOURS[action.kind], text))
    made = drawing(WIDTH, TOP + ROW * len(timeline.spans), *parts, label=f"schedule {schedule.name}")
    entries = [(COLOURS[kind], NAMES[kind]) for kind in COLOURS if kind in there]
    more = [tag("span", "lighter: every other stage of a rank")] if schedule.virtual_stages > 1 else []
    said = drawings.caption(timeline, kept)
    return (
        legend(entries).replace("</p>", "".join(more) + "</p>")
        + tag("div", made, class_="wide")
        + "".join(tag("p", words(line), class_="note") for line in said)
    )
