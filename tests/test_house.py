"""How the house is built: imports go one way, and PyTorch's private parts, and what passes know of nodes, have a room each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"errors", "progress", "garbage"},
    {"compat"},
    {"plan"},
    {"sharding", "pipeline"},
    {"model", "ops"},
    {"program"},
    {"passes.rewrite", "passes.infer", "cost"},
    {"passes.canonical", "passes.place"},
    {"passes.capture", "passes.strategies", "passes.partition"},
    {"passes.pipeline"},
    {"backends.transport", "backends.simulate", "backends.tables", "backends.remat", "backends.numbered"},
    {"backends.repeats"},
    {"backends.periods"},
    {"backends.trace", "backends.split", "backends.like"},
    {"backends.stepped", "backends.differentiable"},
    {"backends.eager", "backends.inductor"},
    {"compiler"},
    {"report"},
    {"run", "choose"},
    {"verify", "checkpoint", "api"},
    {"testing", "cli", "integrations"},
)
"""Parts of the package, from the ground up: each imports from floors below its own alone. Folders are parts, and in
passes and backends their folders and files."""
PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_)[\w.]+")
ALLOWED = ("torch._foreach_", "torch._ops.OpOverload", "torch.utils._pytree", "torch.utils._python_dispatch", "torch._dynamo.",
           "torch.ops.")
"""PyTorch documents these although their names begin with an underscore; that of Dynamo is compared with, not imported."""

TORCHS = {"val", "stack_trace", "nn_module_stack", "fwd_nn_module_stack", "custom", "recompute", "ac_graph_id", "partitioner_tag",
          "user_visible_output_idxs", "from_node"}
"""Keys of ``node.meta`` that PyTorch reads or writes; what fxpar knows of a node is in the objects of `fxpar.sharding.facts`."""
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


def keys(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, key) of every use of ``x.meta`` by a key: subscripts, lookups, updates, ``in``, and literals assigned to it."""

    def is_meta(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "meta"

    for node in ast.walk(tree):
        found: list[ast.AST | None] = []
        if isinstance(node, ast.Subscript) and is_meta(node.value):
            found = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_meta(node.func.value):
            if node.func.attr in ("get", "setdefault", "pop"):
                found = [*node.args[:1]]
            elif node.func.attr == "update":
                yield from ((node.lineno, keyword.arg) for keyword in node.keywords if keyword.arg is not None)
                found = [key for arg in node.args if isinstance(arg, ast.Dict) for key in arg.keys]
        elif isinstance(node, ast.Compare) and any(is_meta(other) for other in node.comparators):
            found = [node.left]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and any(map(is_meta, node.targets)):
            found = [*node.value.keys]
        yield from ((node.lineno, key.value if isinstance(key, ast.Constant) else ast.unparse(key))
                    for key in found if key is not None)


def test_what_passes_know_of_nodes_is_kept_in_one_module():
    for _, file in files():
        inner = file.relative_to(ROOT).as_posix()
        mine = {"fxpar/sharding/facts.py": {"_GLOBAL", "_LOCAL"}, "backends/inductor/kept.py": {"_CHOICE"},
                "fxpar/program.py": {"key"}, "backends/repeats.py": {"key"},
                "backends/numbered.py": {"key"}}.get(inner, set())
        for number, key in keys(ast.parse(file.read_text())):
            assert key in TORCHS | mine, f"{inner}:{number} uses node.meta[{key!r}]: make it a field in fxpar/sharding/facts.py"


def test_the_check_of_keys_sees_them_all():
    text = """
n.meta["a"] = n.meta.get("b", 0)
n.meta.update({"c": 1, **n.meta}, d=2)
n.meta = {**n.meta, "e": 1}
x = [m.meta.setdefault(KEY, 1) for m in g if "f" not in m.meta]
other["g"], n.meta.update(m.meta), n.meta.items()
"""
    assert sorted(key for _, key in keys(ast.parse(text))) == ["KEY", "a", "b", "c", "d", "e", "f"]


def test_no_two_classes_have_one_name():
    seen: dict[str, str] = {}
    for _, file in files():
        inner = file.relative_to(ROOT).as_posix()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                other = seen.setdefault(node.name.lstrip("_"), inner)
                assert other == inner, f"{inner} has a class {node.name}, and so has {other}: say what sets them apart"
