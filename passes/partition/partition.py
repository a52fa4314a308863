"""partition: the global program -> the program of one rank, with collectives where layouts change.

The result is one program for all ranks: what differs between them (which slice, which rows of a table) is read from
the mesh when it runs, so every rank issues the same collectives in the same order by construction.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.ops.collectives import Collective, PlaceInDim, make, typed
from fxpar.ops.runtime import axis_index
from fxpar.passes.infer.rules.spec import Op, Operand, Spec
from fxpar.passes.partition.reshard import Resharder, measure
from fxpar.passes.place.place import circulating
from fxpar.program import Program, copy_provenance
from fxpar.sharding.factors import Dim, Dims, Factor, leaves, share_of
from fxpar.sharding.facts import describe_local, dims_of, global_value, local_value, sharding_at
from fxpar.sharding.layout import (
    Layout,
    axes_on,
    dealt_to,
    fits,
    in_order,
    is_dealt,
    local_extent,
    local_shape,
    place_of,
    sharding_of,
    show,
)  # fmt: skip
from fxpar.sharding.mesh import Axes

aten = torch.ops.aten


def partition(program: Program) -> Program:
    """Build the local program.

    Takes: a placed program, whose graph it leaves as it is.
    Afterwards: `program.module` computes on local tensors, and its nodes have their `LocalValue`: that of a placeholder or output
    says which part of which global tensor it is, that of a collective for which operator it was inserted, and what one rank has
    of its result. Outputs that hold a batch are this replica's part.
    """
    return _Partitioner(program).run()


class _Partitioner:
    def __init__(self, program: Program):
        assert program.placements is not None
        self.program, self.mesh, self.placed = program, program.mesh, program.placements
        self.graph = fx.Graph()
        self.sources = program.source_of()
        self.local: dict[fx.Node, Any] = {}
        self.reshard = Resharder(self.graph, self.mesh)

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(tuple(self._output(n) for n in node.args[0]))
            else:
                self.local[node] = getattr(self, "_" + node.op)(node)
        self.graph.eliminate_dead_code()
        self.program.module = compat.graph_module(self.program.module, self.graph)
        return self.program

    def _placeholder(self, node: fx.Node) -> fx.Node:
        new = self.graph.placeholder(node.name)
        describe_local(new, source=self.sources[node].name)
        return self._describe(new, node)

    def _get_attr(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node)

    def _describe(self, new: fx.Node, old: fx.Node, layout: Layout | None = None, dims: Dims | None = None) -> fx.Node:
        """`new` is the local part of the global value `old`."""
        copy_provenance(new, old)
        value, known = old.meta.get("val"), global_value(old)
        if isinstance(value, torch.Tensor) and known.dims is not None:
            dims = known.dims if dims is None else dims
            layout = self.placed.storage(old) if layout is None else layout
            describe_local(
                new,
                full=value,
                sharding=sharding_of(dims, layout, self.mesh),
                layout_text=show(dims, layout, self.mesh),
                global_name=old.name,
                batch_dim=known.batch_dim,
                reduce_dtype=known.reduce_dtype,
                stored=self.placed.stored.get(old),
                dtype=value.dtype,
                needs_grad=known.needs_grad,
            )
        return new

    def _call_function(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            args: Any = node.args
            new = self.graph.call_function(operator.getitem, (self.local[args[0]], args[1]))
            return self._describe(new, node)
        if global_value(node).spec is None:
            return self.graph.node_copy(node, lambda n: self.local[n])
        return Local(self, node).build()

    def _output(self, node: fx.Node) -> fx.Node:
        """An output's batch goes to dp, as its inputs' did; what is dealt is split in its order; elsewhere it stays as it is."""
        layout, dims = dict(self.placed.layouts.get(node) or {}), global_value(node).dims or ()
        want: Layout = {}
        for axis in self.mesh.axes("dp"):
            batch = next(
                (
                    f
                    for d in dims
                    for f in leaves(d)
                    if f.role == "batch" and fits({**layout, **want}, f, axis, self.mesh)
                ),
                None,
            )
            if axis not in layout and batch is not None and self.mesh.size(axis) > 1:
                want[axis] = batch
        want = {**layout, **want}
        dealt = list(dict.fromkeys(f for a, f in want.items() if is_dealt(f, a, self.mesh)))
        if self.program.plan.outputs == "whole":
            dealt, want = [], {a: f for a, f in want.items() if a in self.mesh.axes("dp")}
        want = {a: f for a, f in want.items() if f not in dealt or is_dealt(f, a, self.mesh)}
        new = self.reshard.to(self.local[node], dims, layout, want, node)
        for leaf in dealt:
            new = self.reshard.in_order(new, dims, want, leaf, node)
        if want == layout and not dealt and local_value(new).sharding is not None:
            return new
        new = self._describe(new, node, want)
        describe_local(new, sharding=in_order(sharding_at(new)))
        return new


class Local:
    """What a rule's `emit` builds with: the operands as this operator runs on them, and calls that add nodes."""

    def __init__(self, owner: _Partitioner, node: fx.Node):
        self.owner, self.node = owner, node
        self.mesh, self.graph = owner.mesh, owner.graph
        spec = global_value(node).spec
        assert spec is not None
        self.spec: Spec = spec
        self.placement = owner.placed.operators[node]
        self.at = self.placement.at
        self.op = Op(node, None)  # type: ignore[arg-type]
        self.skip_deferred = bool(self.placement.pending) and any(o.deferred for o in self.spec.operands)
        self.ring = circulating(self.spec, self.at, self.mesh, owner.program.plan)
        self._operands = {
            o.node: self._bring(o, self.at) for o in self.spec.operands if not (o.deferred and self.skip_deferred)
        }
        if self.spec.contiguous:
            self._operands = {n: self.call(aten.contiguous.default, x) for n, x in self._operands.items()}
        self.args, self.kwargs = self._map(node.args), self._map(dict(node.kwargs))

    def _map(self, tree: Any) -> Any:
        skipped = {o.node for o in self.spec.operands if o.deferred and o.node not in self._operands}
        return fx.map_arg(tree, lambda n: None if n in skipped else self._operands.get(n, self.owner.local[n]))

    def _bring(self, operand: Operand, at: Layout) -> fx.Node:
        """The operand in the layout the operator runs in: split like it, or replicated; varying where the op is split.

        What is made from a parameter as it is stored takes it as it is stored."""
        if self.node in self.owner.placed.stored:
            return self.owner.local[operand.node]
        gathered = () if self.ring and operand in self.spec.circulates else operand.gathered
        own = {f for d in operand.dims for f in leaves(d)} - {g for f in gathered for g in f.leaves()}
        want: dict[str, Factor | bool] = {a: (f if f in own else True) for a, f in at.items()}
        want.update(dict.fromkeys(self.placement.varies, True))
        old = operand.node
        return self.owner.reshard.to(self.owner.local[old], dims_of(old), self.owner.placed.layouts[old], want, self.node)

    def is_dealt(self, dim: Dim) -> bool:
        """Whether ranks hold dealt parts of a dim."""
        return any(dealt_to(f, self.at, self.mesh) > 1 for f in leaves(dim))

    def along(self, strategy: str) -> bool:
        """Whether the operator is split along some axis of a strategy."""
        return bool(set(self.mesh.axes(strategy)) & self.at.keys())

    def starts(self, dim: Dim) -> list[Any] | None:
        """Where the chunks of equal length begin that are this rank's part of a dim; None where it is no such chunks."""
        flat = leaves(dim)
        axes, ranks = self.axes(dim), dealt_to(flat[0], self.at, self.mesh) if flat else 1
        if not axes:
            return [0]
        if len(flat) > 1 or (ranks > 1 and self.mesh.size(*axes) > ranks):
            return None
        if ranks == 1:
            return [self.offset(dim)]
        chunk = flat[0].size // (2 * ranks)
        first = self.call(operator.mul, self.call(axis_index, axes_on(flat[0], self.at, self.mesh)), chunk)
        return [first, self.call(operator.sub, (2 * ranks - 1) * chunk, first)]

    def row(self, node: fx.Node) -> fx.Node:
        """An operand that is a number for each place of a sequence, [b or 1, 1, ...], as [b or 1, places]."""
        dims = dims_of(node)
        return self.call(aten.reshape.default, self._operands[node], [self.extent(dims[0]) if dims[0] else 1, -1])

    def part_of_row(self, row: fx.Node, dim: Dim) -> fx.Node:
        """Of what `row` makes, the part that a rank has of a dim."""
        layout: Layout = {}
        for leaf in leaves(dim):
            for axis in axes_on(leaf, self.at, self.mesh):
                row = self.owner.reshard.shard(row, ((), dim), layout, axis, leaf, self.node)
        return row

    def build(self) -> Any:
        made = self.spec.emit(self) if self.spec.emit is not None else self.default()
        if isinstance(self.node.meta["val"], torch.Tensor):
            made = self._resolve(made)
            if made in self._operands.values():
                return made
            describe_local(made, varied=self.placement.varies)
            return self.owner._describe(made, self.node)
        copy_provenance(made, self.node)
        return made

    def _resolve(self, value: fx.Node) -> fx.Node:
        """Pending sums and maxima, then what had to wait for them (a bias)."""
        dims = self.spec.outs[0]
        layout = self.placement.layouts[0]
        done = {a: f for a, f in layout.items() if a not in self.placement.scatter}
        for kind in ("sum", "max"):
            axes = tuple(
                a for a in self.mesh.names if self.placement.pending.get(a) == kind and a not in self.placement.scatter
            )
            if axes:
                value = self.reduce(value, axes, kind)
        for axis in self.mesh.names:
            leaf = self.placement.scatter.get(axis)
            if leaf is not None:
                place = PlaceInDim(*place_of(dims, done, self.mesh, leaf), is_dealt(leaf, axis, self.mesh))
                made = Collective("reduce_scatter", value, (axis,), place)
                done[axis] = leaf
                value = self._measured(made, done)
        if self.skip_deferred:
            value = self._add_deferred(value, layout)
        return value

    def _add_deferred(self, value: fx.Node, layout: Layout) -> fx.Node:
        for operand in self.spec.operands:
            if operand.deferred:
                bias = self._bring(operand, layout)
                if operand.along != -1:
                    bias = self.call(aten.reshape.default, bias, [-1] + [1] * (-1 - operand.along))
                value = self.call(aten.add.Tensor, value, bias)
        return value

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        copy_provenance(new, self.node)
        return new

    def _communicate(self, made: Collective) -> fx.Node:
        new = make(self.graph, made)
        copy_provenance(new, self.node)
        describe_local(new, made_for=self.node.name)
        return new

    def _measured(self, made: Collective, layout: Layout) -> fx.Node:
        new = self._communicate(made)
        describe_local(new, needs_grad=global_value(self.node).needs_grad)
        measure(new, self.node, self.spec.outs[0], layout, self.mesh)
        return new

    def default(self, **override: Any) -> fx.Node:
        """The same operator on the local operands, with sizes and `override`n arguments localised."""
        sizes = {name: self.shape(dims) for name, dims in self.spec.sizes.items()}
        args, kwargs = list(self.args), {**self.kwargs}
        schema = getattr(self.node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema else []
        for name, value in {**sizes, **override}.items():
            if name in names[: len(args)]:
                args[names.index(name)] = value
            else:
                kwargs[name] = value
        return self.call(self.node.target, *args, **kwargs)

    def operand(self, i: int) -> fx.Node:
        return self._operands[self.spec.operands[i].node]

    def shape(self, dims: Dims) -> list[Any]:
        """Sizes; of rows whose number only a run knows, what reads it."""
        sizes: list[Any] = local_shape(dims, self.at, self.mesh)
        for i, dim in enumerate(dims):
            if share_of(dim) is not None and set(self.axes(dim)) & set(self.mesh.axes("ep")):
                held = next(o.node for o in self.spec.operands if o.dims and share_of(o.dims[0]) is share_of(dim))
                sizes[i] = self.call(aten.sym_size.int, self._operands[held], 0)
        return sizes

    def extent(self, dim: Dim) -> int:
        return local_extent(dim, self.at, self.mesh)

    def axes(self, factors: Any) -> Axes:
        """The mesh axes that split any of these factors here."""
        flat = {leaf for f in factors for leaf in f.leaves()}
        return tuple(a for a in self.mesh.names if self.at.get(a) in flat)

    def ranks(self, factors: Any) -> int:
        return self.mesh.size(*self.axes(factors))

    def offset(self, dim: Dim) -> fx.Node | None:
        """Where this rank's (contiguous) part of a dim begins, of which the first factor alone may be split; None if the dim is
        not split."""
        axes = self.axes(dim)
        if not axes:
            return None
        assert dealt_to(leaves(dim)[0], self.at, self.mesh) == 1, f"{self.node}: a dealt part is no range"
        axes = axes_on(leaves(dim)[0], self.at, self.mesh)
        return self.call(operator.mul, self.call(axis_index, axes), self.extent(dim))

    def grid(self, dims: Dims) -> tuple:
        """Where this rank's elements lie: see `fxpar.ops.rng.Grid`."""
        out = []
        for dim in dims:
            runs = []
            for leaf in leaves(dim):
                axes = axes_on(leaf, self.at, self.mesh)
                local = leaf.size // self.mesh.size(*axes)
                offset = self.call(operator.mul, self.call(axis_index, axes), local) if axes else 0
                ranks = dealt_to(leaf, self.at, self.mesh)
                runs.append((local, offset, leaf.size, *([ranks] if ranks > 1 else [])))
            out.append(tuple(runs))
        return tuple(out)

    def exchanged_dim(self) -> int | None:
        """The dim along which the first operand was just gathered, or else the output will be scattered, if it is not split."""
        first = typed(self.operand(0))
        if first is not None and first.gathers:
            dim, outer, _ = first.place
            return dim if outer == 1 else None
        for leaf in self.placement.scatter.values():
            dim, outer = place_of(self.spec.outs[0], self.at, self.mesh, leaf)
            return dim if outer == 1 else None
        return None

    def reduce(self, value: fx.Node, axes: Axes, kind: str) -> fx.Node:
        """The sum or maximum of every rank's value, on every rank."""
        return self._measured(Collective("psum" if kind == "sum" else "pmax", value, axes), self.at)

    def vary(self, value: fx.Node, axes: Axes) -> fx.Node:
        """`value` is used differently on the ranks of `axes` from here on."""
        if not global_value(self.node).needs_grad:
            return value
        return self._communicate(Collective("vary", value, axes))
