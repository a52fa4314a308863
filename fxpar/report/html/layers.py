"""layers: parameters and their layouts as a table that folds, equal layers once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxpar.report.html.svg import table, tag, words
from fxpar.report.text import ranges
from fxpar.report.words import dims_of_layout, many, plural, size

if TYPE_CHECKING:
    from fxpar.report.report import ParameterRow, Report


def layers(report: Report) -> str:
    """A part that folds for each kind of layer and for each other module."""
    parts: dict[str, list[tuple[str, int, ParameterRow]]] = {}
    for name, count, row in report.grouped():
        parts.setdefault(_part(name), []).append((name, count, row))
    return "".join(_fold(report, part, rows) for part, rows in parts.items())


def _part(name: str) -> str:
    """The layer (up to its ``*``), or the module, that a parameter belongs to."""
    head, star, _ = name.partition("*")
    return head + star if star else name.rpartition(".")[0]


def _fold(report: Report, part: str, rows: list[tuple[str, int, ParameterRow]]) -> str:
    held, most = sum(count * row.local_bytes for _, count, row in rows), max(count for _, count, _ in rows)
    numbers = sum(count * math.prod(row.shape) for _, count, row in rows)
    about = [plural(most, "equal layer")] if part.endswith("*") and most > 1 else []
    about += [f"{many(numbers)} parameters", f"{size(held)} on a rank"]
    head = tag("summary", tag("b", words(part or "the model")), tag("span", words(", ".join(about)), class_="note"))
    stages = report.pipeline is not None
    body = table(
        ("parameter", "shape", "dims, and the axes that split them", "a rank holds", *(["stages"] if stages else []), "bytes"),
        [
            (
                words(name.removeprefix(part).lstrip(".") or name),
                words(" x ".join(map(str, row.shape)) or "scalar"),
                chips(row.layout),
                words(" x ".join(map(str, row.local_shape)) or "scalar"),
                *([words(ranges(row.stages) or "all")] if stages else []),
                words(size(row.local_bytes)),
            )
            for name, _, row in rows
        ],
        numbers=1,
    )
    return tag("details", head, body, open="" if part.endswith("*") else None)


def chips(layout: str) -> str:
    """A layout, its dims in order: what each is, and a mark for each axis that splits it."""
    dims = [
        words(dim.name or "-") + "".join(tag("span", words(axis), class_="chip") for axis in dim.axes)
        for dim in dims_of_layout(layout)
    ]
    return tag("span", words(" · ").join(dims), class_="dims")
