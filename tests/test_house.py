"""How the house is built: imports go one way, and PyTorch's private parts are touched in one room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"errors", "compat"},
    {"plan"},
    {"sharding", "pipeline"},
    {"model", "ops"},
    {"program"},
    {"passes.rewrite", "passes.infer", "cost"},
    {"passes.canonical", "passes.place"},
    {"passes.capture", "passes.strategies", "passes.partition"},
    {"passes.pipeline"},
    {"backends.transport", "backends.simulate", "backends.tables", "backends.remat", "backends.repeats"},
    {"backends.trace", "backends.split"},
    {"backends.stepped"},
    {"backends.eager", "backends.inductor"},
    {"compiler"},
    {"report"},
    {"run"},
    {"verify", "checkpoint", "api"},
    {"testing", "cli"},
)
"""Parts of the package, from the ground up: each imports from floors below its own alone. Folders are parts, and in
passes and backends their folders and files."""
PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_)[\w.]+")
ALLOWED = ("torch._foreach_", "torch._ops.OpOverload", "torch.utils._pytree", "torch.utils._python_dispatch", "torch._dynamo.",
           "torch.ops.")
"""PyTorch documents these although their names begin with an underscore; that of Dynamo is compared with, not imported."""


FINER = (["passes"], ["backends"])
"""Folders whose own folders and files are parts."""


def part_of(path: list[str]) -> str:
    """The part that a file belongs to: the names of its folders and its own, within fxpar."""
    return ".".join(path[: 2 if path[:1] in FINER else 1]).removesuffix(".py")


def files() -> Iterator[tuple[str, Path]]:
    """(part, file) of the library."""
    for folder in ("fxpar", "passes", "backends"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).parts
            if folder == "fxpar" and inner[0] in ("passes", "backends"):
                continue  # links to the folders beside
            yield part_of([*([] if folder == "fxpar" else [folder]), *inner]), file


def imports(file: Path) -> Iterator[str]:
    """Parts of the package that a file imports when it is loaded or run, not for types alone."""
    tree = ast.parse(file.read_text())
    typing = {inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
              for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing and (node.module or "").split(".")[0] == "fxpar":
            module = (node.module or "").split(".")[1:]
            yield from [part_of(module)] if len(module) > (module[:1] in FINER) else [
                part_of([*module, alias.name]) for alias in node.names]


def test_imports_go_one_way():
    floor = {part: i for i, parts in enumerate(FLOORS) for part in parts}
    for part, file in files():
        if part.endswith(("__init__", "__main__")):
            continue
        for other in imports(file):
            assert other == part or floor[other] < floor[part], f"{file.relative_to(ROOT)} imports {other}, which is not below it"


def test_every_part_has_a_floor():
    assert {part for part, _ in files() if not part.endswith(("__init__", "__main__"))} == set().union(*FLOORS)


def test_private_parts_of_pytorch_are_touched_in_compat_alone():
    for part, file in files():
        if part == "compat":
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = line.partition("#")[0]
            found = [m[0] for m in PRIVATE.finditer(code) if not m[0].startswith(ALLOWED)]
            found += re.findall(r"from torch[\w.]* import (?:.*, )?(_\w+)", code.replace("_pytree", "pytree"))
            assert not found, f"{file.relative_to(ROOT)}:{number} touches {found[0]}"
