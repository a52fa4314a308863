"""cut: a graph that is cut into pieces, and how they are run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

Step = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Which code runs, the slots of its inputs, those to empty before it runs, those of its outputs, and those to empty after it."""


@dataclass
class GraphPiece:
    """A piece of a graph; values are in numbered slots.

    kind: which graph computes it. takes, gives: the slots of its inputs and outputs. before, after: those to empty before it
    runs (what was in them, it is handed) and when it has. fixed, donated: positions among its inputs of those that stay where
    they are in memory, and of those that it may overwrite. exact: positions of the outputs that have to lie in memory as the
    graph says. counted: what those outputs are like (fake) of which a size is known only when it runs, by position. names: of
    blocks that the graph says it is of -> of those that this piece is of, where these are others.
    """

    kind: int
    takes: list[int]
    gives: list[int]
    before: list[int]
    after: list[int]
    fixed: list[int]
    donated: list[int]
    exact: list[int]
    counted: dict[int, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass
class Pieces:
    """A graph as pieces, to be run in order.

    graphs: one for each class of equal pieces. inputs: what the graph's inputs are like, which are in the first slots. slots: how
    many there are. results: the slots of its outputs; None for an output that is None.
    """

    graphs: list[fx.GraphModule]
    pieces: list[GraphPiece]
    inputs: list[Any]
    slots: int
    results: list[int | None]


def is_counted(value: Any) -> bool:
    """Whether a value of a trace is, or has, a size that is known only when the graph runs."""
    return isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not all(isinstance(n, int) for n in value.shape))


Cutting = Callable[[fx.GraphModule, Sequence[int], Sequence[int]], Pieces | None]
"""``cutting(module, static, donated)``: the pieces of a graph, or None where it is to be compiled as it is. static, donated: the
positions of inputs that stay where they are in memory, and of those that may be overwritten."""


def schedule(pieces: Pieces, of: Sequence[int]) -> tuple[list[Step], int, list[int | None]]:
    """What `run_pieces` takes besides code: the steps, where piece k runs code ``of[k]``, how many slots have no input, and the
    slots of the results."""
    steps: list[Step] = [(code, tuple(p.takes), tuple(p.before), tuple(p.gives), tuple(p.after))
                         for code, p in zip(of, pieces.pieces, strict=True)]
    return steps, pieces.slots - len(pieces.inputs), pieces.results


def run_pieces(codes: Sequence[Callable[[list[Any]], Sequence[Any]]], steps: Sequence[Step], empty: int,
               results: Sequence[int | None], inputs: list[Any]) -> list[Any]:
    """The results for `inputs`, a list that is emptied. A value is let go as soon as nothing needs it."""
    slots = [*inputs, *[None] * empty]
    inputs.clear()
    for code, takes, before, gives, after in steps:
        given = [slots[i] for i in takes]
        for i in before:
            slots[i] = None
        made = codes[code](given)
        for i, slot in enumerate(gives):
            slots[slot] = made[i]
        del made, given
        for i in after:
            slots[i] = None
    return [None if i is None else slots[i] for i in results]


def one_piece(module: fx.GraphModule, static: Sequence[int] = (), donated: Sequence[int] = (), exact: int = 0) -> Pieces:
    """A graph that is not cut, as `Pieces`. exact: how many of its first outputs have to lie in memory as the graph says; for the
    others see `Cutting`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(module.graph, copies)
    inputs = module.graph.find_nodes(op="placeholder")
    slot = {copies[n]: i for i, n in enumerate(inputs)}
    gives = list(dict.fromkeys(n for n in results if n is not None and n not in slot))
    visible = [i for i, n in enumerate(gives) if n in results[:exact]]
    slot |= {n: len(inputs) + i for i, n in enumerate(gives)}
    kept = {slot[n] for n in results if n is not None}
    graph.output(tuple(gives))
    piece = GraphPiece(0, takes=[*range(len(inputs))], gives=[slot[n] for n in gives],
                       before=[i for i in range(len(inputs)) if i not in kept], after=[], fixed=list(static),
                       donated=list(donated), exact=visible)
    return Pieces([fx.GraphModule(module, graph)], [piece], [n.meta["val"] for n in inputs], len(slot),
                  [None if n is None else slot[n] for n in results])


def interpret_pieces(pieces: Pieces, interpreter: type[fx.Interpreter]) -> Callable[[list[Any]], list[Any]]:
    """What runs them, for a list of inputs that it empties, with `interpreter` in the place of generated code."""
    codes = [functools.partial(_interpreted, graph, interpreter) for graph in pieces.graphs]
    return functools.partial(run_pieces, codes, *schedule(pieces, [p.kind for p in pieces.pieces]))


def interpret_final(interpreter: type[fx.Interpreter], cutting: Cutting | None, module: fx.GraphModule, options: dict[str, Any],
                    donated: Sequence[int] = (), static: Sequence[int] = (), exact: int = 0, like: Sequence[Any] | None = None
                    ) -> tuple[Callable[[list[Any]], list[Any]], list[None]]:
    """As `fxpar.compat.pieces.compile_final`, with `interpreter` in the place of generated code, which keeps all strides."""
    pieces = cutting(module, static, donated) if cutting is not None else None
    pieces = pieces or one_piece(module, static, donated, exact)
    return interpret_pieces(pieces, interpreter), [None] * len(pieces.results)


def _interpreted(graph: fx.GraphModule, interpreter: type[fx.Interpreter], given: list[Any]) -> Any:
    return interpreter(graph).boxed_run(given)
