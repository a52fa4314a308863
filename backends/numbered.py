"""numbered: names of the modules that equal blocks stand for, numbered from the first block to the last."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

STACKS = ("nn_module_stack", "fwd_nn_module_stack")


def number(members: dict[int, fx.Node]) -> None:
    """Number the modules that the members stand for from the first to the last, whose numbers are right."""
    for q, key, stack in list(names(members)):
        members[q].meta[key] = stack


def names(members: dict[int, fx.Node]) -> Iterator[tuple[int, str, dict[str, tuple]]]:
    """Of each member, under each key of `STACKS`: the modules that it stands for, as they would be numbered."""
    low, high = min(members), max(members)
    for key in STACKS:
        first, last = members[low].meta.get(key), members[high].meta.get(key)
        if not first or not last or len(first) != len(last):
            continue
        for q in members:
            yield q, key, {k: (between(a[0], b[0], q - low, high - low), *a[1:])
                           for (k, a), b in zip(first.items(), last.values(), strict=True)}


def between(a: str, b: str, step: int, steps: int) -> str:
    """The path that is `step` of `steps` on the way from one to another, which differs from it in numbers."""
    parts, ends = a.split("."), b.split(".")
    if len(parts) != len(ends):
        return a
    for i, (x, y) in enumerate(zip(parts, ends, strict=True)):
        if x != y and x.isdigit() and y.isdigit():
            parts[i] = str(int(x) + (int(y) - int(x)) * step // steps)
    return ".".join(parts)
