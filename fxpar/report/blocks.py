"""blocks: equal blocks of a program that follow one another, of which one is shown for all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxpar.backends import repeats
from fxpar.program import block_path, module_path, user_line
from fxpar.sharding.facts import if_local

LEAST = 3
"""So many blocks have to be equal for one to stand for all."""


class Differs(str):
    """Stands, in the first of several blocks, for a number that is another one in each: the name that it has there."""

    def __repr__(self) -> str:
        return str(self)


@dataclass
class Blocks:
    """members: the operators of each block, in order. taken: for each value that a block takes from outside, what each of them
    takes. given: the places of the operators in a block whose values are used outside of it. names: the modules that the blocks
    are. numbers: names of the numbers that are others in each block (the number that a dropout has), and what they are in each.
    arguments: those of the first block's operators, with these names.
    """

    members: list[list[fx.Node]]
    taken: list[tuple[fx.Node, ...]]
    given: list[int]
    names: list[str]
    numbers: dict[str, tuple[Any, ...]]
    arguments: list[tuple[tuple, dict[str, Any]]]


def equal_blocks(graph: fx.Graph) -> Blocks | None:
    """The run of blocks that has most operators, if there are `LEAST` equal ones: with equal operators, connections, layouts and
    lines of the model, and equal arguments but for numbers."""
    plain = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    plain.output(plain.graph_copy(graph, copies))
    originals = {copy: node for node, copy in copies.items()}
    for node in plain.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _without_number)
    run = repeats.find(plain, lambda n: _facts(originals[n]) if n in originals else (), LEAST - 1)
    if run is None:
        return None
    inside = [originals[n] for n in plain.nodes if n in run.place and run.place[n][0] < run.region]
    first = next((i for i in range(1, run.region) if block_path(inside[i]) != block_path(inside[i - 1])), 0)
    inside = inside[first:]
    members = [inside[i : i + run.region] for i in range(0, len(inside) - run.region + 1, run.region)]
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    at = nodes.index(inside[0]) - run.region
    if members and at >= 0 and _text(nodes[at : at + run.region]) == _text(members[0]):
        members.insert(0, nodes[at : at + run.region])  # what it takes is made by something else than a block
    names = [_name(block) for block in members]
    return _blocks(members, names) if len(members) >= LEAST and all(names) and len({*names}) == len(names) else None


def _blocks(members: list[list[fx.Node]], names: list[str]) -> Blocks:
    own = [set(block) for block in members]
    taken: dict[tuple[fx.Node, ...], None] = {}
    made = Blocks(members, [], [], names, {}, [])
    for i, same in enumerate(zip(*members, strict=True)):
        for read in zip(*(_references(n) for n in same), strict=True):
            if read[0] not in own[0]:
                taken[read] = None
        if any(user not in block for n, block in zip(same, own, strict=True) for user in n.users):
            made.given.append(i)
        leaves = zip(*(_leaves(n) for n in same), strict=True)
        named = iter([Differs(f"{same[0].name}__{k}") if not isinstance(leaf[0], fx.Node) and len({*map(repr, leaf)}) > 1
                      else leaf[0] for k, leaf in enumerate(leaves)])
        made.arguments.append(fx.node.map_aggregate((same[0].args, same[0].kwargs), lambda _: next(named)))  # noqa: B023
        for leaf, name in zip(zip(*(_leaves(n) for n in same), strict=True), _flat(made.arguments[-1]), strict=True):
            if isinstance(name, Differs):
                made.numbers[str(name)] = leaf
    made.taken = list(taken)
    return made


def _without_number(value: Any) -> Any:
    return type(value).__name__ if type(value) in (int, float) else value


def _text(block: list[fx.Node]) -> list[tuple]:
    """Equal for blocks that are functions of one text."""
    index = {n: f"#{i}" for i, n in enumerate(block)}
    return [(n.op, n.target, repr(fx.node.map_aggregate((n.args, n.kwargs), lambda a: index.get(a, "#")
             if isinstance(a, fx.Node) else _without_number(a))), _facts(n)) for n in block]


def _flat(tree: Any) -> list[Any]:
    out: list[Any] = []
    fx.node.map_aggregate(tree, out.append)
    return out


def _leaves(node: fx.Node) -> list[Any]:
    return _flat((node.args, node.kwargs))


def _references(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among the arguments, in order, each as often as it is there."""
    return (leaf for leaf in _leaves(node) if isinstance(leaf, fx.Node))


def _facts(node: fx.Node) -> tuple[str, ...]:
    """What has to be equal: factors without a role have names of their own in each block."""
    layout = re.sub(r"\b[a-z]{1,2}(?=\d)", "_", if_local(node).layout_text)
    return layout, user_line(node), module_path(node).removeprefix(block_path(node))


def _name(block: list[fx.Node]) -> str:
    """The module that a block is, or the first and the last of several."""
    paths = list(dict.fromkeys(path for n in block if (path := block_path(n))))
    return " to ".join(dict.fromkeys((paths[0], paths[-1]))) if paths else ""
