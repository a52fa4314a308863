"""What expert parallelism makes of a model: how tokens reach the experts of each layer, and what is communicated for that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxpar.ops.collectives import typed
from fxpar.ops.exchange import exchange_plan
from fxpar.ops.experts import order_of_mine
from fxpar.program import Program, module_path
from fxpar.report.text import MIB, table
from fxpar.sharding.facts import local_value
from fxpar.sharding.mesh import Axes


@dataclass(frozen=True)
class ExpertsRow:
    """Experts of layers alike.

    where: the module (layer numbers replaced by ``*``). count: how many a step has. dispatch: "alltoall", or "allgather", which a
    region also has whose tokens cannot be split. axes: along which ranks have other experts. sent: bytes of what is communicated
    along these for one of them, on one rank, if a router sends each expert as many tokens: forward and backward.
    """

    where: str
    count: int
    dispatch: str
    axes: Axes
    sent: tuple[int, int]


def experts_rows(program: Program, count: int) -> list[ExpertsRow]:
    """Those of a step of `count` microbatches, of which the partitioned program runs one; none without expert parallelism."""
    found: dict[tuple[str, str, Axes, tuple[int, int]], int] = {}
    axes = tuple(a for a in program.mesh.axes("ep") if program.mesh.size(a) > 1)
    for node in program.graph.nodes:
        dispatch = {exchange_plan: "alltoall", order_of_mine: "allgather"}.get(node.target)
        if dispatch is not None and axes:
            key = re.sub(r"\b\d+\b", "*", module_path(node)), dispatch, axes, _sent(program, module_path(node), axes)
            found[key] = found.get(key, 0) + count
    return [ExpertsRow(where, n, dispatch, along, sent) for (where, dispatch, along, sent), n in found.items()]


def _sent(program: Program, where: str, axes: Axes) -> tuple[int, int]:
    """Bytes of activations that a module has communicated along any of these axes."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and module_path(n) == where and _moves(n, axes)]
    back = [n for n in nodes if local_value(n).needs_grad and program.training]
    return sum(local_value(n).bytes for n in nodes), sum(local_value(n).bytes for n in back)


def _moves(node: fx.Node, axes: Axes) -> bool:
    made = typed(node)
    return made is not None and made.forward.comm is not None and bool({*made.axes} & {*axes}) and not local_value(node).unshard


def lines_of_experts(rows: Sequence[ExpertsRow]) -> list[str]:
    """The rows as a table."""
    return table(("experts", "count", "dispatch", "over", "MiB forward", "MiB backward"), [
        (r.where, str(r.count), r.dispatch, "+".join(r.axes), *(f"{size / MIB:.2f}" for size in r.sent)) for r in rows])
