"""place: a plan's preferences -> the layout in which every operator runs and every value is kept.

The single rule: *at every operator, walk the plan's ordered list of role -> axis; an axis goes to the first factor
that wants it, may be split, and divides.* A factor wants an axis if its role says so, or if an operand already holds
it there. An axis left partial is resolved at once, onto the first output factor that wants it
(reduce-scatter), or to everyone (all-reduce). Megatron's column/row pairs, its vocabulary-parallel embedding
and loss, and the all-gather/reduce-scatter pairs of sequence parallelism all fall out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpar.errors import PlanError
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.infer.rules import Spec
from fxpar.passes.place.experts import Regions, rows_of
from fxpar.plan import Plan
from fxpar.program import Program, Source
from fxpar.sharding.factors import Dims, Factor, leaves, share_of
from fxpar.sharding.facts import dims_of, global_value
from fxpar.sharding.layout import Layout, Sharding, axes_on, fits, restrict
from fxpar.sharding.mesh import MICROBATCH, Axes, Mesh
from fxpar.sharding.placement import Placement, Placements


@dataclass(frozen=True)
class Preference:
    """``role -> strategy``; `beside`: only where a factor of that role occurs too; `lookup`: only at a lookup in a table that
    has more rows than are looked up, so that these are less to communicate than the table; `attention`: only at attention."""

    role: str
    strategy: str
    beside: str | None = None
    lookup: bool = False
    attention: bool = False


def preferences(plan: Plan) -> list[Preference]:
    """The plan as an ordered list. The first that can be satisfied takes the axis."""
    out = [Preference("experts", "ep"), Preference("heads", "tp"), Preference("ffn", "tp"), Preference("vocab", "tp")]
    if plan.shards_sequence:
        out.append(Preference("seq", "tp", beside="hidden"))
    if plan.gathers_each_use:  # else the table is gathered once a step, however many microbatches look it up
        out.append(Preference("vocab", "zero", lookup=True))
    return [*out, Preference("batch", "dp"), Preference("heads", "a2a", attention=True), Preference("seq", "ring"),
            Preference("seq", "a2a")]


def place(program: Program, pinned: dict[str, Sharding] | None = None) -> Program:
    """Give every operator its `Placement` and every value its layout.

    Takes: an inferred program, whose graph it leaves as it is. pinned: parameters whose storage is given.
    Afterwards: ``program.placements`` has how every operator runs and what layout every value is kept in. A parameter is kept
    in the layout its first use wants; what could not be split although the plan asked for it is noted.
    Raises: `PlanError` if a batch does not divide by dp.
    """
    placed = program.placements = Placements()
    walk = _Placer(program, placed, pinned or {})
    for node in program.graph.nodes:
        if node.op == "placeholder":
            walk.source(node, walk.sources[node])
        elif node.op == "call_function":
            walk.call(node)
    for node in program.graph.nodes:
        known = global_value(node)
        if placed.layouts.get(node) is None and (known.dims is not None or known.spec is not None):
            placed.layouts[node] = {}
            if known.spec is not None:
                placed.operators[node] = Placement({}, [{} for _ in known.spec.outs])
    for chain in {id(c): c for c in walk.chains.values()}.values():
        _set_varies(chain[1:], placed)
    _note_unsplit(program, placed, walk.prefs)
    return program


class _Placer:
    def __init__(self, program: Program, placed: Placements, pinned: dict[str, Sharding]):
        self.program, self.mesh, self.pinned = program, program.mesh, pinned
        self.layouts, self.operators, self.preferred = placed.layouts, placed.operators, placed.preferred
        self.prefs = preferences(program.plan)
        self.sources = program.source_of()
        self.chains: dict[fx.Node, list[fx.Node]] = {}
        self.regions = Regions(program)

    def source(self, node: fx.Node, source: Source) -> None:
        if source.kind == "param" and source.name not in self.pinned:
            self.layouts[node] = None
            self.chains[node] = [node]
            return
        dims: Dims = global_value(node).dims or ()
        layout: Layout = {}
        if source.kind == "param":
            stored = pinned_layout(dims, self.pinned[source.name], self.mesh)
            layout = _used(stored, self.mesh)
            self.chains[node] = [node]
        elif source.kind == "input":
            layout = self._input(source, dims)
        self.layouts[node] = layout

    def _input(self, source: Source, dims: Dims) -> Layout:
        axes = tuple(a for a in self.mesh.axes("dp") if self.mesh.size(a) > 1)
        n = self.mesh.size(*axes)
        for dim in dims:
            flat = leaves(dim)
            if flat and flat[0].role == "batch":
                count = self.mesh.size(MICROBATCH) if MICROBATCH in axes else 1
                if flat[0].size % n and flat[0].size % (n // count) == 0:
                    raise PlanError("microbatches", count, f"must divide each replica's part of a batch of {flat[0].size} "
                                    f"(input {source.name!r})", f"a batch of {-(-flat[0].size // n) * n}, or microbatches=1")
                if flat[0].size % n:
                    raise PlanError(
                        "dp",
                        n // count,
                        f"must divide the global batch of {flat[0].size} (input {source.name!r})",
                        f"a batch of {-(-flat[0].size // n) * n}, or a dp that divides it",
                    )
                return dict.fromkeys(axes, flat[0])
        return {}

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            made = self.operators.get(node.all_input_nodes[0])
            self.layouts[node] = dict(made.layouts[global_value(node).position]) if made else {}
            return
        spec: Spec | None = global_value(node).spec
        if spec is None:
            return
        root = self._flexible_root(node, spec)
        if root is not None:
            self.chains[root].append(node)
            self.chains[node] = self.chains[root]
            given: Layout | None = self.layouts[root]
            self.layouts[node] = None if given is None else restrict(given, dims_of(node), ())
            if given is not None:
                self.operators[node] = Placement(dict(self.layouts[node]), [self.layouts[node]])
            return
        at = self._assign(node, spec)
        for operand in spec.operands:
            if self.layouts[operand.node] is None:
                self._decide_use(operand.node, at, operand.gathered)
        placement = self._outcome(spec, at)
        self.operators[node] = placement
        self.layouts[node] = placement.layouts[0] if isinstance(node.meta["val"], torch.Tensor) else placement.layouts

    def _flexible_root(self, node: fx.Node, spec: Spec) -> fx.Node | None:
        """The parameter that an operator only casts or rearranges, which stays undecided until something uses it, unless its
        storage is given."""
        if len(spec.operands) != 1 or spec.sums or spec.maxes or spec.inner or spec.replicated or len(spec.outs) != 1:
            return None
        source = spec.operands[0].node
        return source if source in self.chains and (self.layouts[source] is None or self._is_given(source)) else None

    def _is_given(self, node: fx.Node) -> bool:
        return self.sources[self.chains[node][0]].name in self.pinned

    def _decide_use(self, node: fx.Node, at: Layout, gathered: Iterable[Factor]) -> None:
        """The first use decides how a parameter (and what was made from it alone) is used, and what it would have it stored
        like (`Placements.preferred`)."""
        zero = self.mesh.axes("zero")
        param = self.chains[node][0]
        self.preferred[param] = {a: f for a, f in restrict(at, dims_of(param), gathered).items()
                                 if a in zero and f.role != "seq"}
        at = _used(at, self.mesh)
        for link in self.chains[node]:
            layout = restrict(at, dims_of(link), gathered)
            self.layouts[link] = layout
            if global_value(link).spec is not None:
                self.operators[link] = Placement(dict(layout), [layout])

    def _assign(self, node: fx.Node, spec: Spec) -> Layout:
        """The rule of this module, for one operator. The axes of one strategy go to factors of one role."""
        at = self.regions.at(spec, self.layouts)
        order = _candidates(spec)
        inherited = {(a, f) for o in spec.operands for a, f in (self.layouts[o.node] or {}).items()}
        roles = {f.role for o in spec.operands for d in o.dims for f in leaves(d)}
        roles |= {f.role for d in spec.outs[0] for f in leaves(d)} if spec.outs else set()
        for pref in self.prefs:
            if (pref.beside and pref.beside not in roles) or (pref.lookup and not _looks_up_few(node)):
                continue
            if pref.attention and node.target not in ATTENTION:
                continue
            axes = self.mesh.axes(pref.strategy)
            if pref.strategy != "a2a" and any(a in at and at[a].role not in (pref.role, "experts") for a in axes):
                continue
            taken = set(at.values()) if pref.lookup else set()
            for axis in axes:
                wanting = [f for f in order if f.role == pref.role and f not in taken]
                wanting.sort(key=lambda f: (axis, f) not in inherited)
                self._take(at, axis, wanting)
                if pref.beside and axis not in at:
                    self._note_indivisible(wanting, pref, axis)
        for axis in self.mesh.names:
            self._take(at, axis, [f for f in order if (axis, f) in inherited])
        return at

    def _take(self, at: Layout, axis: str, wanting: list[Factor]) -> None:
        if axis in at or self.mesh.size(axis) == 1:
            return
        for leaf in wanting:
            if fits(at, leaf, axis, self.mesh):
                at[axis] = leaf
                return

    def _note_indivisible(self, wanting: list[Factor], pref: Preference, axis: str) -> None:
        n = self.mesh.size(axis)
        for leaf in wanting:
            if n > 1 and leaf.size % n:
                self.program.note(f"{pref.role} {leaf.size} does not divide by {axis}={n}: left replicated")

    def _outcome(self, spec: Spec, at: Layout) -> Placement:
        sums = {f for s in spec.sums for f in s.leaves()}
        maxes = {f for s in spec.maxes for f in s.leaves()}
        pending = {a: "sum" if f in sums else "max" for a, f in at.items() if f in sums or f in maxes}
        layouts = [restrict(at, dims) for dims in spec.outs]
        placement = Placement(at, layouts, pending)
        if len(spec.outs) == 1:
            flat = scatterable(spec)
            for axis in [a for a in self.mesh.names if pending.get(a) == "sum"]:
                leaf = self._target(flat, layouts[0], axis)
                if leaf is not None:
                    layouts[0][axis] = placement.scatter[axis] = leaf
        return placement

    def _target(self, flat: list[Factor], layout: Layout, axis: str) -> Factor | None:
        """The output factor that a pending sum over `axis` is scattered onto: the first that wants it."""
        roles = {f.role for f in flat}
        for pref in self.prefs:
            if axis in self.mesh.axes(pref.strategy) and (not pref.beside or pref.beside in roles):
                for leaf in flat:
                    if leaf.role == pref.role and appends(layout, leaf, axis, self.mesh):
                        return leaf
        return None


def _used(layout: Layout, mesh: Mesh) -> Layout:
    """A parameter's layout without the axes over which it is merely stored in parts, and those of cp: what has a sequence is
    stored in its order. Experts are used in parts over the axes of ep alone."""
    apart, expert = {*mesh.axes("zero"), *mesh.axes("cp")}, mesh.axes("ep")
    return {a: f for a, f in layout.items() if a not in apart or f.role == "batch" or (f.role == "experts" and a in expert)}


def _looks_up_few(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.embedding.default:
        return False
    args: Any = node.args
    return args[1].meta["val"].numel() <= args[0].meta["val"].shape[0]


def _set_varies(chain: list[fx.Node], placed: Placements) -> None:
    """Fill in `Placement.varies` of the operators that rearrange one parameter, in their order.

    Not of its cast: its gradient is summed in a dtype of its own, and where it is used.
    """
    for node in reversed([n for n in chain if global_value(n).reduce_dtype is None]):
        different = [_different_for(user, node, placed) for user in node.users]
        placement = placed.operators[node]
        placement.varies = tuple(a for a in different[0] if all(a in d for d in different)) if different else ()


def _different_for(user: fx.Node, node: fx.Node, placed: Placements) -> tuple[str, ...]:
    """The axes along which `user` runs differently on every rank, although `node` is not split there."""
    placement, spec = placed.operators.get(user), global_value(user).spec
    if placement is None or spec is None:
        return ()
    operand = next(o for o in spec.operands if o.node is node)
    if operand.deferred:
        return ()
    own = {f for d in operand.dims for f in leaves(d)} - {g for f in operand.gathered for g in f.leaves()}
    return (*(a for a, f in placement.at.items() if f not in own), *placement.varies)


def pinned_layout(dims: Dims, sharding: Sharding, mesh: Mesh) -> Layout:
    """The layout that stores a parameter as `sharding`; a piece's axes lie on the major factor of what it became.

    Raises: `PlanError` if that factor has become too small for them.
    """
    layout: Layout = {}
    for dim, pieces in zip(dims, sharding, strict=True):
        flat = leaves(dim)
        for piece in pieces:
            size = 1
            while size < piece.size:
                leaf = flat.pop(0)
                if size == 1:
                    layout.update(dict.fromkeys(piece.axes, leaf))
                    if leaf.size % mesh.size(*piece.axes):
                        raise PlanError(
                            "/".join(piece.axes),
                            mesh.size(*piece.axes),
                            f"must divide {leaf.size}, the first factor of a dim of {piece.size} as this call uses the parameter",
                            "parallelize with an example of this call first",
                        )
                size *= leaf.size
    return layout


def circulating(spec: Spec, at: Layout, mesh: Mesh, plan: Plan) -> Axes:
    """The axes along which what an operator would gather goes round instead, if it can and the plan has it so."""
    split = {f for o in spec.circulates for dim in o.gathered for f in dim.leaves()}
    axes = tuple(a for a in mesh.names if at.get(a) in split)
    return axes if plan.sends_around and set(axes) <= set(mesh.axes("cp")) else ()


def scatterable(spec: Spec) -> list[Factor]:
    """The output's factors that a pending sum may be scattered onto: all, or those that what is added later shares. Not rows in
    an order of their own, which what follows wants together."""
    flat = [f for d in spec.outs[0] if share_of(d) is None for f in leaves(d)]
    if any(o.deferred for o in spec.operands):
        replicated = {f for s in spec.replicated for f in s.leaves()}
        return [f for f in flat if f not in replicated]
    return flat


def appends(layout: Layout, leaf: Factor, axis: str, mesh: Mesh) -> bool:
    """Whether `axis` can split the parts of `leaf` that `layout` leaves: it fits, and is more minor than those there."""
    return fits(layout, leaf, axis, mesh) and axes_on(leaf, {**layout, axis: leaf}, mesh)[-1] == axis


def _candidates(spec: Spec) -> list[Factor]:
    """The factors that may be split at this operator, in the order they occur; those of rows in the order of their experts are
    decided together (see passes/place/experts.py)."""
    barred = rows_of(spec) | {f for s in spec.replicated for f in s.leaves()}
    barred |= {f for d in spec.leading for f in leaves(d)[1:]}
    reduced = {f for s in (*spec.sums, *spec.maxes, *spec.inner) for f in s.leaves()}
    outs = [{f for d in dims for f in leaves(d)} for dims in spec.outs]
    everywhere = set.intersection(*outs) if outs else set()
    order = [f for o in spec.operands for d in o.dims for f in leaves(d)]
    order += [f for dims in spec.outs for d in dims for f in leaves(d)]
    return [f for f in dict.fromkeys(order) if f not in barred and (f in reduced or f in everywhere)]


def _note_unsplit(program: Program, placed: Placements, prefs: list[Preference]) -> None:
    """Say which parameters' factors the plan wanted to split and could not, and why."""
    for node, source in program.source_of().items():
        if source.kind != "param":
            continue
        layout = placed.layouts[node]
        for i, dim in enumerate(dims_of(node)):
            split = {axis for axis, leaf in layout.items() if leaf in leaves(dim)}
            for leaf in leaves(dim):
                pref = next((p for p in prefs if p.role == leaf.role and not p.beside), None)
                axes = program.mesh.axes(pref.strategy) if pref else ()
                n = program.mesh.size(*axes)
                if n > 1 and leaf.size % n and leaf.size > 1 and split.isdisjoint(axes):
                    program.note(
                        f"{pref.role} {leaf.size} (dim {i} of {source.name}) does not divide by "
                        f"{pref.strategy}={n}: left replicated"
                    )
