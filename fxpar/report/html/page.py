"""page: a report as one HTML page."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fxpar.cost.clusters import Cluster, cluster
from fxpar.errors import FxparError, PlanError
from fxpar.progress import stage as told
from fxpar.report.data import known_peak, known_verdict
from fxpar.report.html import block, lanes, layers, memory, mesh, pipeline
from fxpar.report.html.svg import table, tag, words
from fxpar.report.words import many, mesh_words, plural, seconds, size

if TYPE_CHECKING:
    from fxpar.cost.stages import StepTime
    from fxpar.program import Program
    from fxpar.report.memory import Peak
    from fxpar.report.report import Report


def write_page(report: Report, path: str | os.PathLike) -> Path:
    """Write `page`, and return where. Raises: `FxparError` where nothing can be written."""
    file = Path(path)
    with told(f"writing {file}"):
        text = page(report)
        try:
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise FxparError(f"no report in {file}: {error}") from error
    return file


def page(report: Report) -> str:
    """The page: it loads nothing, and reads light or dark as the reader's system is."""
    peak, made = known_peak(report), _time(report)
    parts = [
        ("ranks", "The ranks", _ranks(report)),
        ("layers", "Layers and layouts", _layers(report)),
        ("traffic", "What is communicated", _traffic(report)),
        ("passes", "Forward and backward", _passes(report, made)),
        ("pipeline", "The pipeline", _pipeline(report, made)),
        ("memory", "Memory over the step", _memory(report, peak, made)),
        ("block", "Inside a block", _block(report)),
        ("notes", "Notes", _notes(report)),
    ]
    shown = [(name, title, inner) for name, title, inner in parts if inner]
    head = tag(
        "header",
        tag("h1", "What the plan does"),
        tag("p", words(str(report.plan)).replace(",", ",<wbr>"), class_="plan"),
        tag(
            "p",
            words(
                f"On {plural(report.plan.world_size, 'rank')}. Predicted without running the model; bytes are those of "
                f"one rank{', the one that has most,' if report.pipeline else ''} and of one training step."
            ),
        ),
        _cards(report, peak, made),
        tag("nav", *(tag("a", words(title), href=f"#{name}") for name, title, _ in shown)),
    )
    body = "".join(tag("section", tag("h2", words(title)), inner, id=name) for name, title, inner in shown)
    foot = tag("footer", "Written by fxpar.")
    return (
        "<!doctype html>\n"
        + tag(
            "html",
            tag(
                "head",
                '<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                tag("title", words(f"fxpar: {report.plan}")),
                f"<style>{_file('page.css')}</style>",
            ),
            tag("body", tag("main", head, body, foot), tag("div", "", id="tip"), f"<script>{_file('page.js')}</script>"),
            lang="en",
        )
        + "\n"
    )


def _file(name: str) -> str:
    return resources.files("fxpar.report.html").joinpath(name).read_text(encoding="utf-8")


def _time(report: Report) -> StepTime | str:
    try:
        return report.step.time()
    except PlanError as error:  # a dtype that the cluster does not compute in
        return str(error)


def _on(report: Report) -> Cluster:
    return cluster(report.step.cluster) if isinstance(report.step.cluster, str) else report.step.cluster


def _device(report: Report) -> int:
    """Bytes of a device: those that were named, or the cluster's."""
    return _on(report).memory if report.limit is None else report.limit


def _cards(report: Report, peak: Peak | str, made: StepTime | str) -> str:
    cards = [(plural(report.plan.world_size, "rank"), f"mesh {mesh_words(report.mesh, report.plan.pp)}")]
    if not isinstance(peak, str):
        cards.append((size(peak.bytes), f"peak memory of a rank, of {size(_device(report))}"))
    if not isinstance(made, str):
        cards += [
            (seconds(made.seconds), f"a step, by the cost model for {made.cluster.name}"),
            (f"{made.utilization:.1%}", "of the devices' peak FLOP/s (MFU)"),
        ]
        if report.pipeline:
            cards.append((f"{made.timeline.bubble:.1%}", "pipeline bubble"))
    sent = sum(t.bytes for t in report.totals())
    cards.append((size(sent), "communicated by a rank in a step"))
    return tag(
        "div",
        *(tag("div", tag("b", words(number)), tag("span", words(what)), class_="card") for number, what in cards),
        class_="cards",
    )


def _ranks(report: Report) -> str:
    return tag("div", mesh.picture(report), mesh.axes_table(report), class_="two")


def _layers(report: Report) -> str:
    said = "Every parameter, equal layers once: what its dims mean to the model, and which axes of the mesh split them."
    return tag("p", said, class_="note") + layers.layers(report)


def _traffic(report: Report) -> str:
    if not report.collectives and report.pipeline is None:
        return tag("p", "Nothing is communicated.")
    totals = [
        (tag("b", words(t.name)), words(f"{t.count:,}"), words(size(t.forward)), words(size(t.backward)), words(size(t.bytes)))
        for t in report.totals()
    ]
    rows = [
        (
            words(r.strategy),
            words(r.kind.replace("_", "-")),
            words("+".join(r.axes)),
            words(r.phase),
            words(r.where or "the model"),
            words(f"{r.count:,}"),
            words(size(r.bytes)),
        )
        for r in sorted(report.merged(), key=lambda r: -r.bytes)
    ]
    folded = tag(
        "details",
        tag(
            "summary",
            words(
                f"All {len(rows)} kinds of collectives, of all stages together"
                if report.pipeline
                else f"All {len(rows)} kinds of collectives"
            ),
        ),
        table(("for", "collective", "over", "phase", "serves", "count", "bytes"), rows, numbers=2),
    )
    return table(("for", "count", "forward", "backward", "together"), totals, numbers=4) + _special(report) + folded


def _special(report: Report) -> str:
    """What attention does under context parallelism, and how tokens reach their experts."""
    out = ""
    if report.attention:
        rows = [
            (words(a.where), words(f"{a.count:,}"), words(a.how), words(a.why), *(words(size(each)) for each in a.sent))
            for a in report.attention
        ]
        head = ("attention of", "count", "how", "why", "received forward, each", "backward, each")
        out += tag("h3", "Attention under context parallelism") + table(head, rows, numbers=2)
    if report.experts:
        reached = [
            (
                words(e.where),
                words(f"{e.count:,}"),
                words(e.dispatch),
                words("+".join(e.axes)),
                *(words(size(each)) for each in e.sent),
            )
            for e in report.experts
        ]
        head = ("experts of", "count", "tokens reach them by", "over", "sent forward, each", "backward, each")
        out += tag("h3", "Experts") + table(head, reached, numbers=2)
    return out


def _largest(report: Report) -> tuple[int, Program]:
    """The stage in the middle, of which others are likely to be copies, and its program."""
    programs = report.step.programs
    at = len(programs) // 2
    return at, programs[at][0]


def _passes(report: Report, made: StepTime | str) -> str:
    at, program = _largest(report)
    if isinstance(made, str):
        return tag("p", words(f"No times are known: {made}"))
    of = (
        f"One microbatch of stage {at}" if report.pipeline else "One microbatch" if report.plan.microbatches > 1 else "One step"
    )
    once = " What runs once a step (parameters gathered, gradients summed) is left out." if report.plan.microbatches > 1 else ""
    said = (
        f"{of}, by the cost model for {made.cluster.name}. What is communicated for activations is waited for; parameters and "
        f"their gradients, and the keys and values of ring attention, travel beside computation.{once}"
    )
    return tag("p", words(said), class_="note") + lanes.drawn(program, _on(report))


def _pipeline(report: Report, made: StepTime | str) -> str:
    if report.pipeline is None or isinstance(made, str):
        return ""
    stages = [
        (
            words(s.stage),
            words(s.rank),
            words(s.first or "the model"),
            words(s.last or "the model"),
            words(many(s.parameters)),
            words(size(s.bytes)),
            words(f"{s.share:.1%}"),
            words(size(s.sent)),
        )
        for s in report.pipeline.stages
    ]
    folded = tag(
        "details",
        tag("summary", words(f"The {len(stages)} stages")),
        table(
            ("stage", "pp rank", "from", "to", "parameters", "stored by a rank", "of all FLOPs", "sent, a microbatch"),
            stages,
            numbers=4,
        ),
    )
    return pipeline.drawn(made.timeline, report.pipeline.activations()) + folded


def _memory(report: Report, peak: Peak | str, made: StepTime | str) -> str:
    if isinstance(peak, str):
        return tag("p", words(f"The peak memory is {peak}."))
    if report.pipeline is not None:
        peaks = report.pipeline.peaks
        rank = max(range(len(peaks)), key=lambda r: peaks[r].bytes)
        which, spans = (
            f"Of pipeline rank {rank}, which holds most",
            None if isinstance(made, str) else made.timeline.spans[rank],
        )
        peak = peaks[rank]
    else:
        which, spans = "Of every rank", None
    said = f"{which}: {size(peak.bytes)} at the peak, in the {peak.phase} pass, at {peak.where}."
    if report.pipeline is None and report.plan.microbatches > 1:
        said += " Drawn is the last microbatch."
    verdict = known_verdict(report)
    said += f" The plan {verdict}." if verdict is not None else ""
    return tag("p", words(said), class_="note") + memory.drawn(peak, _device(report), spans)


def _block(report: Report) -> str:
    name, drawn = block.drawn(_largest(report)[1])
    said = (
        (
            f"{name} on one rank: boxes are operators, with the line of the model that made them; under each is the layout of "
            "what it makes. Collectives are those that the plan put in. Parameters are left out."
        )
        if name
        else ""
    )
    return (tag("p", words(said), class_="note") if said else "") + drawn


def _notes(report: Report) -> str:
    notes = [*report.notes, *([f"To the first step: {report.timings}."] if report.timings.ran else [])]
    return tag("ul", *(tag("li", words(note)) for note in notes)) if notes else ""
