"""microbatches: a program of the whole batch becomes that of one of its microbatches, which add up to its loss and gradients.

Microbatches are a mesh axis in time. `partition` has inserted collectives over it as over any other axis; but there is nobody to
communicate with: the other microbatches run before and after. This pass takes the axis out of the program again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxpar.ops.collectives import typed
from fxpar.ops.runtime import axis_index
from fxpar.ops.unbiased import correction, unbiased
from fxpar.passes.rewrite import remove_unread
from fxpar.passes.strategies.linear import Classification, along_microbatches, classify
from fxpar.passes.strategies.prologue import prologue, rank_index
from fxpar.program import Join, Microbatches, Program, Source, copy_provenance, user_line
from fxpar.sharding.facts import UNKNOWN, describe_local, full_value, local_value, sharding_at
from fxpar.sharding.layout import Piece, Sharding
from fxpar.sharding.mesh import MICROBATCH, Mesh, of_ranks

aten = torch.ops.aten
JOINS: dict[str, Join] = {"part": "sum", "estimate": "mean", "alike": "same", "split": "rows"}

DESCRIPTION = ("full", "sharding", "layout_text", "global_name", "needs_grad", "dtype", "varied")
"""What `partition` writes on a value that is the local part of a global one."""


def take_out_time(program: Program) -> Program:
    """Make a partitioned program that of one microbatch, in place.

    Takes: a partitioned program. Without an axis of microbatches in its mesh it stays as it is, but for corrections of variances,
    which are spelled in either case: of an estimate by the rows of a microbatch. Afterwards: the mesh is that of
    ranks, no collective is over microbatches, and ``program.microbatches`` says how a step is made of this program: what it is
    passed besides (sources of kind "microbatch"), and how its outputs make the step's. A sum over the batch of what depends on no
    parameter is one of those inputs; one of what does is left to the sum over microbatches where it reaches the outputs
    linearly, and elsewhere is estimated from this microbatch, which is noted. See `linear.classify`.
    Raises: `PlanError` for what cannot be computed one microbatch after the other.
    """
    if MICROBATCH not in program.mesh.names:
        _correct_variances(program, lambda node: 1)
        return program
    mesh, count = program.mesh, program.mesh.size(MICROBATCH)
    values = classify(program)
    joins: list[Join] = ["same" if sink.kind == "buffer" else JOINS[values.kinds[n]]
                         for sink, n in zip(program.tensor_sinks(), program.outputs(), strict=True)]
    sources = {(s.kind, s.name): n for n, s in program.source_of().items() if s.kind != "param"}
    rows, output_rows = _rows(sources, mesh), _rows(dict(enumerate(program.outputs())), mesh)
    exact = [n not in values.inexact and not (sink.kind == "buffer" and sink.name in values.in_order)
             for sink, n in zip(program.tensor_sinks(), program.outputs(), strict=True)]
    _note_estimates(program, values, count)
    step = Microbatches(count, mesh, rows, output_rows, None, [], {}, None, joins, values.in_order, exact)
    moved = _pass_in(program, values, step)
    _divide(program, values, moved, count)
    _estimate(program, values, count)
    _correct_variances(program, lambda node: count if values.kinds.get(node) == "estimate" else 1)
    remove_unread(program.graph)
    index = _placeholder(program, "microbatch", torch.empty((), dtype=torch.int64, device="meta"))
    step.index = index.name
    _take_out_slices(program, values, index)
    _take_out_collectives(program.graph, values, count)
    _number(program, index)
    remove_unread(program.graph)
    _drop_unused(program, step)
    _without_time(program, count)
    program.mesh, program.microbatches = of_ranks(mesh), step
    program.graph.lint()
    program.module.recompile()
    return program


def _rows(nodes: dict[Any, fx.Node], mesh: Mesh) -> dict[Any, Sharding]:
    return {key: tuple(tuple(_replica_first(piece, mesh) for piece in dim) for dim in sharding_at(node))
            for key, node in nodes.items() if along_microbatches(node)}


def _replica_first(piece: Piece, mesh: Mesh) -> Piece:
    """The rows of a replica lie together, and in them its microbatches follow one another."""
    if MICROBATCH not in piece.axes:
        return piece
    dp = tuple(a for a in piece.axes if a != MICROBATCH and a in mesh.axes("dp"))
    return Piece(piece.size, (*dp, MICROBATCH, *(a for a in piece.axes if a != MICROBATCH and a not in dp)))


def _note_estimates(program: Program, values: Classification, count: int) -> None:
    """Say what is not linear in microbatches, by the lines of the model."""
    lines = list(dict.fromkeys(user_line(n) or n.name for n, _ in values.nonlinear if n.users))
    buffers = sorted(values.in_order)
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        program.note(f"not linear in microbatches: {'; '.join(lines[:3])}{more}: each of the {count} microbatches takes {count} "
                     f"times its own part of a sum over the batch for the sum, and the step takes the mean over microbatches")
    if buffers:
        more = f" and {len(buffers) - 2} more" if len(buffers) > 2 else ""
        program.note(f"buffers {', '.join(buffers[:2])}{more} are updated by each of the {count} microbatches, in order, from "
                     f"its own rows")


def _pass_in(program: Program, values: Classification, step: Microbatches) -> dict[fx.Node, fx.Node]:
    """Have collectives over microbatches of what depends on no parameter passed in; returns what took their place."""
    wanted = _frontier(program, set(values.outside))
    if not wanted:
        return {}
    made = prologue(program, wanted)
    step.prologue, step.prologue_inputs = made.module, made.inputs
    moved: dict[fx.Node, fx.Node] = {}
    for node, places in zip(wanted, made.places, strict=True):
        known = local_value(node)
        assert known.result is not None
        shape, dtype = known.result
        moved[node] = _placeholder(program, f"batch_{node.name}", torch.empty(shape, dtype=dtype, device="meta"))
        copy_provenance(moved[node], node)
        describe_local(moved[node], **(_description(node) if known.sharding is not None else {"dtype": known.dtype}))
        step.passed[moved[node].name] = places
        node.replace_all_uses_with(moved[node])
    return moved


def _frontier(program: Program, outside: set[fx.Node]) -> list[fx.Node]:
    """Of the values that are computed outside, those that the program itself uses."""
    reached: set[fx.Node] = set()
    pending = program.outputs()
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += () if node in outside else node.all_input_nodes
    return [n for n in program.graph.nodes if n in reached and n in outside]


def _placeholder(program: Program, name: str, value: torch.Tensor) -> fx.Node:
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder(name)
    describe_local(node, full=value)
    program.sources.append(Source("microbatch", node.name, value))
    return node


def _divide(program: Program, values: Classification, moved: dict[fx.Node, fx.Node], count: int) -> None:
    """What is added to a part, and is not one, counts once in the sum over microbatches."""
    for node, what in values.divided:
        if isinstance(what, int):
            term: Any = node.args[what]
            node.update_arg(what, term / count)
            continue
        operand = moved.get(what, what)
        with program.graph.inserting_before(node):
            share = program.graph.call_function(aten.div.Tensor, (operand, count))
        _describe(share, operand, node)
        node.replace_input_with(operand, share)


def _estimate(program: Program, values: Classification, count: int) -> None:
    """Where a part is not used linearly, its sum over microbatches is taken to be `count` times this one's."""
    times: dict[fx.Node, fx.Node] = {}

    def estimated(part: fx.Node, user: fx.Node) -> fx.Node:
        if part not in times:
            with program.graph.inserting_after(part):
                times[part] = program.graph.call_function(aten.mul.Tensor, (part, count))
            _describe(times[part], part, user)
        return times[part]

    for node, part in values.nonlinear:
        node.replace_input_with(part, estimated(part, node))
    output = program.graph.output_node()
    outs = [estimated(n, n) if sink.kind == "buffer" and values.kinds[n] == "part" else n
            for sink, n in zip(program.tensor_sinks(), program.outputs(), strict=True)]
    output.args = (tuple(outs),)


def _correct_variances(program: Program, parts: Callable[[fx.Node], int]) -> None:
    """Spell the corrections of variances, each by the number of rows that it is taken from: one of so many parts of the batch."""
    found = program.graph.find_nodes(op="call_function", target=unbiased)
    for node in found:
        variance, rows = node.args
        node.target, node.args = aten.mul.Tensor, (variance, correction(rows // parts(node)))
    if found:
        program.module.recompile()


def _describe(new: fx.Node, old: fx.Node, at: fx.Node) -> None:
    """`new` is laid out as `old`, and was inserted for what `at` does."""
    describe_local(new, **_description(old))
    copy_provenance(new, at)


def _description(node: fx.Node) -> dict[str, Any]:
    known = local_value(node)
    return {name: getattr(known, name) for name in DESCRIPTION}


def _take_out_collectives(graph: fx.Graph, values: Classification, count: int) -> None:
    for node in list(graph.nodes):
        made = typed(node) if node.op == "call_function" else None
        if made is None or MICROBATCH not in made.axes or not node.users:
            continue
        assert made.kind in ("psum", "pmax", "vary"), f"{node.name} communicates over microbatches"
        if node in values.alone:
            with graph.inserting_after(node):
                times = graph.call_function(aten.mul.Tensor, (node, count))
            _describe(times, node, node)
            node.replace_all_uses_with(times, delete_user_cb=lambda user, times=times: user is not times)
        axes = tuple(a for a in made.axes if a != MICROBATCH)
        if axes:
            node.args, node.kwargs = replace(made, axes=axes).args, {}
        else:
            value = made.value
            known = local_value(value)
            unknown = [name for name in DESCRIPTION if getattr(known, name) is getattr(UNKNOWN, name)]
            describe_local(value, **{name: getattr(local_value(node), name) for name in unknown})
            node.replace_all_uses_with(value)


def _take_out_slices(program: Program, values: Classification, index: fx.Node) -> None:
    """What a microbatch takes of a value that is replicated over them: of each replica's rows, those of its number."""
    graph, mesh = program.graph, program.mesh
    count = mesh.size(MICROBATCH)
    replicas = mesh.size(*mesh.axes("dp")) // count
    for node in values.sliced:
        made = typed(node)
        result = local_value(node).result
        assert made is not None and result is not None
        (dim, outer, _), local = made.place, result[0]
        outer *= replicas
        apart = [*local[:dim], outer, count, local[dim] // outer, *local[dim + 1 :]]
        with graph.inserting_before(node):
            value = graph.call_function(aten.reshape.default, (made.value, apart))
            number = graph.call_function(aten.reshape.default, (index, [1]))
            mine = graph.call_function(aten.index_select.default, (value, dim + 1, number))
            mine = graph.call_function(aten.reshape.default, (mine, list(local)))
        _describe(mine, node, node)
        node.replace_all_uses_with(mine)


def _number(program: Program, index: fx.Node) -> None:
    """The index along the axis of microbatches is passed in."""
    for node in list(program.graph.nodes):
        if node.target is axis_index and MICROBATCH in node.args[0]:
            with program.graph.inserting_before(node):
                now: Any = rank_index(program.graph, program.mesh, node.args[0], index)
            node.replace_all_uses_with(now)


def _drop_unused(program: Program, step: Microbatches) -> None:
    """What is passed to microbatches, and was for operators that nothing uses."""
    for node, source in program.source_of().items():
        if source.kind == "microbatch" and not node.users:
            program.graph.erase_node(node)
            program.sources = [s for s in program.sources if s is not source]
            step.passed.pop(source.name, None)
            step.index = None if step.index == source.name else step.index


def _without_time(program: Program, count: int) -> None:
    """Layouts of what one microbatch holds."""
    for node in program.graph.nodes:
        if along_microbatches(node):
            sharding = sharding_at(node)
            shape = [n // (count if any(MICROBATCH in p.axes for p in dim) else 1)
                     for n, dim in zip(full_value(node).shape, sharding, strict=True)]
            describe_local(node, full=full_value(node).new_empty(shape),
                           sharding=tuple(tuple(_piece(p, count) for p in dim) for dim in sharding))
        made = typed(node) if node.op == "call_function" else None
        assert made is None or MICROBATCH not in made.axes, f"{node.name} communicates over microbatches"


def _piece(piece: Piece, count: int) -> Piece:
    if MICROBATCH not in piece.axes:
        return piece
    return Piece(piece.size // count, tuple(a for a in piece.axes if a != MICROBATCH))
