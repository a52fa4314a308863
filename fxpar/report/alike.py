"""alike: stages of a pipeline that compute the same, of which one is looked at for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import fx

from fxpar.backends import repeats
from fxpar.program import Program, block_path, module_path


def likeness(program: Program, inputs: Mapping[fx.Node, Hashable]) -> tuple[Hashable, list[str]]:
    """What is equal of stages that compute the same in the same order, of one program; and the blocks of the model that a stage
    goes through, in order, which may be others.

    inputs: of each placeholder, what has to be equal.
    """
    blocks: dict[str, int] = {}

    def facts(node: fx.Node) -> Hashable:
        block = block_path(node)
        number = blocks.setdefault(block, len(blocks)) if block else None
        held = getattr(program.module, str(node.target)) if node.op == "get_attr" else None
        kept = (tuple(held.shape), held.dtype) if isinstance(held, torch.Tensor) else repr(held)
        return number, module_path(node).removeprefix(block), inputs.get(node), kept

    text, number = repeats.written(program.graph, facts)
    outputs = tuple(number[n] if n in number else str(facts(n)) for n in program.outputs())
    return (text, outputs), list(blocks)


def renamed(where: str, blocks: list[str], others: list[str]) -> str:
    """A text that ends in a module's path, about a stage that goes through `blocks`, for one that is alike and goes through
    `others`."""
    operator, of, path = where.partition(" of ")
    for block, other in zip(blocks, others, strict=True):
        if path == block or path.startswith(block + "."):
            return operator + of + other + path.removeprefix(block)
    return where
