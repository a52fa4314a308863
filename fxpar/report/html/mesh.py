"""mesh: the ranks as a picture, and what each axis of the mesh splits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxpar.report.html.svg import drawing, table, tag, words
from fxpar.report.words import dims_of_layout, plural, short, size, starred
from fxpar.sharding.mesh import KIND

if TYPE_CHECKING:
    from fxpar.report.report import Report

MOST = 1024
"""Ranks that are drawn; of more, the first."""
CELL, GAP, LETTERS = 17.0, 3.0, 6.5
"""Of a drawing of few ranks; LETTERS: the height of what is written, which grows with the number of ranks."""
ROOM, SHOWN = 220.0, 440.0
"""How wide the drawing of few ranks may be, and to how much it is drawn larger."""
MEANS = {
    "dp": "other rows of the batch",
    "cp": "other parts of every sequence",
    "tp": "parts of every layer",
    "pp": "other layers",
    "ep": "other experts",
}


def axes_of(report: Report) -> list[tuple[str, int]]:
    """(name, ranks) of all axes, major to minor; pipeline ranks are the most major one."""
    pipes = [(KIND, report.plan.pp)] if report.plan.pp > 1 else []
    return [*pipes, *((n, s) for n, s in zip(report.mesh.names, report.mesh.sizes, strict=True) if s > 1)]


def picture(report: Report) -> str:
    """Every rank as a square, those of the minor axes beside each other; the pointer on one shows its groups."""
    axes, left = axes_of(report), report.plan.world_size
    shown = list(axes)
    while left > MOST and shown:
        left //= shown.pop(0)[1]
    strides, stride = {}, 1
    for name, count in reversed(axes):
        strides[name] = (stride, count)
        stride *= count
    room = max(ROOM, 1.3 * math.sqrt(left) * (CELL + GAP))
    letters = LETTERS * max(1.0, _box(shown, 0, strides, room, LETTERS)[0] / SHOWN * 1.6)
    width, height, parts = _box(shown, 0, strides, room, letters)
    scale = min(2.2, max(1.0, SHOWN / width))
    inner = tag("g", *parts, transform=f"translate(1 1) scale({scale:.3f})")
    made = drawing(width * scale + 2, height * scale + 2, inner, label=f"{report.plan.world_size} ranks")
    buttons = "".join(
        tag("button", words(f"{name} = {count}"), type="button", data_stride=strides[name][0], data_count=count, class_="axis")
        for name, count in axes
    )
    more = f" The first {left:,} of {report.plan.world_size:,} ranks are drawn." if left < report.plan.world_size else ""
    said = (
        "Ranks of one colour are one group along the axis that is chosen: they communicate with each other. The pointer on a "
        "rank picks its group out."
        if axes
        else ""
    )
    return tag(
        "div",
        tag("div", buttons, class_="axes"),
        tag("div", made, class_="wide mesh"),
        tag("p", words(said + more), class_="note"),
    )


def _box(axes: list[tuple[str, int]], first: int, strides: dict[str, tuple[int, int]], room: float, letters: float
         ) -> tuple[float, float, list[str]]:
    """(width, height, markup) of the ranks from `first` on that lie along these axes: along every other axis beside each other,
    as many as there is room for, else below each other."""
    if not axes:
        number = tag("text", str(first), x=CELL / 2, y=CELL / 2 + 3, class_="rank") if first < 1000 else ""
        return CELL, CELL, [tag("g", tag("rect", width=CELL, height=CELL, rx=3), number, class_="cell", data_rank=first)]
    (name, count), rest = axes[0], axes[1:]
    boxes = [_box(rest, first + i * strides[name][0], strides, room, letters) for i in range(count)]
    gap, (width, height, _) = GAP * (1 + len(rest)), boxes[0]
    fit = 2 ** int(math.log2(max(1.0, (room + gap) // (width + gap)))) if len(rest) % 2 == 0 else 1
    head, parts = 1.4 * letters if rest and not (len(rest) == 1 and count > 8) else 0.0, []
    for i, (_, _, inner) in enumerate(boxes):
        x, y = i % fit * (width + gap), i // fit * (height + head + gap)
        label = tag("text", words(f"{name} {i}"), x=0, y=letters, class_="tick", style=f"font-size:{letters:g}px") if head else ""
        parts.append(tag("g", label, tag("g", *inner, transform=f"translate(0 {head:g})"), transform=f"translate({x:g} {y:g})"))
    beside, below = min(fit, count), -(-count // fit)
    return beside * (width + gap) - gap, below * (height + head + gap) - gap, parts


def axes_table(report: Report) -> str:
    """A line for each axis: its ranks, what they have that others have not, which dims lie on it, what goes over it."""
    totals = {t.name: t for t in report.totals("axes")}
    rows = []
    for name, count in axes_of(report):
        strategy = next((s for s in ("cp", "tp", "dp") if name in report.mesh.axes(s)), name)
        also = [s for s in ("ep",) if name in report.mesh.axes(s)]
        means = "; ".join(MEANS[s] for s in [strategy, *also] if s in MEANS)
        over = sum(t.bytes for n, t in totals.items() if name in n.split("+"))
        rows.append((tag("b", words(name)), words(count), words(means), _dims(report, name), words(size(over))))
    return (
        table(("axis", "ranks", "its ranks have", "and split, of parameters", "a rank, a step"), rows, numbers=1)
        if rows
        else tag("p", "One rank: nothing is split, and nothing communicated.")
    )


def _dims(report: Report, axis: str) -> str:
    """What an axis splits: "ffn of mlp.down_proj, mlp.up_proj"."""
    found: dict[str, dict[str, None]] = {}
    for p in report.parameters:
        for i, dim in enumerate(dims_of_layout(p.layout)):
            if axis in dim.axes:
                found.setdefault(dim.name or f"dim {i}", {})[short(starred(p.name).rpartition(".")[0])] = None
    lines = []
    for name, modules in found.items():
        few = ", ".join(list(modules)[:3]) + (f" and {plural(len(modules) - 3, 'other')}" if len(modules) > 3 else "")
        lines.append(tag("div", tag("b", words(name)), words(f" of {few}")))
    return "".join(lines) or words("-")
