"""What reports are printed with."""

from __future__ import annotations

from collections.abc import Sequence

MIB, GIB = 2**20, 2**30


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table; columns as wide as they have to be."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *rows]]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours together: "0 to 2, 5"."""
    begins = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(begins, ends, strict=True))
