"""terminal: a report as rich shows it, with tables and colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fxpar.errors import FxparError
from fxpar.report.data import known_peak, known_verdict
from fxpar.report.words import layout_words, mesh_words, seconds, size

if TYPE_CHECKING:
    from fxpar.report.report import Report

ACCENT, QUIET = "bold cyan", "dim"


def in_colour(report: Report) -> Iterator[Any]:
    """What is written to a terminal: tables of parameters, collectives, totals and stages, then memory, time and notes."""
    from rich.text import Text

    plan = report.plan
    mesh = mesh_words(report.mesh, plan.pp)
    yield Text.assemble(
        ("plan ", QUIET), (str(plan), ACCENT), ("   mesh ", QUIET), mesh, ("   ranks ", QUIET), str(plan.world_size)
    )
    for made in _tables(report):
        yield ""
        yield made
    yield ""
    for name, text in _lines(report):
        yield Text.assemble((f"{name:<14}", QUIET), text)


def _tables(report: Report) -> Iterator[Any]:
    parameters = [
        (
            name + (f"  x{count}" if count > 1 else ""),
            str(list(p.shape)),
            layout_words(p.layout),
            str(list(p.local_shape)),
            size(count * p.local_bytes),
        )
        for name, count, p in report.grouped()
    ]
    yield _table("Parameters", ("name", "shape", "layout", "a rank holds", "bytes a rank"), parameters, right=1)
    if report.collectives:
        yield _table(
            "Collectives of a step, on one rank", ("for", "over", "where", "forward", "backward"), _both_ways(report)
        )
        totals = [(t.name, f"{t.count:,}", size(t.forward), size(t.backward)) for t in report.totals()]
        yield _table("All of a rank's, for", ("", "count", "forward", "backward"), totals, right=3)
    if report.pipeline is not None:
        head = ("stage", "pp rank", "from", "to", "parameters a rank", "share of FLOPs", "sent a microbatch")
        stages = [
            (
                str(s.stage),
                str(s.rank),
                s.first or "the model",
                s.last or "the model",
                size(s.bytes),
                f"{s.share:.1%}",
                size(s.sent),
            )
            for s in report.pipeline.stages
        ]
        yield _table("Stages", head, stages, right=3)


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: int = 0) -> Any:
    """right: how many of the last columns hold numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_style=ACCENT, title_justify="left", header_style=QUIET, box=None, pad_edge=False)
    for i, name in enumerate(head):
        made.add_column(name, justify="right" if i >= len(head) - right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    """Memory, time and notes: what each is, and the text."""
    yield "memory a rank", ", ".join(f"{part} {size(held)}" for part, held in report.memory.items())
    peak = known_peak(report)
    yield "peak memory", peak if isinstance(peak, str) else f"{size(peak.bytes)} in the {peak.phase} pass, at {peak.where}"
    verdict = known_verdict(report)
    if verdict is not None:
        yield "the plan", str(verdict)
    try:
        made = report.step.time()
        step = (
            f"{seconds(made.seconds)} on {made.cluster.name}, bubble {made.timeline.bubble:.1%}, "
            f"MFU {made.utilization:.1%} (by the cost model)"
        )
    except FxparError as error:
        step = f"not known: {error}"
    yield "a step", step
    if report.timings.ran:
        yield "to first step", str(report.timings)
    if report.cuda_graphs is not None:
        yield "CUDA graphs", report.cuda_graphs
    if report.tp_comm_overlap is not None:
        yield "overlap of tensor parallelism", report.tp_comm_overlap
    yield from (("note", note) for note in report.notes)


def _both_ways(report: Report) -> list[tuple[str, ...]]:
    """A line for what serves one module for one strategy: what goes forward and what backward, how many and their bytes."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for r in report.merged():
        entry = found.setdefault((r.strategy, "+".join(r.axes), r.where or "the model"), {"forward": [], "backward": []})
        entry[r.phase].append(f"{r.kind} x{r.count:,} {size(r.bytes)}")
    return [(*key, "\n".join(phases["forward"]), "\n".join(phases["backward"])) for key, phases in found.items()]
