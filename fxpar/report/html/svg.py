"""svg: elements as text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def tag(name: str, *inner: str, **attributes: object) -> str:
    """An element. inner: markup, as it is. attributes: escaped; ``class_`` is class, ``data_t`` is data-t; None is left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{''.join(inner)}</{name}>" if inner or name not in EMPTY else f"<{name}{said}/>"


EMPTY = ("rect", "path", "line", "circle")
"""Elements that may close themselves."""


def words(text: object) -> str:
    """Text as markup."""
    return escape(str(text))


def drawing(width: float, height: float, *inner: str, label: str) -> str:
    """An SVG that is as wide as there is room. label: what a screen reader says of it."""
    return tag(
        "svg",
        *inner,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        style=f"max-width:{width:g}px;min-width:{min(width, 640):g}px",
    )


def bar(x: float, y: float, width: float, height: float, kind: str, text: str, label: str = "") -> str:
    """A bar of a timeline with what the pointer shows, and a label where there is room for it."""
    made = tag("rect", class_=f"bar {kind}", x=x, y=y, width=max(width, 0.4), height=height, data_t=text)
    if label and width > 5.6 * len(label) + 6:
        made += tag("text", words(label), class_="on", x=x + width / 2, y=y + height / 2 + 3.5)
    return made


def legend(entries: list[tuple[str, str]]) -> str:
    """(class of the colour, what it is)."""
    return tag("p", *(tag("span", tag("i", class_=f"swatch {kind}"), words(name)) for kind, name in entries), class_="legend")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: int = 0) -> str:
    """A table of markup. numbers: how many columns, from the right, are numbers."""
    classes = ["n" if i >= len(head) - numbers else None for i in range(len(head))]
    top = tag("tr", *(tag("th", words(cell), class_=c) for cell, c in zip(head, classes, strict=True)))
    body = (tag("tr", *(tag("td", cell, class_=c) for cell, c in zip(row, classes, strict=True))) for row in rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), class_="wide")


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
