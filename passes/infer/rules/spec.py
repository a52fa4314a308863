"""What an operator's rule says, and the notation most rules are written in.

A rule looks at one node and returns a `Spec`: the factors of each operand's and output's dims, which of
them add up (or maximise) over the operand, and which must not be split while this operator runs. Most are
one line of `einsum` notation::

    einsum(op, "... i, o i, +o -> ... o")        # linear

``...`` broadcasts like PyTorch; a letter missing from the output is summed; ``k!`` must not be split;
``k^`` is reduced by maximum; an operand that starts with ``+`` is added after a pending sum (a bias).

One factor may stand for two letters: queries and keys are the same sequence. It stays with the first of them in the output;
whoever has it under another letter is *gathered* at this operator, and the output's dim gets a factor of its own. So it is where
dims of one letter cannot be the same: each operand holds its own whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxpar.sharding.factors import Dim, Dims, Factor, Factors, extent, leaves
from fxpar.sharding.facts import dims_of, global_value


@dataclass
class Operand:
    """One tensor operand.

    gathered: factors that it must hold in full although the op splits them. deferred: it is added after a
    pending sum; its last dim then lies along the output's dim `along`, counted from the end.
    """

    node: fx.Node
    dims: Dims
    gathered: set[Factor] = field(default_factory=set)
    deferred: bool = False
    along: int = -1


@dataclass
class Spec:
    """How one operator relates the factors of its operands and outputs.

    operands: every tensor operand, in the order of the node's arguments.
    outs: the dims of each output tensor. sums, maxes: factors that the op reduces; split, they leave a
    pending sum or maximum. inner: factors that the op reduces by collectives of its own (see `emit`).
    replicated: factors that may not be split while the op runs. by_token: whether it runs where the tokens are, and not the
    experts, if rows are exchanged between both (see rules/experts.py). leading: dims of which only the first factor may be split,
    so that each rank's part is contiguous.
    sizes: arguments that spell sizes, and the dims they spell (rewritten to local sizes).
    emit: how to build the local program, where calling the same operator on local operands is not it.
    contiguous: its operands must be (what was gathered need not be). unknown: the operator has no rule; it runs replicated.
    circulates: operands that are gathered, but may also stay split along a ring of ranks: `emit` then has each rank's part go
    round.
    """

    operands: list[Operand]
    outs: list[Dims]
    sums: set[Factor] = field(default_factory=set)
    maxes: set[Factor] = field(default_factory=set)
    inner: set[Factor] = field(default_factory=set)
    replicated: set[Factor] = field(default_factory=set)
    by_token: bool = False
    leading: list[Dim] = field(default_factory=list)
    sizes: dict[str, Dims] = field(default_factory=dict)
    emit: Callable[[Any], Any] | None = None
    contiguous: bool = False
    unknown: bool = False
    circulates: list[Operand] = field(default_factory=list)


class Op:
    """One node as a rule sees it: arguments by name, dims of operands, values of outputs."""

    def __init__(self, node: fx.Node, factors: Factors):
        self.node = node
        self.factors = factors
        self.target: Any = node.target

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        return bind(self.node)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def dims(self, node: fx.Node) -> Dims:
        return dims_of(node)

    def dim(self, node: fx.Node, index: int) -> Dim:
        return dims_of(node)[index]

    @property
    def out(self) -> Any:
        return self.node.meta["val"]

    def outs(self) -> list[torch.Tensor]:
        value = self.out
        return [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]

    def tensors(self) -> list[fx.Node]:
        """The tensor operands, each once, in argument order."""
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def operands(self) -> list[Operand]:
        return [Operand(n, self.dims(n)) for n in self.tensors()]

    def shape(self, node: fx.Node) -> list[int]:
        return [int(n) for n in node.meta["val"].shape]

    def needs_grad(self) -> bool:
        return any(global_value(n).needs_grad for n in self.tensors())


def bind(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of the operator's schema, in its order (index for plain functions)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    given = {**{a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}, **node.kwargs}
    return {
        a.name: given.get(a.name, a.default_value) for a in schema.arguments if a.name in given or a.has_default_value()
    }


def relate(op: Op, dims: Sequence[Dim], replicated: set[Factor], size: int) -> Dim:
    """One dimension that these operand dims share: their factors made the same, or all replicated if they can't be."""
    first = dims[0] if dims else op.factors.new(size)
    ok = True
    for other in dims[1:]:
        ok = op.factors.align(first, other) and ok
    if ok and all(leaves(d) == leaves(first) for d in dims[1:]):
        return first
    for d in dims:
        replicated.update(d)
    fresh = op.factors.new(size)
    replicated.update(fresh)
    return fresh


Held = list[tuple[Operand, Dim]]
"""Operands, and the dim of each that is meant."""


def shared(op: Op, held: Held, whole: set[Factor], size: int) -> Dim:
    """One dimension that these dims of operands share: their factors made the same; or one that stays whole, and each operand
    gathered."""
    held = [(o, d) for o, d in held if d] or held[:1]
    first = held[0][1] if held else op.factors.new(size)
    if all([op.factors.align(first, d) for _, d in held[1:]]) and all(leaves(d) == leaves(first) for _, d in held[1:]):
        return first
    return _apart(op, held, whole, size)


def _apart(op: Op, held: Held, whole: set[Factor], size: int) -> Dim:
    """A new dimension, which stays whole, for what these operands then have to gather."""
    for operand, dim in held:
        operand.gathered.update(dim)
    fresh = op.factors.new(size)
    whole.update(fresh)
    return fresh


def distinct(op: Op, out: Sequence[Dim], held: Sequence[Held], whole: set[Factor]) -> Dims:
    """The dims of an output; what an earlier one has already is gathered at the operands that a later one comes from."""
    seen: set[Factor] = set()
    dims = []
    for dim, source in zip(out, held, strict=True):
        if seen.intersection(leaves(dim)):
            dim = _apart(op, [(o, d) for o, d in source if extent(d) > 1], whole, extent(dim))
        seen.update(leaves(dim))
        dims.append(dim)
    return tuple(dims)


def finish(op: Op, spec: Spec) -> Spec:
    """Keep the invariant that no tensor has one factor twice: a repeated one is renamed and replicated."""
    for k, dims in enumerate(spec.outs):
        if op.factors.distinct(dims):
            continue
        seen: set[Factor] = set()
        renamed = []
        for d in dims:
            flat = leaves(d)
            if seen.intersection(flat):
                spec.replicated.update(flat)
                d = op.factors.new(extent(d))
                spec.replicated.update(d)
            seen.update(leaves(d))
            renamed.append(d)
        spec.outs[k] = tuple(renamed)
    return spec


def elementwise(op: Op, nodes: Sequence[fx.Node] | None = None) -> Spec:
    """Each output element from the operand elements at the same place, with broadcasting."""
    operands = [Operand(n, op.dims(n)) for n in (op.tensors() if nodes is None else nodes)]
    replicated: set[Factor] = set()
    dims = broadcast(op, [(o, o.dims) for o in operands], [int(n) for n in op.outs()[0].shape], replicated)
    return Spec(operands, [dims for _ in op.outs()], replicated=replicated)


def broadcast(op: Op, operands: Sequence[tuple[Operand, Dims]], shape: Sequence[int], replicated: set[Factor]) -> Dims:
    """The dims of operands broadcast against each other to `shape`."""
    held: list[Held] = [
        [(o, d[len(d) - back]) for o, d in operands if len(d) >= back and extent(d[len(d) - back]) != 1]
        for back in range(len(shape), 0, -1)
    ]
    out = [shared(op, here, replicated, int(n)) for here, n in zip(held, shape, strict=True)]
    return distinct(op, out, held, replicated)


def einsum(op: Op, notation: str, nodes: Sequence[fx.Node | None] | None = None) -> Spec:
    """A `Spec` from einsum notation (see the module's docstring). A ``None`` operand is skipped."""
    if nodes is None:  # an operand that is given twice stands for two terms
        nodes = [a for a in op.args.values() if isinstance(a, fx.Node)]
    left, right = notation.split("->")
    texts = [t.split() for t in left.split(",")]
    marks: dict[str, set[str]] = {"!": set(), "^": set()}
    terms: list[list[str]] = []
    operands: list[Operand] = []
    for text, node in zip(texts, nodes, strict=False):
        if node is None:
            continue
        deferred, text = text[:1] == ["+"] or text[0].startswith("+"), [t for t in text if t != "+"]
        letters = [t.lstrip("+").rstrip("!^") for t in text]
        for t, letter in zip(text, letters, strict=True):
            if t[-1] in marks:
                marks[t[-1]].add(letter)
        terms.append(letters)
        operands.append(Operand(node, op.dims(node), deferred=deferred))
    result = right.split()
    spec = Spec(operands, [])
    where: dict[str, Held] = {}
    batches: list[tuple[Operand, Dims]] = []
    for operand, letters in zip(operands, terms, strict=True):
        dims = list(operand.dims)
        if letters[:1] == ["..."]:
            tail = len(letters) - 1
            batches.append((operand, tuple(dims[: len(dims) - tail])))
            letters, dims = letters[1:], dims[len(dims) - tail :]
        for letter, dim in zip(letters, dims[len(dims) - len(letters) :], strict=True):
            where.setdefault(letter, []).append((operand, dim))
    shape = [int(n) for n in op.outs()[0].shape]
    named = {c: shared(op, held, spec.replicated, max(extent(d) for _, d in held)) for c, held in where.items()}
    lead = broadcast(op, batches, shape[: len(shape) - len(result) + 1], spec.replicated) if result[:1] == ["..."] else ()
    letters = [c for c in result if c != "..."]
    spec.outs = [distinct(op, (*lead, *(named[c] for c in letters)), [*([] for _ in lead), *(where[c] for c in letters)],
                          spec.replicated)]
    kept = {f for d in spec.outs[0] for f in leaves(d)}
    for c in named:  # what is not split under this letter, but may be under another
        if c not in letters and (c in marks["!"] or kept.intersection(leaves(named[c]))):
            for operand, dim in where[c]:
                operand.gathered.update(dim)
            named[c] = tuple(f for f in leaves(named[c]) if f not in kept)
    spec.replicated.update(f for c in marks["!"] for f in named.get(c, ()))
    given = [o.node for o in operands]
    spec.replicated.update(f for o in operands if given.count(o.node) > 1 for f in o.gathered)  # it is brought once
    spec.maxes.update(f for c in marks["^"] for f in named[c])
    spec.sums.update(f for c, d in named.items() if c not in result and c not in marks["^"] for f in d)
    return spec


def untouched(op: Op, node: fx.Node, dims: Iterable[int]) -> Spec:
    """The output has the operand's shape, and the op works along `dims`, which stay replicated (softmax, cumsum)."""
    own = op.dims(node)
    replicated = {f for i in dims for f in own[i]}
    return Spec(op.operands(), [own for _ in op.outs()], replicated=replicated)


def unknown(op: Op) -> Spec:
    """No rule: every operand is replicated, and every output."""
    operands = op.operands()
    outs = [op.factors.fresh(v.shape) for v in op.outs()]
    replicated = {f for o in operands for d in o.dims for f in d} | {f for o in outs for d in o for f in d}
    return Spec(operands, outs, replicated=replicated, contiguous=True, unknown=True)
