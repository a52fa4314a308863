"""profiles: whether PyTorch's profiler listens, and the ranges that it sees of code which Inductor generated.

Inductor writes a comment before every kernel that the code of a graph calls, with the names of the operators that are computed in
it. `name_in_code` puts a name of fxpar's there, so that what is kept on disk has it, too. While a profiler listens, functions of
such code have a second body (`follow_profiler`): the first, with a range of that name around each call.
"""

from __future__ import annotations

import ast
import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch.autograd.profiler as profiler
from torch import fx
from torch.fx.traceback import NodeSource

MARK = re.compile(r"<fxpar(!?) ([^<>]*)>")
"""A name in a comment; ``!``: of an operator that no other is computed with."""
RANGE = "_fxpar_range"
"""What the second bodies call a range by."""
PREPARES = re.compile(r"(assert_\w+|empty_strided\w*|reinterpret_tensor|get_raw_stream|alloc_from_pool|_alloc_from_pool|clear)$")
"""Functions that generated code calls before a kernel, and that are none."""
_renamed = threading.local()
_bodies: dict[FunctionType, tuple[CodeType, CodeType]] = {}
"""Functions of generated code -> their first and second bodies."""
_read: set[int] = set()
"""Modules of generated code that were looked at, by ``id``."""
_on = False


def profiling() -> bool:
    """Whether a profiler (`torch.profiler.profile`, or ``torch.autograd.profiler.emit_nvtx``) records ranges now."""
    return bool(profiler._is_profiler_enabled)


def ranged(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range that a profiler sees, if one listens."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING


_NOTHING = contextlib.nullcontext()


def name_in_code(node: fx.Node, name: str, alone: bool = False) -> None:
    """Have the comments of generated code call an operator by a name, without ``<``, ``>`` and line breaks. alone: whether the
    operator is called as such, and not computed in a kernel with others."""
    source: Any = NodeSource(None)
    source.node_info = NodeSource.NodeInfo(f"<fxpar{'!' if alone else ''} {name}>", str(node.target), 0)
    node.meta["from_node"] = [source]


@contextlib.contextmanager
def comments_on_cpus() -> Iterator[None]:
    """Inside, code for CPUs has comments before its kernels as code for GPUs does."""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.utils import get_kernel_metadata
    from torch._inductor.virtualized import V

    original = CppScheduling.codegen_comment

    def codegen_comment(self: Any, node_schedule: Any, kernel_name: Any = None) -> None:
        comment, _ = get_kernel_metadata(node_schedule, V.graph.wrapper_code)
        V.graph.wrapper_code.make_comment(comment)
        original(self, node_schedule, kernel_name)

    with mock.patch.object(CppScheduling, "codegen_comment", codegen_comment):
        yield


def follow_profiler() -> None:
    """Give all generated code that has names its second bodies if a profiler listens, and its first if none does any more."""
    global _on
    if profiling():
        if not _on or _new_modules():
            for module in _new_modules():
                _read.add(id(module))
                _bodies.update(_second_bodies(module))
            for function, (_, second) in _bodies.items():
                function.__code__ = second
            _on = True
    elif _on:
        for function, (first, _) in _bodies.items():
            function.__code__ = first
        _on = False


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, ranges of this thread have other names of modules: of code that several equal blocks share."""
    before = getattr(_renamed, "names", {})
    _renamed.names = names
    try:
        yield
    finally:
        _renamed.names = before


def _new_modules() -> list[ModuleType]:
    from torch._inductor.codecache import PyCodeCache

    return [m for m in PyCodeCache.modules if id(m) not in _read]


def range_of(text: str) -> Any:
    names = getattr(_renamed, "names", {})
    if names:
        one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        text = re.sub(rf"(?<![\w.])({one})(?!\w)", lambda found: names[found[1]], text)
    return profiler.record_function(text)


def _second_bodies(module: ModuleType) -> dict[FunctionType, tuple[CodeType, CodeType]]:
    """The functions of a module of generated code that have names in their comments, with both bodies."""
    file = getattr(module, "__file__", None)
    text = Path(file).read_text() if file and Path(file).exists() else ""
    if not MARK.search(text):
        return {}
    tree = ast.parse(text, str(file))
    lines = text.splitlines()
    holders = [(module, tree.body), *((getattr(module, c.name, None), c.body) for c in tree.body if isinstance(c, ast.ClassDef))]
    functions = {d: getattr(holder, d.name, None) for holder, body in holders for d in body if isinstance(d, ast.FunctionDef)}
    found = {d: f for d, f in functions.items() if isinstance(f, FunctionType) and f.__code__.co_firstlineno == d.lineno}
    for definition in found:
        definition.body = with_ranges(definition.body, lines, definition.lineno)
    made = {(c.co_name, c.co_firstlineno): c for c in _codes(compile(ast.fix_missing_locations(tree), str(file), "exec"))}
    setattr(module, RANGE, range_of)
    return {f: (f.__code__, made[d.name, d.lineno]) for d, f in found.items()}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def with_ranges(body: list[ast.stmt], lines: list[str], line: int) -> list[ast.stmt]:
    """Statements, with a range around each that runs what a comment before it names. line: of what is before the first."""
    made: list[ast.stmt] = []
    waiting: list[tuple[str, str]] = []
    for statement in body:
        comments = [text for text in lines[line : statement.lineno - 1] if MARK.search(text)]
        waiting = MARK.findall(comments[-1]) if comments else waiting
        line = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.With):
            statement.body = with_ranges(statement.body, lines, statement.lineno)
        elif waiting and _runs(statement):
            name = ast.Call(ast.Name(RANGE, ast.Load()), [ast.Constant(_label(waiting, _called(statement)))], [])
            statement = ast.copy_location(ast.With([ast.withitem(name)], [statement]), statement)
            waiting = []
        made.append(statement)
    return made


def _runs(statement: ast.stmt) -> bool:
    """Whether a statement calls anything but what prepares a call."""
    return any(not PREPARES.match(name) for name in _called(statement))


def _called(statement: ast.stmt) -> list[str]:
    """The functions that a statement calls: "mm" of ``extern_kernels.mm(...)`` and of ``torch.ops.aten.mm.default(...)``,
    "kernel" of ``kernel.run(...)``."""
    found = [n.func for n in ast.walk(statement) if isinstance(n, ast.Call)]
    inner = [f.value if isinstance(f, ast.Attribute) and f.attr in ("default", "run") else f for f in found]
    return [f.attr if isinstance(f, ast.Attribute) else f.id for f in inner if isinstance(f, ast.Attribute | ast.Name)]


def _label(names: list[tuple[str, str]], called: list[str]) -> str:
    """The names of a comment, those of one module together: "layers.0.norm: mean, rsqrt; layers.0.relu: relu".

    A comment has names of what is read through views, too: where an operator is called as such, it is that one; where a kernel
    is, those that may be computed in one are left, but of a template, which is a product and what follows it.
    """
    of: dict[str, dict[str, None]] = {}
    split = [(alone, *name.rpartition(": ")[::2]) for alone, name in names]
    itself = [s for s in split if s[0] and any(f"{c}_".startswith(f"{s[2].partition(' ')[0]}_") for c in called)]
    fused = split if any("_tem_" in c for c in called) else [s for s in split if not s[0]]
    for _, where, what in itself or fused or split:
        of.setdefault(where, {})[what] = None
    return "; ".join(f"{where}: {', '.join(what)}" if where else ", ".join(what) for where, what in of.items())
