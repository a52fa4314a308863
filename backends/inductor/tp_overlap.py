"""tp_overlap: what tensor parallelism gathers and scatters travels while the products beside it are computed.

Under sequence parallelism activations are gathered before a product, and a product's results are summed and scattered. Both are
about rows, of which a product computes each by itself, so that parts of rows can be computed one after the other:

    product(gather(x), W)     the concatenation of the products of all ranks' parts: this rank's own first, which is there, then
                              each of the others' when it has arrived
    scatter(product(x, W))    the sum of all ranks' products of a part: first those of the others' parts, each of which travels
                              while the next one is computed, this rank's own last

A transfer that runs beside a product must not take the multiprocessors from it: copy engines do not, NCCL's kernels do
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.backends.inductor.buckets import leaves_graph
from fxpar.backends.inductor.casts import CAST, CAT, PERMUTE, erase_unused
from fxpar.backends.inductor.products import WRITTEN
from fxpar.backends.remat import UNSHARD, block_of
from fxpar.backends.transport.base import NCCL, Transport
from fxpar.ops.parts import AWAIT_PART, GATHER_PARTS, NEXT_PART, arrivals, shift_splits
from fxpar.ops.vocabulary import GATHER, RESHAPES, SCATTER, WAIT, is_view

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
LEFT: dict[Any, int] = {aten.mm.default: 0, aten.mm.dtype: 0, aten.addmm.default: 1}
"""Products of matrices, and which of their operands has the rows."""
ADD, CLONE, SLICE = aten.add.Tensor, aten.clone.default, aten.slice.Tensor
EXCHANGE = c10d.all_to_all_single.default
MOVED = (GATHER, WAIT, CAST, CAT, WRITTEN, CLONE)
"""Beside views, what a parameter goes through on its way to a product, and may go through earlier."""


def overlap_tensor_parallel(graph: fx.Graph, transport: Transport = NCCL) -> None:
    """Compute products in parts beside the gathers and scatters of activations, in place.

    Takes: a functional graph with its values in ``meta["val"]``, before its operators are put into their final order. Afterwards:
    of a gather along dim 0 over a group that the `transport` has a place in, each product that takes the gathered rows as its
    left operand (views, and operators on each element, may stand between) is one product for each rank's part, concatenated;
    those of one part stand together, behind its arrival; whatever else reads what was gathered reads it once all has arrived. Of
    a scatter along dim 0 whose operand is a product, or is made of products by such operators, each rank's part is computed by
    itself and sent to it, and what arrives is added up in the order of the ranks. Products of the same left operands that the
    scattered sum does not need (the gradients of weights) come before what waits for it. Gathers of parameters, sums that only
    leave the graph, products of other blocks and whatever has another order of rows stay as they are.
    """
    for node in list(graph.nodes):
        if node.target not in (GATHER, SCATTER) or node.args[-1] not in transport.places or not _is_waited_for(node):
            continue
        ring = _Ring(node.args[-2], transport.places[node.args[-1]], transport.part_group(node.args[-1]))
        if node.target is GATHER and UNSHARD not in node.meta.get("custom", {}):
            _split_gather(graph, node, ring)
        elif node.target is SCATTER and node.args[1] == "sum" and not leaves_graph(node):
            _split_scatter(graph, node, ring)
    graph.lint()


@dataclass(frozen=True)
class _Ring:
    """The ranks of a group, this one's number among them, and the name of the group by which parts go."""

    ranks: int
    rank: int
    group: str


def _is_waited_for(start: fx.Node) -> bool:
    return len(start.users) == 1 and next(iter(start.users)).target is WAIT


# ---- gathers ----


def _split_gather(graph: fx.Graph, gather: fx.Node, ring: _Ring) -> None:
    wait = next(iter(gather.users))
    dims = _rowwise_users(wait, ring.ranks)
    products = [n for n in dims if n.target in LEFT]
    if not products:
        return
    with _before(graph, wait) as here:
        products = [n for n in products if block_of(n) == block_of(products[0])
                    and all(_is_ready(o, here, wait) for o in _other_operands(n, dims, wait))]
        for operand in [o for n in products for o in _other_operands(n, dims, wait)]:
            _bring(operand, here)
        if products:
            whole = _products_of_parts(graph, gather, wait, ring, _Parts(graph, ring.ranks, dims), products)
            wait.replace_all_uses_with(whole, lambda n: n is not whole)
            erase_unused(graph, [*products, wait])


def _products_of_parts(graph: fx.Graph, gather: fx.Node, wait: fx.Node, ring: _Ring, parts: _Parts,
                       products: list[fx.Node]) -> fx.Node:
    """Start to gather where that was started, and compute the products here; the gathered value, all of which has arrived."""
    compat.lower_as_collective(GATHER_PARTS)
    compat.lower_as_wait(NEXT_PART, AWAIT_PART)
    compat.lower_as_concatenation(WRITTEN)
    value = wait.meta["val"]
    rows: dict[fx.Node, dict[int, fx.Node]] = {n: {} for n in products}
    with graph.inserting_before(gather):
        whole = _node(graph, gather, value, GATHER_PARTS, gather.args[0], ring.ranks, ring.group)
    for rank in (ring.rank, *arrivals(ring.rank, ring.ranks)):
        if rank != ring.rank:
            whole = _node(graph, wait, value, NEXT_PART, whole)
        parts.made[wait, rank] = parts.slice_of(whole, 0, rank)
        for product in products:
            rows[product][rank] = parts.of(product, rank, 0)
    for product in products:
        product.replace_all_uses_with(_call(graph, product, WRITTEN, [rows[product][r] for r in range(ring.ranks)], 0))
    return whole


def _rowwise_users(wait: fx.Node, ranks: int) -> dict[fx.Node, int]:
    """What is made of a value by operators that keep rows apart -> the dim along which it has the ranks' parts, in order, up to
    products, of which that is the left operand alone; itself included."""
    dims = {wait: 0}
    pending = sorted(wait.users)
    while pending:
        node = heapq.heappop(pending)
        dim = None if node in dims or node.op != "call_function" else _result_dim(node, dims, ranks)
        if dim is not None:
            dims[node] = dim
            if node.target not in LEFT:
                for user in node.users:
                    heapq.heappush(pending, user)
    return dims


def _computing_users(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, or a view of it, and is none."""
    for user in node.users:
        if user.op == "call_function" and _is_view(user):
            yield from _computing_users(user)
        else:
            yield user


def _other_operands(product: fx.Node, dims: dict[fx.Node, int], wait: fx.Node) -> list[fx.Node]:
    """What a product is made of besides rows of what was gathered."""
    found: dict[fx.Node, None] = {}
    stack = [product]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand in dims:
                stack += [operand] if operand is not wait else []
            else:
                found[operand] = None
    return list(found)


# ---- scatters ----


def _split_scatter(graph: fx.Graph, scatter: fx.Node, ring: _Ring) -> None:
    wait, root = next(iter(scatter.users)), scatter.all_input_nodes[0]
    cone = _summed(root, ring.ranks)
    products = [n for n in cone if n.target in LEFT]
    if not products:
        return
    leaves = list(dict.fromkeys(o for n in cone for o in n.all_input_nodes if o not in cone))
    computed = [n for n in leaves if not _is_of_inputs(n)]
    parts, summands = _Parts(graph, ring.ranks, cone), {}
    with _before(graph, _next(max(computed, default=next(iter(graph.nodes))))) as here:
        for leaf in leaves:
            _bring(leaf, here)
        for distance, peer in enumerate(arrivals(ring.rank, ring.ranks), 1):
            part = parts.of(root, peer, 0)
            value = part.meta["val"]
            splits = shift_splits(ring.rank, ring.ranks, -distance, value.shape[0])
            summands[(ring.rank - distance) % ring.ranks] = _node(graph, scatter, value, EXCHANGE, part, *splits, ring.group)
        summands[ring.rank] = parts.of(root, ring.rank, 0)
        for gradient in _gradients_behind(products, cone, scatter, here):
            _bring(gradient, here)
    with graph.inserting_before(wait):
        arrived = [n if rank == ring.rank else _node(graph, wait, n.meta["val"], WAIT, n) for rank, n in sorted(summands.items())]
        total = functools.reduce(lambda a, b: _call(graph, wait, ADD, a, b), arrived)
    wait.replace_all_uses_with(total)
    erase_unused(graph, [wait])


def _summed(root: fx.Node, ranks: int) -> dict[fx.Node, int]:
    """Of what an operand of a scatter is made by operators that keep rows apart, products among them, that nothing else reads ->
    the dim along which it has the ranks' parts."""
    cone: dict[fx.Node, int] = {}
    pending = [(root, 0)]
    while pending:
        node, dim = pending.pop()
        if cone.setdefault(node, dim) != dim:
            return {}
        dims = _operand_dims(node, dim, ranks) if len(node.users) == 1 else None
        if dims is None:
            del cone[node]
        elif node.target not in LEFT:
            pending += dims.items()
    return cone


def _gradients_behind(products: Sequence[fx.Node], cone: dict[fx.Node, int], scatter: fx.Node, here: fx.Node) -> list[fx.Node]:
    """Other products of the left operands of `products`, which stand behind the scatter and need not."""
    lefts = [p.args[LEFT[p.target]] for p in products]
    users = dict.fromkeys(u for left in lefts if isinstance(left, fx.Node) for u in _computing_users(left))
    return [u for u in users if u.target in LEFT and u not in cone and scatter < u
            and all(_is_ready(o, here, scatter) for o in u.all_input_nodes)]


# ---- rows of an operator ----


def _result_dim(node: fx.Node, dims: dict[fx.Node, int], ranks: int) -> int | None:
    """The dim along which a result has the ranks' parts, if rows are kept apart; `dims`: of operands that have them."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    for dim in range(node.meta["val"].dim()):
        wanted = _operand_dims(node, dim, ranks)
        if wanted is not None and all(wanted.get(n) == dims[n] for n in node.all_input_nodes if n in dims):
            return dim
    return None


def _operand_dims(node: fx.Node, dim: int, ranks: int) -> dict[fx.Node, int] | None:
    """Along which dim each operand has to be cut for a part of the result along `dim`; operands that are not there are read
    whole. None if parts are not made of parts."""
    value, target = node.meta.get("val"), node.target
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in value.shape) or value.shape[dim] % ranks:
        return None
    if target in LEFT:
        return _of_product(node) if dim == 0 else None
    if target is PERMUTE:
        return {node.all_input_nodes[0]: node.args[1][dim]}  # type: ignore[index,dict-item]
    if target in RESHAPES:
        return _of_reshape(node, dim, ranks)
    if not (compat.is_pointwise(target) or target in (CAST, CLONE)) or compat.is_random(target) or compat.mutates(target):
        return None
    found = {}
    for operand in node.all_input_nodes:
        shape = operand.meta["val"].shape
        there = dim - (value.dim() - len(shape))
        if there >= 0 and shape[there] != 1:
            found[operand] = there
    return found


def _of_product(node: fx.Node) -> dict[fx.Node, int] | None:
    left: Any = node.args[LEFT[node.target]]
    if sum(n is left for n in _flat(node.args)) > 1:
        return None  # rows of one operand are the columns of the other
    bias: Any = node.args[0]
    sliced = bias is not left and bias.meta["val"].dim() == 2 and bias.meta["val"].shape[0] != 1
    return {left: 0, bias: 0} if sliced else {left: 0}


def _of_reshape(node: fx.Node, dim: int, ranks: int) -> dict[fx.Node, int] | None:
    """The dim that begins where `dim` does: what lies before it is the same, so that a part of the elements is the same part."""
    operand = node.all_input_nodes[0]
    new, old = node.meta["val"].shape, operand.meta["val"].shape
    before = math.prod(new[:dim])
    for there, size in enumerate(old):
        if math.prod(old[:there]) == before and size % ranks == 0:
            return {operand: there}
    return None


def _flat(args: Sequence[Any]) -> list[fx.Node]:
    return [a for a in args if isinstance(a, fx.Node)]


@dataclass
class _Parts:
    """Parts of values, made once.

    dims: the operators that are computed in parts -> the dim along which they are cut; the values that they take are sliced.
    made: (value, rank) -> that rank's part.
    """

    graph: fx.Graph
    ranks: int
    dims: dict[fx.Node, int]
    made: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node, rank: int, dim: int) -> fx.Node:
        if (node, rank) not in self.made:
            self.made[node, rank] = self._computed(node, rank) if node in self.dims else self.slice_of(node, dim, rank)
        return self.made[node, rank]

    def slice_of(self, node: fx.Node, dim: int, rank: int) -> fx.Node:
        size = node.meta["val"].shape[dim] // self.ranks
        return _call(self.graph, node, SLICE, node, dim, rank * size, (rank + 1) * size)

    def _computed(self, node: fx.Node, rank: int) -> fx.Node:
        dim = self.dims[node]
        cut = _operand_dims(node, dim, self.ranks)
        assert cut is not None
        args: Any = fx.map_arg(node.args, lambda n: self.of(n, rank, cut[n]) if n in cut else n)
        if node.target in RESHAPES:
            shape = list(node.meta["val"].shape)
            shape[dim] //= self.ranks
            args = (args[0], shape)
        if node.target not in LEFT:
            return _call(self.graph, node, node.target, *args, **node.kwargs)
        value = node.meta["val"]
        value = value.new_empty(value.shape[0] // self.ranks, *value.shape[1:])
        return _node(self.graph, node, value, node.target, *args, **node.kwargs)


# ---- where operators stand ----


def _is_view(node: fx.Node) -> bool:
    return node.target in RESHAPES or is_view(node)


def _is_of_inputs(node: fx.Node) -> bool:
    """Whether a value is made of inputs of the graph by nothing but what parameters go through."""
    stack = [node]
    while stack:
        top = stack.pop()
        if top.op == "placeholder":
            continue
        if not (_is_view(top) or top.target in MOVED):
            return False
        stack += top.all_input_nodes
    return True


def _is_ready(node: fx.Node, here: fx.Node, wait: fx.Node) -> bool:
    """Whether a value that does not depend on `wait` is there before `here`, or can be."""
    stack, seen = [node], {node}
    while stack:
        top = stack.pop()
        if top is wait:
            return False
        if top.op == "placeholder" or (top < wait and top < here):
            continue
        if not top < here and not (_is_view(top) or top.target in MOVED):
            return False
        stack += set(top.all_input_nodes) - seen
        seen |= set(top.all_input_nodes)
    return True


@contextlib.contextmanager
def _before(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    """Inside, operators are inserted before `node`; before what this gives, others can be moved."""
    with graph.inserting_before(node):
        here = graph.call_function(operator.pos, (0,))
    with graph.inserting_before(here):
        yield here
    graph.erase_node(here)


def _bring(node: fx.Node, here: fx.Node) -> None:
    """Move a value, and what it is made of, to `here`, as far as it is not there before."""
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [n for n in top.all_input_nodes if not n < here]
        if missing and not top < here:
            stack += missing
            continue
        stack.pop()
        if not top < here:
            here.prepend(top)


def _next(node: fx.Node) -> fx.Node:
    """The node after `node` that is no placeholder."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """An operator in the place of `like`, that runs anywhere."""
    given, more = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    return _node(graph, like, target(*given, **more), target, *args, **kwargs)


def _node(graph: fx.Graph, like: fx.Node, value: torch.Tensor, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """An operator in the place of `like`: made by the same line of the same module; its result is like `value`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {**like.meta, "val": value}
    return node
