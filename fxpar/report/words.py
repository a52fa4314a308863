"""words: layouts and modules as people read them.

A layout in a program is written by its factors: ``[heads8/tp heads2 head_dim64, hidden1024]``, where what has no role is called
by a letter (``axm2/tp``). A reader of a report wants to know what a dim is, how long it is, and what splits it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxpar.passes.infer.roles import ROLES
from fxpar.sharding.mesh import DEGREES, KIND, Mesh

_TOKEN = re.compile(rf"({'|'.join(sorted(ROLES, key=len, reverse=True))}|none|[a-z]+)?(\d+(?:/\d+)?)((?:/[a-z]\w*)*)")
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


@dataclass(frozen=True)
class DimWords:
    """A dim: what it is ("heads x head_dim"; "" where nothing is known), and the axes that split it."""

    name: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return (self.name or "-") + "".join(f"/{axis}" for axis in self.axes)


def without_letters(layout: str) -> str:
    """A layout as a program has it, without the letters of factors that have no role: ``[2/tp, hidden64]``."""
    return _TOKEN.sub(lambda m: (m[1] if m[1] in ROLES else "") + m[2] + m[3], layout)


def dims_of_layout(layout: str) -> list[DimWords]:
    """The dims of a layout as a program has it. "hidden" is what remains of weights' dims, so a dim that is something else,
    too, is called by that alone."""
    made = []
    for dim in layout.strip("[]").split(","):
        tokens = [(m[1] or "", m[3]) for m in _TOKEN.finditer(dim)]
        names = list(dict.fromkeys(role for role, _ in tokens if role in ROLES))
        names = [n for n in names if n != "hidden"] or names
        axes = [axis for _, along in tokens for axis in along.split("/") if axis]
        made.append(DimWords(" x ".join(names), tuple(dict.fromkeys(axes))))
    return made


def layout_words(layout: str) -> str:
    """A layout as a program has it, without lengths: "[heads x head_dim/tp, hidden/dp]"."""
    return f"[{', '.join(map(str, dims_of_layout(layout)))}]" if layout else ""


def mesh_words(mesh: Mesh, stages: int = 1) -> str:
    """A mesh, and of which axes the strategies are that have none of their name: "dp0=2 x dp1=8 (dp: dp0 x dp1; ep: dp1)".
    stages: how many ranks a pipeline has, whose axis is major to all."""
    of = {s: mesh.axes(s) for s in (*DEGREES, "ep")}
    said = "; ".join(f"{s}: {' x '.join(axes)}" for s, axes in of.items() if axes and axes != (s,))
    return (f"{KIND}={stages} x " if stages > 1 else "") + str(mesh) + (f" ({said})" if said else "")


def starred(path: str) -> str:
    """A module's path with the numbers of layers replaced by ``*``: "model.layers.*.mlp"."""
    return re.sub(r"\b\d+\b", "*", path)


def short(path: str, last: int = 2) -> str:
    """The last names of a module's path: "mlp.down_proj"; "the model" for the model itself."""
    return ".".join([part for part in path.split(".") if part and not part.isdigit() and part != "*"][-last:]) or "the model"


def plural(count: int, thing: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def many(count: int) -> str:
    """A number of parameters: "4,096", "131.1 million", "68.45 billion"."""
    return next((f"{count / by:,.{digits}f} {unit}" for unit, by, digits in (("billion", 10**9, 2), ("million", 10**6, 1))
                 if count >= by), f"{count:,}")


def size(count: float) -> str:
    """Bytes: "1.50 GiB", "24.0 MiB", "12 KiB", "7 B"."""
    for unit, by, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 0)):
        if count >= by:
            return f"{count / by:,.{digits}f} {unit}"
    return f"{count:.0f} B"


def seconds(count: float) -> str:
    """ "1.23 s", "45.6 ms", "7.8 us"."""
    unit, by = next(((u, b) for u, b in (("s", 1.0), ("ms", 1e-3)) if count >= b), ("us", 1e-6))
    return f"{count / by:.3g} {unit}"
