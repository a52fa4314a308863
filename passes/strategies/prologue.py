"""prologue: the graph that computes, before a step, what its microbatches are passed: values that depend on no parameter.

It is a part of the program, unrolled over microbatches: along their axis nothing is communicated, as one rank has all of them.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpar.ops.collectives import Collective, PlaceInDim, make, typed
from fxpar.ops.runtime import axis_index
from fxpar.passes.strategies.linear import along_microbatches
from fxpar.program import Program, Source
from fxpar.sharding.mesh import MICROBATCH, Axes, Mesh

aten = torch.ops.aten


def joined(parts: list[Tensor], dim: int, outer: int) -> Tensor:
    """Microbatches' parts of a tensor, which lie in `dim` seen as ``[outer, microbatches, inner]``."""
    shape = parts[0].shape
    split = [p.reshape(*shape[:dim], outer, 1, -1, *shape[dim + 1 :]) for p in parts]
    return torch.cat(split, dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])


def part_of(x: Tensor, dim: int, outer: int, count: int, index: int) -> Tensor:
    """The part of one of `count` microbatches: the inverse of `joined`."""
    shape = x.shape
    y = x.reshape(*shape[:dim], outer, count, -1, *shape[dim + 1 :])
    return y.select(dim + 1, index).reshape(*shape[:dim], -1, *shape[dim + 1 :])


def rank_index(graph: fx.Graph, mesh: Mesh, axes: Axes, microbatch: fx.Node | int) -> fx.Node | int:
    """The index along `axes`, of which one is that of microbatches: replica by replica, and in each its microbatches."""
    before = tuple(a for a in axes if a != MICROBATCH and a in mesh.axes("dp") and mesh.size(a) > 1)
    after = tuple(a for a in axes if a != MICROBATCH and a not in before and mesh.size(a) > 1)
    index = microbatch
    if before:
        major = graph.call_function(operator.mul, (graph.call_function(axis_index, (before,)), mesh.size(MICROBATCH)))
        index = graph.call_function(operator.add, (major, index))
    if after:
        index = graph.call_function(operator.mul, (index, mesh.size(*after)))
        index = graph.call_function(operator.add, (index, graph.call_function(axis_index, (after,))))
    return index


@dataclass
class Prologue:
    """The graph; its inputs, (source, None) or (source, microbatch); and for each value wanted of it, where among its outputs it
    is for each microbatch."""

    module: fx.GraphModule
    inputs: list[tuple[Source, int | None]]
    places: list[list[int]]


def prologue(program: Program, wanted: list[fx.Node]) -> Prologue:
    """The graph that makes the values `wanted` of all microbatches, which depend on no parameter; the program stays as it is."""
    return _Unroller(program).run(wanted)


class _Unroller:
    def __init__(self, program: Program):
        self.program, self.mesh, self.graph = program, program.mesh, fx.Graph()
        self.count = self.mesh.size(MICROBATCH)
        self.replicas = self.mesh.size(*self.mesh.axes("dp")) // self.count
        self.sources = program.source_of()
        self.inputs: list[tuple[Source, int | None]] = []
        self.made: dict[fx.Node, list[Any]] = {}

    def run(self, wanted: list[fx.Node]) -> Prologue:
        needed, pending = set(), list(wanted)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        for node in self.program.graph.nodes:
            if node in needed and node.op == "placeholder":
                self._placeholder(node)
        for node in self.program.graph.nodes:
            if node in needed and node.op != "placeholder":
                self.made[node] = self._values(node)
        outputs = list(dict.fromkeys(v for n in wanted for v in self.made[n]))
        self.graph.output(tuple(outputs))
        places = [[outputs.index(v) for v in self.made[n]] for n in wanted]
        return Prologue(fx.GraphModule(self.program.module, self.graph), self.inputs, places)

    def _placeholder(self, node: fx.Node) -> None:
        if along_microbatches(node):
            self.inputs += [(self.sources[node], i) for i in range(self.count)]
            self.made[node] = [self.graph.placeholder(f"{node.name}_{i}") for i in range(self.count)]
        else:
            self.inputs.append((self.sources[node], None))
            self.made[node] = [self.graph.placeholder(node.name)] * self.count

    def _values(self, node: fx.Node) -> list[Any]:
        """One value for each microbatch; the same one where they are the same."""
        if node.target is axis_index:
            axes: Any = node.args[0]
            if MICROBATCH in axes:
                return [rank_index(self.graph, self.mesh, axes, i) for i in range(self.count)]
        made = typed(node)
        if made is not None and MICROBATCH in made.axes:
            return self._together(node, made)
        if all(len(set(self.made[n])) == 1 for n in node.all_input_nodes):
            return [self._copy(node, 0)] * self.count
        return [self._copy(node, i) for i in range(self.count)]

    def _copy(self, node: fx.Node, i: int) -> fx.Node:
        return self.graph.node_copy(node, lambda n: self.made[n][i])

    def _together(self, node: fx.Node, made: Collective) -> list[Any]:
        """What a collective over microbatches, and perhaps over ranks, gives to each of them."""
        xs, rest = self.made[made.value], tuple(a for a in made.axes if a != MICROBATCH)
        if made.kind in ("psum", "pmax"):
            combine = aten.add.Tensor if made.kind == "psum" else aten.maximum.default
            x = functools.reduce(lambda a, b: self.graph.call_function(combine, (a, b)), xs)
            if rest:
                x = make(self.graph, replace(made, value=x, axes=rest))
                x.meta.update(node.meta)
            return [x] * self.count
        assert not rest, "gathers, slices and exchanges are over one axis at a time"
        if made.gathers:
            return [self._joined(xs, made.place)] * self.count
        if made.kind == "shard":
            return self._parts(xs, made.place)
        if made.kind == "reduce_scatter":
            x = functools.reduce(lambda a, b: self.graph.call_function(aten.add.Tensor, (a, b)), xs)
            return self._parts([x] * self.count, made.place)
        assert made.kind == "all_to_all", made.kind
        return self._parts([self._joined(xs, made.place)] * self.count, made.to)

    def _joined(self, xs: list[Any], place: PlaceInDim) -> fx.Node:
        return self.graph.call_function(joined, (list(xs), place[0], place[1] * self.replicas))

    def _parts(self, xs: list[Any], place: PlaceInDim) -> list[Any]:
        """A replica's microbatches follow one another: of what dp splits further, each part has one of each."""
        return [self.graph.call_function(part_of, (x, place[0], place[1] * self.replicas, self.count, i))
                for i, x in enumerate(xs)]
