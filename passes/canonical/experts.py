"""experts: rows that are sorted by their experts, multiplied and put back become operators that work on any part of the tokens.

A mixture of experts sorts all rows of the batch, which no rank can do with its own; but a row's result depends on that row alone.
That is a property of the region from the sort to its inverse, and of no operator in it, so it is proved of the region.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.ops.experts import combine, expert_product, expert_rows, order_of, put_back, sort_experts, take_rows
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.vocabulary import RESHAPES
from fxpar.passes.canonical.counted import CASTS, counted_numbers, same_numbers, uncast
from fxpar.passes.infer.rules.registry import spec_for
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter, remove_unread
from fxpar.program import Program, is_tensor
from fxpar.sharding.factors import Factors, leaves
from fxpar.sharding.facts import describe_global, dims_of

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
QUOTIENTS = (aten.floor_divide.default, aten.div.Tensor_mode)
LIKE = (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
WIDENED = (*RESHAPES, aten.unsqueeze.default, aten.expand.default)
LOOKUPS = (aten.index.Tensor, aten.index_select.default, aten.gather.default)
ADDS = (aten.index_add.default, aten.scatter_add.default)


def sort_by_expert(program: Program) -> Program:
    """Rewrite, in place, every region from a sort of integers to where its order is undone.

    Takes: a captured program; dropout still by operators of ATen. Afterwards: in a region of which all operators between the
    sort and its inverse treat every row alike and by itself, the sort, the lookups that bring rows into its order and out of
    it, and grouped products are those of `fxpar.ops.experts`; values in that order are marked (`GlobalValue.by_expert`). A
    region that has another operator stays as it is.
    """
    for node in list(program.graph.nodes):
        if node.target in SORTS and node.users:
            region = _Region(node)
            if region.found():
                region.rewrite(program.graph)
    remove_unread(program.graph)
    for node in list(program.graph.nodes):
        if node.target in (put_back, combine):
            _score_behind(program.graph, node)
    remove_unread(program.graph)
    program.graph.lint()
    return program


class _NotByRow(Exception):
    """An operator that is not known to treat rows by themselves."""


Make = Callable[[Rewriter, dict[str, Any]], fx.Node]
"""What takes the place of a node, from its arguments."""


class _Region:
    """What is made from one sort. Each of its values has a kind.

    sort: the result of an operator that returns both of the next two; ids: the sorted numbers; order: the permutation; token: of
    every row the number of what `times` of them are made from, which is the order divided by `times`; inverse: of the order;
    rows: all else in that order.
    """

    def __init__(self, sort: fx.Node):
        self.sort = sort
        self.kinds: dict[fx.Node, str] = {}
        self.times: dict[fx.Node, int] = {}
        self.made: dict[fx.Node, Make] = {}
        self.bounds: dict[fx.Node, int] = {}  # the largest of numbers that were clamped
        self.counts: set[int] = set()  # how many experts there are
        self.left = False  # whether something leaves the order again

    # ---- what there is ----

    def found(self) -> bool:
        """Whether the region is one that can be rewritten."""
        a = bind(self.sort)
        value = a["self"].meta["val"]
        if value.dim() != 1 or len(value) < 2 or value.is_floating_point() or value.dtype == torch.bool or a["descending"]:
            return False
        self.rows = int(value.shape[0])
        self.kinds[self.sort] = "order" if is_tensor(self.sort) else "sort"
        node = self.sort.next
        try:
            while node.op != "output":
                if any(n in self.kinds for n in node.all_input_nodes):
                    kind = self._kind(node)
                    self.kinds.update({} if kind is None else {node: kind})
                node = node.next
        except _NotByRow:
            return False
        return self.left and len(self.counts) < 2 and not any(n in self.kinds for n in node.all_input_nodes)

    def _is(self, value: Any, *kinds: str) -> bool:
        return isinstance(value, fx.Node) and self.kinds.get(value) in kinds

    def _kind(self, node: fx.Node) -> str | None:
        """The kind of what an operator makes of values of the region; None of a value that is not of the region."""
        target, a, first = node.target, bind(node), node.all_input_nodes[0]
        if target is operator.getitem:
            return ("ids", "order")[a["1"]] if self._is(first, "sort") else "rows"
        if target in LIKE and self._is(first, "order"):
            return None  # made of its shape alone
        if target in CASTS and self._is(first, "ids", "order"):
            return self._same(node, first)
        if target is aten.clamp.default and self._is(first, "ids") and (a["min"] or 0) == 0 and isinstance(a["max"], int):
            return self._same(node, first, a["max"])
        if target in QUOTIENTS and self._is(a["self"], "order"):
            return self._token(node, a)
        if target in WIDENED and self._is(first, "token"):
            return self._widened(node, first)
        if target in SORTS and self._is(a["self"], "order") and is_tensor(node) and not a["descending"]:
            return "inverse"
        if target is aten.histc.default and self._is(a["self"], "ids"):
            return self._counts(node, a)
        if target is grouped_mm and self._is(a["x"], "rows"):
            return self._product(node, a)
        if target is aten.index_put.default and len(a["indices"]) == 1 and self._is(a["indices"][0], "order"):
            return self._scattered(node, a)
        if target in LOOKUPS and self._is(_index(node, a), "order", "token", "inverse"):
            return self._looked_up(node, a)
        if target in LOOKUPS and self._is(_index(node, a), "ids") and a["self"] not in self.kinds:
            return self._of_experts(node, a)
        if target in ADDS and self._is(a["index"], "token", "order"):
            return self._added(node, a)
        return self._by_row(node, a)

    def _same(self, node: fx.Node, first: fx.Node, bound: int | None = None) -> str:
        """Numbers, cast, or with one in the place of all that are too large."""
        known = [b for b in (self.bounds.get(first), bound) if b is not None]
        self.bounds.update({node: min(known)} if known else {})
        return self.kinds[first]

    def _token(self, node: fx.Node, a: dict[str, Any]) -> str:
        times = a["other"]
        _need(isinstance(times, int) and times > 0 and self.rows % times == 0)
        _need(a.get("rounding_mode", "floor") is not None)
        self.times[node] = times
        return "token"

    def _widened(self, node: fx.Node, first: fx.Node) -> str:
        """An index that says the same for all of a row."""
        before, after = (n.meta["val"].shape for n in (first, node))
        _need(after[0] == self.rows and (node.target is not aten.expand.default or len(before) == len(after)))
        self.times[node] = self.times[first]
        return "token"

    def _counts(self, node: fx.Node, a: dict[str, Any]) -> str | None:
        """How many rows each number has, which is no matter of their order."""
        _need((a["min"], a["max"]) == (0, len(node.meta["val"]) - 1))

        def make(r: Rewriter, a: dict[str, Any]) -> fx.Node:
            ids = r.call(aten.to.dtype, bind(self.sort)["self"], a["self"].meta["val"].dtype)
            return r.call(aten.histc.default, ids, a["bins"], a["min"], a["max"])

        self.made[node] = make
        return None

    def _product(self, node: fx.Node, a: dict[str, Any]) -> str:
        ends = uncast(a["ends"])
        _need(ends.target is aten.cumsum.default and a["weights"] not in self.kinds)
        experts = len(a["weights"].meta["val"])
        numbers = counted_numbers(bind(ends)["self"], experts)
        _need(numbers is not None and (self._is(numbers, "ids") or same_numbers(numbers, bind(self.sort)["self"])))
        self.counts.add(experts)
        self.made[node] = lambda r, a: r.call(expert_product, a["x"], a["weights"], self.experts)
        return "rows"

    def _of_experts(self, node: fx.Node, a: dict[str, Any]) -> str:
        """Each row's expert's row of a table, which has one for each expert."""
        index, table = _index(node, a), a["self"].meta["val"]
        _need(a.get("dim", 0) == 0 and node.meta["val"].shape == (self.rows, *table.shape[1:]))
        _need(self.bounds.get(index, len(table) - 1) == len(table) - 1)
        self.counts.add(len(table))
        self.made[node] = lambda r, a: r.call(expert_rows, a["self"], _index(node, a))
        return "rows"

    def _scattered(self, node: fx.Node, a: dict[str, Any]) -> str | None:
        """``x[order] = ...``: of numbers in their order it makes the inverse, of rows what was before the sort."""
        into, values = a["self"].meta["val"], a["values"]
        _need(not a["accumulate"] and len(into) == self.rows and isinstance(values, fx.Node))
        _need(a["self"] not in self.kinds or a["self"].target in LIKE)
        if values.target is aten.arange.default and values.meta["val"].shape == into.shape:
            return "inverse"
        _need(self._is(values, "rows", "ids") and values.meta["val"].shape == into.shape)
        self.left = True
        self.made[node] = lambda r, a: r.call(aten.to.dtype, r.call(put_back, a["values"], self.order), into.dtype)
        return None

    def _looked_up(self, node: fx.Node, a: dict[str, Any]) -> str | None:
        """Rows brought into the order, or out of it."""
        x, index = a["self"], _index(node, a)
        _need(a.get("dim", 0) == 0 and node.meta["val"].shape == (self.rows, *x.meta["val"].shape[1:]))
        if self._is(index, "inverse"):
            _need(self._is(x, "rows", "ids"))
            self.left = True
            self._put_back(node, a["self"])
            return None
        times = self.times.get(index, 1)
        if x is bind(self.sort)["self"] and self._is(index, "order"):
            return "ids"
        _need(x not in self.kinds and len(x.meta["val"]) * times == self.rows)
        self.made[node] = lambda r, a: r.call(take_rows, a["self"], self.order, times)
        return "rows"

    def _put_back(self, node: fx.Node, rows: fx.Node) -> None:
        """Rows leave the order; where all that is done to them next is to add up so many in a row, as one operator."""
        view = _only_user(node)
        total = _only_user(view) if view is not None and view.target in RESHAPES else None
        shape, times = list(rows.meta["val"].shape[1:]), 0
        if view is not None and total is not None and total.target is aten.sum.dim_IntList:
            a, before = bind(total), list(view.meta["val"].shape)
            alone = [d % len(before) for d in a["dim"]] == [1] and not a["keepdim"] and a["dtype"] is None
            times = before[1] if alone and before[2:] == shape and before[0] * before[1] == self.rows else 0
        if times and total is not None:
            self.made[total] = lambda r, a: r.call(combine, rows, self.order, times)
        else:
            self.made[node] = lambda r, a: r.call(put_back, a["self"], self.order)

    def _added(self, node: fx.Node, a: dict[str, Any]) -> str | None:
        """Rows that are added up where they came from."""
        into, source, times = a["self"], "src" if "src" in a else "source", self.times.get(a["index"], 1)
        shape = list(into.meta["val"].shape)
        _need(a["dim"] == 0 and a.get("alpha", 1) == 1 and into not in self.kinds and self._is(a[source], "rows"))
        _need(shape[0] * times == self.rows and a[source].meta["val"].shape == (self.rows, *shape[1:]))

        def make(r: Rewriter, a: dict[str, Any]) -> fx.Node:
            back = r.call(put_back, a[source], self.order) if times == 1 else r.call(combine, a[source], self.order, times)
            return r.call(aten.add.Tensor, a["self"], back)

        self.left, self.made[node] = True, make
        return None

    def _by_row(self, node: fx.Node, a: dict[str, Any]) -> str:
        """Whether the rule of an operator keeps rows apart, in the first dim, and takes no others beside them."""
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        mine = [n for n in operands if n in self.kinds]
        _need(bool(mine) and all(self._is(n, "rows", "ids") for n in mine) and a.get("dim") != 0)
        _need(not compat.is_random(node.target) and not compat.mutates(node.target))
        factors = Factors()
        rows = factors.new(self.rows)
        for n in operands:
            dims = factors.fresh(n.meta["val"].shape)
            describe_global(n, dims=factors.beside((rows, *dims[1:]) if n in mine else dims))
        spec = spec_for(node, factors)
        others = [f for n in operands if n not in mine for d in dims_of(n) for f in d]
        busy = {f for s in (*spec.replicated, *spec.sums, *spec.maxes, *spec.inner, *others) for f in s.leaves()}
        for n in operands:
            describe_global(n, dims=None)
        flat = leaves(rows)
        _need(bool(spec.outs) and not busy.intersection(flat) and all(d and leaves(d[0]) == flat for d in spec.outs))
        return "rows"

    # ---- what it becomes ----

    def rewrite(self, graph: fx.Graph) -> None:
        r = Rewriter(graph, self.sort)
        ids = bind(self.sort)["self"]
        self.order = r.call(order_of, ids, max(self.counts, default=1))
        self.experts = r.call(sort_experts, ids, self.order)
        for node in [self.order, self.experts, *self.kinds]:
            describe_global(node, by_expert=True)
        for node in self.kinds:
            if node is self.sort and is_tensor(node):
                node.replace_all_uses_with(self.order)
            elif node.target is operator.getitem and self._is(node.args[0], "sort"):
                node.replace_all_uses_with(self.order if self._is(node, "order") else self.experts)
            elif node.target in LOOKUPS and self._is(node, "ids"):
                node.replace_all_uses_with(self.experts)
        for node, make in self.made.items():
            r = Rewriter(graph, node)
            new = make(r, bind(node))
            describe_global(new, by_expert=self._is(node, "rows"))
            r.replace(new)


def _score_behind(graph: fx.Graph, node: fx.Node) -> None:
    """Have rows that are multiplied by a score each, and put back, be put back first: scores need not be where experts are."""
    args: Any = node.args
    product, order = args[:2]
    if product.target is not aten.mul.Tensor or len(product.users) > 1 or product.meta["val"].dim() != 2:
        return
    for rows, scale in (product.args, product.args[::-1]):
        if not isinstance(scale, fx.Node) or scale.target is not aten.unsqueeze.default or scale.args[1] not in (1, -1):
            continue
        taken = scale.args[0]
        if taken.target is take_rows and taken.args[1:] == (order, 1) and taken.meta["val"].dim() == 1:
            r = Rewriter(graph, node)
            times = args[2] if node.target is combine else 1
            r.replace(r.call(combine, rows, order, times, taken.args[0]))
            return


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _need(known: bool) -> None:
    if not known:
        raise _NotByRow


def _index(node: fx.Node, a: dict[str, Any]) -> Any:
    if node.target is not aten.index.Tensor:
        return a["index"]
    return a["indices"][0] if len(a["indices"]) == 1 else None
