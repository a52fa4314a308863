"""Programs as annotated, runnable Python: one line a value, with its layout and the user's line that made it. Of equal blocks one
is written, and called for all."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxpar.errors import FxparError
from fxpar.ops.collectives import typed
from fxpar.program import Program, user_line
from fxpar.report.blocks import Blocks, equal_blocks
from fxpar.sharding.factors import Factor, leaves
from fxpar.sharding.facts import global_value, if_local, sharding_at

_BINARY = {operator.mul: "*", operator.add: "+", operator.sub: "-", operator.floordiv: "//"}


class Dumper:
    """An observer of the compiler that writes ``00_capture.py``, ``01_simplify.py``, ... into a directory."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.count = 0

    def __call__(self, name: str, program: Program) -> None:
        self.count = 0 if name == "capture" else self.count + 1
        text = readable(program, name)
        _write(self.directory / f"{self.count:02d}_{name}.py", text)


def _write(file: Path, text: str) -> None:
    """Raises: `FxparError` for a link, behind which another file would be overwritten, and where nothing can be written."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "w", encoding="utf-8") as made:
            made.write(text)
    except OSError as error:
        what = "it is a link, and is not written through" if file.is_symlink() else str(error)
        raise FxparError(f"no dump in {file}: {what}; remove it, or give another dump_dir") from error


def _one_line(text: str) -> str:
    """Text of the model (names, files), so that a comment stays one: what does not print, or ends a line, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(program: Program, stage: str = "replicas") -> str:
    """The program as a Python module: `forward` on flat inputs, the block that it calls where several are equal, and a main that
    runs it on made-up ones."""
    local = any(if_local(n).sharding is not None for n in program.placeholders())
    modules = sorted({n.target.__module__ for n in program.graph.nodes if n.op == "call_function" and _ours(n.target)})
    plan = _one_line(str(program.plan)).replace("\\", "\\\\").replace('"', '\\"')  # it names inputs and modules of the model
    lines = [f'"""After pass {stage!r}. Plan {plan}; mesh {program.mesh}; '
             f'{"one rank of it" if local else "all of it, on one device"}."""', "", "import torch",
             *(f"import {m}" for m in modules), "from torch import device", "", "inf, nan = float('inf'), float('nan')"]
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    blocks = equal_blocks(program.graph)
    function = next(name for name in _names("block") if name not in {n.name for n in program.graph.nodes})
    if blocks is not None:
        lines += ["", "", *_block(function, blocks)]
    lines += ["", "", "def forward("]
    for node, source in zip(program.placeholders(), program.sources, strict=True):
        lines.append(f"    {node.name},{_comment(node, f'{source.kind} {source.name}')}")
    lines.append("):")
    if blocks is None:
        lines += _body(nodes)
    else:
        begin, end = nodes.index(blocks.members[0][0]), nodes.index(blocks.members[-1][-1]) + 1
        lines += [*_body(nodes[:begin]), *_calls(function, blocks), *_body(nodes[end:])]
    outs = ", ".join(n.name for n in program.outputs())
    lines += [f"    return ({outs}{',' if outs else ''})", "", "", *_main(program, local), ""]
    return "\n".join(lines)


def _names(name: str) -> Iterator[str]:
    while True:
        yield name
        name += "_"


def _body(nodes: list[fx.Node], arguments: list[tuple[tuple, dict[str, Any]]] | None = None) -> list[str]:
    """A line for each operator, and the user's lines that made them. arguments: those of the operators, instead of their own."""
    lines, path = [], None
    for i, node in enumerate(nodes):
        line = user_line(node)
        if line != path and line:
            lines.append(f"    # {_one_line(_short(line))}")
            path = line
        args, kwargs = arguments[i] if arguments is not None else (node.args, node.kwargs)
        lines.append(f"    {node.name} = {_expression(node, args, kwargs)}{_comment(node)}")
    return lines


def _block(function: str, blocks: Blocks) -> list[str]:
    """The first of equal blocks, as a function of what it takes."""
    outs = "".join(f"{blocks.members[0][i].name}, " for i in blocks.given)
    return [f"def {function}(", *(f"    {read[0].name},{_comment(read[0])}" for read in blocks.taken),
            *(f"    {name},  # differs" for name in blocks.numbers), "):",
            f'    """{_one_line(blocks.names[0])}, and {len(blocks.members) - 1} more that are equal."""',
            *_body(blocks.members[0], blocks.arguments), f"    return ({outs.rstrip()})"]


def _calls(function: str, blocks: Blocks) -> list[str]:
    first = blocks.names[0]
    lines = []
    for k, (block, name) in enumerate(zip(blocks.members, blocks.names, strict=True)):
        outs = "".join(f"{block[i].name}, " for i in blocks.given)
        given = ", ".join([*(read[k].name for read in blocks.taken), *(repr(values[k]) for values in blocks.numbers.values())])
        lines.append(f"    ({outs.rstrip()}) = {function}({given})  # {_one_line(name if not k else f'{name} as {first}')}")
    return lines


def _short(line: str) -> str:
    file, _, rest = line.partition(":")
    return f"{'/'.join(Path(file).parts[-3:])}:{rest}"


def _expression(node: fx.Node, arguments: tuple, kwargs: dict[str, Any]) -> str:
    if node.op == "get_attr":
        return f"ATTRIBUTES[{node.target!r}]"
    args = [_text(a) for a in arguments]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if node.target in _BINARY:
        return f"{args[0]} {_BINARY[node.target]} {args[1]}"
    return f"{_callee(node.target)}({', '.join([*args, *(f'{k}={_text(v)}' for k, v in kwargs.items())])})"


def _ours(target: Any) -> bool:
    return getattr(target, "__module__", "").startswith("fxpar")


def _callee(target: Any) -> str:
    """Written in full, because values are named after the functions that made them."""
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    return f"{target.__module__}.{target.__name__}" if _ours(target) else target.__name__


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value)


def _comment(node: fx.Node, extra: str = "") -> str:
    parts = [extra] if extra else []
    dims = global_value(node).dims
    if if_local(node).layout_text:
        parts.append(if_local(node).layout_text)
    elif dims is not None:
        parts.append(f"[{', '.join(' '.join(_factor(f) for f in leaves(d)) or '1' for d in dims)}]")
    elif isinstance(node.meta.get("val"), torch.Tensor):
        value = node.meta["val"]
        parts.append(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
    made = typed(node)
    if made is not None:
        parts.append(f"{made.label} over {', '.join(made.axes)} for {if_local(node).made_for}")
    return f"  # {_one_line('; '.join(parts))}" if parts else ""


def _factor(factor: Factor) -> str:
    return f"{factor.role}{factor.size}" if factor.role else repr(factor)


def _main(program: Program, local: bool) -> list[str]:
    """Runs the program on made-up inputs; a local one as a rank whose partners all hold the same."""
    lines = ["def made_up_inputs():", "    return ["]
    for node, source in zip(program.placeholders(), program.sources, strict=True):
        known = if_local(node).full
        value = node.meta.get("val") if known is None else known
        if not isinstance(value, torch.Tensor):
            lines.append("        None,")
            continue
        shape = list(value.shape)
        if local and if_local(node).sharding is not None:
            size = program.mesh.size
            shape = [math.prod(p.size // size(*p.axes) for p in dim) for dim in sharding_at(node)]
        make = "torch.rand" if value.is_floating_point() else "torch.zeros"
        lines.append(f"        {make}({shape}, dtype={value.dtype}),  # {_one_line(source.name)}")
    lines += ["    ]", "", "", 'if __name__ == "__main__":']
    call = "print([tuple(t.shape) for t in forward(*made_up_inputs())])"
    if local:
        sizes = dict(zip(program.mesh.names, program.mesh.sizes, strict=True))
        lines += ["    from fxpar.ops.runtime import LoneRuntime, use_runtime", "",
                  f"    with use_runtime(LoneRuntime({sizes})):", f"        {call}"]
    else:
        lines.append(f"    {call}")
    return lines
