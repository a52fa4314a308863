"""data: a report as dicts, lists, numbers and text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fxpar.errors import FxparError
from fxpar.report.memory import PARTS, Peak

if TYPE_CHECKING:
    from fxpar.report.report import Report
    from fxpar.report.verdict import Verdict


def as_dict(report: Report) -> dict[str, Any]:
    """What `Report.to_dict` returns: the plan and mesh, a list for each table of the report, the peak (or why it is not known),
    whether it fits into the memory that was named, and what a step takes on its cluster. Bytes are those of one rank, times are
    seconds."""
    plan, mesh, pipeline = report.plan, report.mesh, report.pipeline
    made: dict[str, Any] = {
        "plan": str(plan),
        "world_size": plan.world_size,
        "mesh": dict(zip(mesh.names, mesh.sizes, strict=True)) | ({"pp": plan.pp} if pipeline else {}),
        "parameters": _rows(report.parameters),
        "collectives": _rows(report.collectives),
        "totals": {by: [{**_row(t), "bytes": t.bytes} for t in report.totals(by)] for by in ("strategy", "axes")},
        "memory": dict(report.memory),
        "peak": _peak(report),
        "verdict": _verdict(report),
        "flops": report.flops,
        "step": _step(report),
        "timings": {"parts": dict(report.timings.parts), "passes": dict(report.timings.passes)},
        "cuda_graphs": report.cuda_graphs,
        "tp_comm_overlap": report.tp_comm_overlap,
        "attention": _rows(report.attention),
        "experts": _rows(report.experts),
        "notes": list(report.notes),
    }
    if pipeline is not None:
        schedule = pipeline.schedule
        made["pipeline"] = {
            "schedule": schedule.name,
            "ranks": schedule.ranks,
            "microbatches": schedule.microbatches,
            "virtual_stages": schedule.virtual_stages,
            "stages": _rows(pipeline.stages),
            "rank_rows": _rows(pipeline.ranks),
        }
    return made


def known_peak(report: Report) -> Peak | str:
    """The peak; or, where it cannot be predicted, why."""
    try:
        return report.peak
    except Exception as error:  # whatever stops Inductor must not hide the rest of the report
        return f"not predicted ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def known_verdict(report: Report) -> Verdict | None:
    """Whether the peak fits into the memory that was named; None where none was, or the peak cannot be predicted."""
    return None if report.limit is None or isinstance(known_peak(report), str) else report.verdict


def _verdict(report: Report) -> dict[str, Any] | None:
    made = known_verdict(report)
    if made is None:
        return None
    return {"memory": made.memory, "fits": made.fits, "ways": [{"change": c, "bytes": size} for c, size in made.ways]}


def _peak(report: Report) -> dict[str, Any]:
    peak = known_peak(report)
    if isinstance(peak, str):
        return {"error": peak}
    curve = [{"phase": m.phase, "at": m.at, **dict(zip(PARTS, m.parts, strict=True))} for m in peak.curve]
    return {
        "bytes": peak.bytes,
        "phase": peak.phase,
        "where": peak.where,
        "parts": dict(peak.parts),
        "kept": peak.kept,
        "curve": curve,
    }


def _step(report: Report) -> dict[str, Any]:
    try:
        made = report.step.time()
    except FxparError as error:  # a dtype that the cluster does not compute in
        return {"error": str(error)}
    return {
        "cluster": made.cluster.name,
        "device": made.cluster.device,
        "seconds": made.seconds,
        "optimizer": made.optimizer,
        "bubble": made.timeline.bubble,
        "flops": made.flops,
        "mfu": made.utilization,
    }


def _rows(rows: list[Any]) -> list[dict[str, Any]]:
    return [_row(row) for row in rows]


def _row(row: Any) -> dict[str, Any]:
    found = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
