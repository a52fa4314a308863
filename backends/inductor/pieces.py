"""pieces: a graph cut into pieces of which many are equal, so that each is compiled once.

A model's equal layers make equal stretches of operators, one behind the other, in the forward and in the backward graph. They
are found in the graph itself, when everything about it is decided: recomputation, collectives and their order. So the pieces
run one after the other and compute what the graph computes; each class of equal ones is compiled once, and generating code for 80
layers takes no longer than for 8.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.inductor.runs import LEAST, SMALLEST, Repetition, most_alike, runs_of
from fxpar.backends.inductor.transfers import is_kernel, transfers_of
from fxpar.backends.remat import BLOCK
from fxpar.backends.repeats import frozen, references_of
from fxpar.ops.vocabulary import ALL_REDUCE, WAITS, is_view

ROTATIONS = 4
PASSED = 4096
"""What it costs to pass on a value from piece to piece, in bytes that a kernel moves."""
COUNTED = 2**16
"""What a size is taken for that is known only when the graph runs, in what a cut costs."""
NEVER = 2**50
UNREAD = {"val", "stack_trace", "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack", "fwd_source_fn_stack", "from_node",
          "seq_nr", "original_aten", "partitioner_tag", "mutation_region_id", "tensor_meta", "recompute", "ac_graph_id",
          "autograd_backward", "is_gradient_acc", "torch_fn", "example_value", "desc", "unbacked_bindings"}
"""Keys of a node's meta that say where it comes from, and nothing of what is generated for it; values are compared as such."""
OWN = "fxpar_"
"""How the keys of fxpar's own marks begin, which graph passes read."""
ALL_REDUCES = (ALL_REDUCE, torch.ops._c10d_functional.all_reduce_coalesced.default)
"""Collectives that Inductor runs in place, on copies of their operands."""


class Uncuttable(Exception):
    """The graph has something that pieces cannot have."""


def cut_into_pieces(module: fx.GraphModule, static: Sequence[int] = (), donated: Sequence[int] = (),
                    share: float = 1.0) -> compat.Pieces | None:
    """The pieces of a graph, if at most `share` of its operators are left to compile.

    Takes: a graph in its final order, whose values are in ``meta["val"]``, before code is generated for it. static, donated: the
    positions of inputs that stay where they are in memory, and of those that may be overwritten. Afterwards: the graph is as it
    was. The pieces, run in their order, compute the same; what a collective under way reads stays until the piece that waits for
    it has run. Sizes may depend on values: equal pieces have the same ones of that kind, whatever they are called. None where
    nothing repeats, where strides or other numbers depend on values, or what a collective of PyTorch's is given, and where an
    operator runs a graph.
    """
    try:
        return _Cut(module, static, donated).pieces(share)
    except Uncuttable:
        return None


def repeats(graph: fx.Graph, share: float) -> bool:
    """Whether so much of a graph is equal stretches that at most `share` of it differs, as far as targets and arguments tell."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    known: dict[Hashable, int] = {}
    tokens = [known.setdefault((n.target, frozen(n.args), frozen(n.kwargs)), len(known)) for n in nodes]
    saved = sum((run.count - 1) * run.period for run in runs_of(tokens))
    return len(nodes) - saved <= share * len(nodes)


def _like(value: Any, names: dict[sympy.Symbol, int] | None = None) -> Hashable:
    """What is generated for a value depends on. names: of sizes that are known only when the graph runs, in the order in which
    they are met; None: all are called the same. Raises: `Uncuttable` for what else is known only then."""
    if isinstance(value, Tensor):
        strides = (*value.stride(), value.storage_offset())
        if not all(type(n) is int for n in strides):
            raise Uncuttable
        return tuple(_size(n, names) for n in value.shape), strides, value.dtype, value.device, value.layout
    if isinstance(value, list | tuple):
        return tuple(_like(v, names) for v in value)
    if isinstance(value, dict):
        return tuple((k, _like(v, names)) for k, v in value.items())
    if isinstance(value, torch.SymInt):
        return "a number", _size(value, names)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    raise Uncuttable


def _size(size: int | torch.SymInt, names: dict[sympy.Symbol, int] | None) -> int | str:
    if isinstance(size, int):
        return size
    made = size.node.expr
    symbols = sorted(made.free_symbols, key=str)
    return str(made.xreplace({s: sympy.Symbol(f"n{0 if names is None else names.setdefault(s, len(names))}") for s in symbols}))


def _is_counted(node: fx.Node) -> bool:
    """Whether a value is, or has, a size that is known only when the graph runs."""
    return compat.is_counted(node.meta.get("val"))


# ---- cutting ----


@dataclass
class _Form:
    """A stretch of a graph by itself.

    key: equal for stretches for which the same is generated. takes, gives: the values that enter and leave it.
    """

    key: Hashable
    takes: list[fx.Node]
    gives: list[fx.Node]


@dataclass
class _Cut:
    """One graph, being cut."""

    module: fx.GraphModule
    static: Sequence[int]
    donated: Sequence[int]

    def __post_init__(self) -> None:
        graph = self.module.graph
        self.inputs = graph.find_nodes(op="placeholder")
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self.output = graph.output_node()
        results: Any = self.output.args[0]
        self.results: list[fx.Node | None] = list(results)
        if not all(n is None or isinstance(n, fx.Node) for n in self.results):
            raise Uncuttable
        for node in self.nodes:
            function = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
            if node.op != "call_function" or not function or _knows_sizes(node):
                raise Uncuttable
        self.at = {n: i for i, n in enumerate(self.nodes)}
        self.fixed = {self.inputs[i] for i in self.static}
        self.free = {self.inputs[i] for i in self.donated}
        returned = self.output.meta.get("user_visible_output_idxs", ())
        self.visible = {n for i, n in enumerate(self.results) if n is not None and i in returned}
        self.last = {n: max((self.at.get(u, len(self.nodes)) for u in n.users), default=-1) for n in graph.nodes}
        self.held = self._held()
        self.needed = {n: max([self.last[n], *(wait for _, wait in self.held.get(n, ()))]) for n in graph.nodes}
        self.memory = _memory(self.inputs, self.nodes)
        self.read_until: dict[fx.Node, int] = {}
        for node, base in self.memory.items():
            self.read_until[base] = max(self.read_until.get(base, -1), self.needed[node])
        self.tokens = self._tokens()
        self.transfers = transfers_of(graph)
        self.core = [i for i, n in enumerate(self.nodes) if n not in self.transfers]

    def pieces(self, share: float) -> compat.Pieces | None:
        bounds, forms = self._joined(self._bounds())
        sizes = {form.key: b - a for form, a, b in zip(forms, bounds, bounds[1:], strict=False)}
        if len(sizes) == len(forms) or sum(sizes.values()) > share * len(self.nodes):
            return None
        if not all(isinstance(n.meta["val"], Tensor | torch.SymInt) for form in forms for n in (*form.takes, *form.gives)):
            return None
        self._check_writes(bounds, forms)
        return self._made(bounds, forms)

    # -- where it is cut --

    def _bounds(self) -> list[int]:
        """Between equal stretches of what computes, and around the transfers that stand among those."""
        bounds = {0, len(self.nodes)}
        for run in runs_of([self.tokens[i] for i in self.core]):
            if self._is_work(run):
                bounds.update(self._around_transfers(run) or self._best(run))
        return sorted(bounds)

    def _is_work(self, run: Repetition) -> bool:
        """Whether what is repeated computes something."""
        return sum(not is_view(n) and n.target is not operator.getitem
                   for n in (self.nodes[i] for i in self.core[run.start : run.start + run.period])) >= SMALLEST

    def _around_transfers(self, run: Repetition) -> list[int]:
        """Where transfers stand in several stretches of a run, all are cut: before and behind, and between two kinds of them."""
        found = Counter(run.offset(i) for i in run.places if len(self._gap(i)) > 1)
        cuts: list[int] = []
        for i in run.places:
            if found[run.offset(i)] >= LEAST:
                gap = self._gap(i)
                kinds = [self.transfers[n] for n in self.nodes[gap[0] : gap[-1]]]
                cuts += [gap[0], gap[-1], *(k for k, (a, b) in zip(gap[1:], pairwise(kinds), strict=False) if a != b)]
        return cuts

    def _gap(self, place: int) -> range:
        """The places among all operators from behind one that computes to before the next one."""
        low = self.core[place - 1] + 1 if place else 0
        return range(low, (self.core[place] if place < len(self.core) else len(self.nodes)) + 1)

    def _best(self, run: Repetition) -> list[int]:
        """Where a run is cut: before, between and behind equal pieces. Where cuts cost least is tried first."""
        costs = self._costs()

        def cuts(rotation: int) -> list[int]:
            return [self._gap(i)[0] for i in range(run.start + rotation, run.places.stop, run.period)]

        def cost(rotation: int) -> float:
            return sum(costs[c] for c in cuts(rotation)) / len(cuts(rotation))

        found: list[int] = []
        for tried in map(cuts, sorted(range(run.period), key=cost)[:ROTATIONS]):
            keys = [self._form(a, b).key for a, b in pairwise(tried)]
            first, count = most_alike(keys)
            if count >= LEAST and count + 1 > len(found):
                found = tried[first : first + count + 1]
                if count >= len(keys) - 2:
                    break
        return found

    def _costs(self) -> list[float]:
        """Of a cut before each operator: what it passes on, and moves that fused kernels would not."""
        change = [0.0] * (len(self.nodes) + 2)
        for node in self.nodes:
            begin, needed = self.at[node] + 1, self.needed[node]
            if needed >= begin:
                cost = PASSED if isinstance(node.meta["val"], Tensor | torch.SymInt) else NEVER
                change[begin] += cost
                change[needed + 1] -= cost
            if is_fused(node):
                read = min((self.at[u] for u in _readers(node) if u in self.at and is_fused(u)), default=-1)
                if read >= begin:
                    change[begin] += _bytes(node)
                    change[read + 1] -= _bytes(node)
        total, costs = 0.0, []
        for step in change:
            total += step
            costs.append(total)
        return costs

    def _joined(self, bounds: list[int]) -> tuple[list[int], list[_Form]]:
        """The bounds but for those between two pieces that are like no other; and the pieces."""
        forms = [self._form(a, b) for a, b in pairwise(bounds)]
        counts = Counter(form.key for form in forms)
        alone = [counts[form.key] == 1 for form in forms]
        kept = [b for b, (left, right) in zip(bounds[1:], pairwise(alone), strict=False) if not (left and right)]
        bounds = [0, *kept, len(self.nodes)]
        return bounds, [self._form(a, b) for a, b in pairwise(bounds)]

    # -- what is where --

    def _tokens(self) -> list[int]:
        known: dict[Hashable, int] = {}
        return [known.setdefault((n.target, frozen(n.args), frozen(n.kwargs), _facts(n)), len(known)) for n in self.nodes]

    def _held(self) -> dict[fx.Node, list[tuple[int, int]]]:
        """Of what a collective reads: where it starts, and where it is waited for."""
        held: dict[fx.Node, list[tuple[int, int]]] = {}
        for start in self.nodes:
            waits = [self.at[u] for u in _waits(start)]
            if waits and start.target not in ALL_REDUCES and start.target is not operator.getitem:
                for operand in start.all_input_nodes:
                    held.setdefault(operand, []).append((self.at[start], max(waits)))
        return held

    # -- one piece --

    def _form(self, low: int, high: int) -> _Form:
        """The operators from one place up to another."""
        inside = {n: i for i, n in enumerate(self.nodes[low:high])}
        takes: dict[fx.Node, int] = {}

        def number(node: fx.Node) -> tuple[str, int]:
            return ("inside", inside[node]) if node in inside else ("given", takes.setdefault(node, len(takes)))

        lines = [(self.tokens[low + i], tuple(number(r) for r in references_of(n))) for n, i in inside.items()]
        gives = [n for n in inside if self.needed[n] >= high]
        free = self._overwritten(list(takes), high)
        names: dict[sympy.Symbol, int] = {}
        given = [(_like(n.meta["val"], names), n in self.fixed, self._under_way(n), n in free) for n in takes]
        sizes = [_like(n.meta["val"], names) for n in inside if _is_counted(n)]
        leaves = tuple(inside[n] for n in gives)
        return _Form((tuple(lines), tuple(given), tuple(sizes), leaves), list(takes), gives)

    def _is_exact(self, node: fx.Node, high: int) -> bool:
        """Whether a value that leaves a piece has to lie as the graph says: another piece reads it, or the user, or its size is
        known only when the graph runs."""
        read = max((self.at[u] for u in node.users if u in self.at), default=-1)
        return node in self.visible or read >= high or _is_counted(node)

    def _under_way(self, node: fx.Node) -> bool:
        return node in self.at and any(u.target in WAITS for u in node.users)

    def _overwritten(self, takes: list[fx.Node], high: int) -> set[fx.Node]:
        """Inputs of the graph that a piece may overwrite: nothing else has their memory, and nothing after it reads that."""
        shared = Counter(self.memory[n] for n in takes) if self.free else Counter()
        return {n for n in takes if n in self.free and shared[self.memory[n]] == 1 and self.read_until[self.memory[n]] < high}

    # -- all of them --

    def _check_writes(self, bounds: list[int], forms: list[_Form]) -> None:
        """Raise `Uncuttable` if a piece writes to memory that it is given twice: Inductor takes what it is given for apart."""
        for form, a, b in zip(forms, bounds, bounds[1:], strict=False):
            written = {self.memory[r] for n in self.nodes[a:b]
                       if compat.mutates(n.target) and n.target not in WAITS for r in n.all_input_nodes}
            given = Counter(self.memory[n] for n in form.takes)
            if any(given[m] > 1 for m in written):
                raise Uncuttable

    def _made(self, bounds: list[int], forms: list[_Form]) -> compat.Pieces:
        slot = {n: i for i, n in enumerate([*self.inputs, *dict.fromkeys(n for form in forms for n in form.gives)])}
        kinds: dict[Hashable, int] = {}
        firsts: dict[Hashable, int] = {}
        graphs: list[fx.GraphModule] = []
        pieces: list[compat.GraphPiece] = []
        exact: dict[Hashable, set[int]] = {}  # for one of equal pieces at least
        for form, high in zip(forms, bounds[1:], strict=True):
            exact.setdefault(form.key, set()).update(i for i, n in enumerate(form.gives) if self._is_exact(n, high))
        emptied = self._emptied(bounds, slot)
        for form, low, high, (before, after) in zip(forms, bounds, bounds[1:], emptied, strict=False):
            if form.key not in kinds:
                kinds[form.key], firsts[form.key] = len(graphs), low
                graphs.append(self._graph(low, high, form))
            free = self._overwritten(form.takes, high)
            pieces.append(compat.GraphPiece(
                kinds[form.key], takes=[slot[n] for n in form.takes], gives=[slot[n] for n in form.gives], before=before,
                after=after, fixed=[i for i, n in enumerate(form.takes) if n in self.fixed or self._under_way(n)],
                donated=[i for i, n in enumerate(form.takes) if n in free],
                exact=sorted(exact[form.key]),
                counted={i: n.meta["val"] for i, n in enumerate(form.gives) if _is_counted(n)},
                names=self._names(firsts[form.key], low, high)))
        results = [None if n is None else slot[n] for n in self.results]
        return compat.Pieces(graphs, pieces, [n.meta["val"] for n in self.inputs], len(slot), results)

    def _names(self, first: int, low: int, high: int) -> dict[str, str]:
        """The blocks that operators from `first` on are of -> those that the equal ones between two places are of."""
        pairs = zip(self.nodes[first:], self.nodes[low:high], strict=False)
        blocks = [tuple(n.meta.get("custom", {}).get(BLOCK, "") for n in pair) for pair in pairs]
        return {a: b for a, b in blocks if a and b and a != b}

    def _emptied(self, bounds: list[int], slot: dict[fx.Node, int]) -> list[tuple[list[int], list[int]]]:
        """The slots to empty before each piece, which is handed what was in them, and after it."""
        piece = [k for k, (low, high) in enumerate(pairwise(bounds)) for _ in range(low, high)]
        emptied: list[tuple[list[int], list[int]]] = [([], []) for _ in bounds[1:]]
        for node, i in slot.items():
            if self.needed[node] == len(self.nodes):
                continue
            k = piece[max(self.needed[node], 0)]
            under_way = any(piece[start] < piece[wait] == k for start, wait in self.held.get(node, ()))
            emptied[k][under_way].append(i)
        return emptied

    def _graph(self, low: int, high: int, form: _Form) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(form.takes):
            copies[node] = graph.placeholder(f"given_{i}")
            copies[node].meta = dict(node.meta)
        for i, node in enumerate(self.nodes[low:high]):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"value_{i}")
            copies[node].meta = dict(node.meta)
        graph.output(tuple(copies[n] for n in form.gives))
        return fx.GraphModule(self.module, graph)


def _knows_sizes(node: fx.Node) -> bool:
    """Whether an operator is a collective that quick code starts by sizes that it has seen (see `direct`), of what has others."""
    of_sizes = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional"
    return of_sizes and node.target not in WAITS and any(_is_counted(n) for n in node.all_input_nodes)


def _facts(node: fx.Node) -> Hashable:
    """What a compiler may read of a node, beside target and arguments."""
    read = {k: v for k, v in node.meta.items() if k not in UNREAD and k != "custom"}
    more = [(k, _like(v) if k == "eager_input_vals" else repr(v)) for k, v in read.items()]
    marks = [(k, repr(v)) for k, v in node.meta.get("custom", {}).items() if not k.startswith(OWN)]
    return _like(node.meta.get("val")), tuple(sorted(more)), tuple(sorted(marks))


def _waits(start: fx.Node) -> Iterator[fx.Node]:
    """What waits for a collective, for one of its results, or for parts of one."""
    for user in start.users:
        if user.target in WAITS:
            yield user
            yield from _waits(user)
        elif user.target is operator.getitem:
            yield from _waits(user)


def _memory(inputs: list[fx.Node], nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Of each value another one, the same for values that may share memory."""
    base = {n: n for n in inputs}

    def found(node: fx.Node) -> fx.Node:
        while base[node] is not node:
            node = base[node]
        return node

    for node in nodes:
        base[node] = node
        for operand in _shared(node):
            base[found(operand)] = node
    return {n: found(n) for n in base}


def _shared(node: fx.Node) -> list[fx.Node]:
    """The operands of which an operator's results may be parts, or which it may write to and return."""
    target: Any = node.target
    if target in WAITS:
        return node.all_input_nodes
    if target is not operator.getitem:
        return [] if node.args and isinstance(node.args[0], list | tuple) else _aliased(node)
    made, number = node.args[0], node.args[1]
    assert isinstance(made, fx.Node) and isinstance(number, int)
    several = made.args[0] if made.args else None
    if isinstance(several, list | tuple):  # each of several operands, by itself
        return [several[number]] if _aliased(made) else []
    return [made] if _aliased(made) else []


def _aliased(node: fx.Node) -> list[fx.Node]:
    target: Any = node.target
    if target is operator.getitem:
        return node.all_input_nodes
    return node.all_input_nodes if any(r.alias_info is not None for r in target._schema.returns) else []


def is_fused(node: fx.Node) -> bool:
    """Whether Inductor computes an operator in a kernel with others."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims") or is_view(node):
        return False
    return not is_kernel(node)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The operators that compute with a value, or with a view of it."""
    for user in node.users:
        if user.op == "call_function" and is_view(user):
            yield from _readers(user)
        else:
            yield user


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return math.prod(n if isinstance(n, int) else COUNTED for n in value.shape) * value.element_size()
