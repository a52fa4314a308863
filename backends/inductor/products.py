"""products: matrix products whose results are added become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.inductor.casts import CAST, CAT, PERMUTE, erase_unused
from fxpar.backends.transport.base import BUCKET_BYTES, NCCL, Transport
from fxpar.ops.vocabulary import ALL_REDUCE, GATHER, RESHAPES, WAIT, bytes_of, is_view

aten = torch.ops.aten
MM, ADD, SLICE = aten.mm.default, aten.add.Tensor, aten.slice.Tensor


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(tensors), dim)


_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("cat(Tensor[] tensors, int dim) -> Tensor")
_library.impl("cat", _cat, "CompositeExplicitAutograd")
WRITTEN = torch.ops.fxpar.cat.default
"""`cat` whose operands are computed where they belong. (Of aten's, Inductor may make one kernel, which works out for each element
what all of them would be there.)"""


@torch.library.register_fake("fxpar::cat", lib=_library)
def _fake(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return _cat(tensors, dim)


def join_products(graph: fx.Graph, transport: Transport = NCCL) -> None:
    """Join products of matrices that are added, and the products that take the same left operands transposed, in place.

    Takes: a functional graph with its values in ``meta["val"]``. Afterwards: products [M, K_i] @ [K_i, N] in one sum, rearranged
    alike, are one product of concatenations, [M, sum K_i] @ [sum K_i, N]; other terms are added to it in their old order. In a
    backward pass this is the gradient of what several projections (queries, keys, values) take. Where each left operand has
    one other use, a product [K_i, M] @ x with the same x (the gradients of the projections' weights), those are rows of one
    product too: then only the concatenation uses the left operands, and what is computed is written straight into it. Casts
    and all-reduces of these gradients are joined with them: Inductor copies slices of one tensor before it reduces them.
    Done where it moves no more bytes: each further summand is no longer written and read; left operands that are not written
    in place are copied, and so are right operands, but for parameters that are gathered over a group for which the `transport`
    copies and fit in a bucket. What uses a weight's gradient may be moved, to after the last of the left operands.
    """
    for root in [n for n in graph.nodes if _is_sum(n) and not _is_inner(n)]:
        _join_sum(graph, root, transport)
    graph.lint()


# ---- what is joined ----


def _join_sum(graph: fx.Graph, root: fx.Node, transport: Transport) -> None:
    terms = _terms(root)
    alike: dict[Any, list[fx.Node]] = {}
    for term in terms:
        product, views = _behind_views(term)
        if product.target is MM and not any(len(n.users) > 1 for n in (term, product)) and terms.count(term) == 1:
            rearranged = tuple((n.target is PERMUTE, *n.args[1]) for n in views)  # type: ignore[misc]
            alike.setdefault((product.meta["val"].shape, rearranged), []).append(term)
    parts = []
    for group in alike.values():
        products = [_behind_views(term)[0] for term in group]
        gradients = _weight_gradients(products)
        if len(group) > 1 and _moves_no_more(products, bool(gradients), transport):
            part = _join_products(graph, products, gradients)
            with graph.inserting_before(root):
                for view in _behind_views(group[0])[1]:
                    part = _call(graph, view, view.target, part, *view.args[1:])
            parts.append(part)
            terms = [t for t in terms if t not in group]
    if parts:
        total = parts[0]
        with graph.inserting_before(root):
            for term in [*parts[1:], *terms]:
                total = _call(graph, root, ADD, total, term)
        root.replace_all_uses_with(total)
        erase_unused(graph, [root])


def _is_sum(node: fx.Node) -> bool:
    if node.target is not ADD or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    known = all(isinstance(v, torch.Tensor) and all(isinstance(n, int) for n in v.shape) for v in values)
    return known and len({(v.dtype, v.shape) for v in values}) == 1


def _is_inner(node: fx.Node) -> bool:
    """Whether a sum is nothing but a term of another."""
    return len(node.users) == 1 and _is_sum(next(iter(node.users)))


def _terms(root: fx.Node) -> list[fx.Node]:
    terms, stack = [], [root]
    while stack:
        node = stack.pop()
        if node is root or (_is_sum(node) and _is_inner(node)):
            stack += reversed(node.args)  # type: ignore[arg-type]
        else:
            terms.append(node)
    return terms


def _behind_views(term: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a term is, behind views of what has no other use; and those views, the first one first."""
    views: list[fx.Node] = []
    while term.target in (*RESHAPES, PERMUTE) and len(term.all_input_nodes[0].users) == 1:
        views.insert(0, term)
        term = term.all_input_nodes[0]
    return term, views


def _weight_gradients(products: list[fx.Node]) -> list[fx.Node]:
    """For each product its left operand's only other use, which is a product of its transpose; empty if they cannot be joined."""
    found: list[fx.Node] = []
    for product in products:
        others = [u for u in product.all_input_nodes[0].users if u is not product]
        if len(others) != 1 or others[0].target is not PERMUTE or others[0].args[1] != [1, 0] or len(others[0].users) != 1:
            return []
        found += others[0].users
        if found[-1].target not in (MM, aten.mm.dtype) or found[-1].args[0] is not others[0]:
            return []
        if found[-1].args[1:] != found[0].args[1:] or found[-1].target is not found[0].target:
            return []
    late = _users_until(found, max(_operands(products, found)))
    return [] if any(n in late for n in _operands(products, found)) else found


def _operands(products: list[fx.Node], gradients: list[fx.Node]) -> list[fx.Node]:
    """What the joined product of weights' gradients will need."""
    return [*(p.all_input_nodes[0] for p in products), gradients[0].args[1]]  # type: ignore[list-item]


def _users_until(nodes: Iterable[fx.Node], last: fx.Node) -> list[fx.Node]:
    """Users of `nodes`, users of those, and so on, up to `last`; in order."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        users = {u for u in stack.pop().users if not last < u} - found
        found |= users
        stack += users
    return sorted(found)


# ---- whether it gains ----


def _moves_no_more(products: list[fx.Node], in_place: bool, transport: Transport) -> bool:
    """in_place: whether a left operand that is computed is written straight into the concatenation."""
    lefts, rights = zip(*(p.args for p in products), strict=True)
    copied = [n for n in lefts if not (in_place and _is_computed(n))]
    if not all(_is_gathered(n, transport) for n in rights) or sum(map(bytes_of, rights)) > BUCKET_BYTES:
        copied += rights
    return (len(products) - 1) * bytes_of(products[0]) >= sum(map(bytes_of, copied))


def _is_gathered(right: fx.Node, transport: Transport) -> bool:
    """Whether it is gathered for this use alone by what can gather several into one."""
    while len(right.users) == 1 and right.target in (PERMUTE, WAIT):
        right = right.all_input_nodes[0]
    return len(right.users) == 1 and right.target is GATHER and transport.copies(str(right.args[-1]))


def _is_computed(node: fx.Node) -> bool:
    """Whether it is a value of its own that Inductor generates code for, and can write anywhere."""
    while _is_view(node):
        node = node.all_input_nodes[0]
        if len(node.users) > 1:
            return False
    return _is_elementwise(node)


def _is_view(node: fx.Node) -> bool:
    return node.target in RESHAPES or is_view(node)


def _is_elementwise(node: fx.Node) -> bool:
    return compat.is_pointwise(node.target) or node.target in (CAST, aten.clone.default)


# ---- the joined operators ----


def _join_products(graph: fx.Graph, products: list[fx.Node], gradients: list[fx.Node]) -> fx.Node:
    """The joined product, where the last one stood; `gradients` are replaced as soon as all that they need is there."""
    compat.lower_as_concatenation(WRITTEN)
    lefts, rights = (list(operands) for operands in zip(*(p.args for p in products), strict=True))
    last = max(products)
    with graph.inserting_before(_next(max(lefts)) if gradients else last):
        left = _call(graph, last, WRITTEN if gradients else CAT, lefts, 1)
    with graph.inserting_before(last):
        joined = _product(graph, last, left, _call(graph, last, CAT, rights, 0))
    if gradients:
        _join_gradients(graph, left, gradients)
    return joined


def _join_gradients(graph: fx.Graph, left: fx.Node, gradients: list[fx.Node]) -> None:
    first = gradients[0]
    last = max(left, first.all_input_nodes[1])
    at, start = _next(last), 0
    with graph.inserting_before(at):
        joined = _product(graph, first, _call(graph, first, PERMUTE, left, [1, 0]), *first.args[1:])
        while users := _same_to_each_row(gradients):
            joined, gradients = _call(graph, users[0], users[0].target, joined, *users[0].args[1:]), users
        rows = []
        for gradient in gradients:
            end = start + gradient.meta["val"].shape[0]
            rows.append(_call(graph, gradient, SLICE, joined, 0, start, end))
            gradient.replace_all_uses_with(rows[-1])
            start = end
    for node in _users_until(rows, last):
        at.prepend(node)
    erase_unused(graph, gradients)


def _same_to_each_row(nodes: list[fx.Node]) -> list[fx.Node]:
    """The only users of `nodes`, if they are one operator that does the same to each row; else nothing."""
    users = [next(iter(n.users)) for n in nodes if len(n.users) == 1]
    if len(users) < len(nodes) or any(u.target is not users[0].target or u.args[1:] != users[0].args[1:] for u in users):
        return []
    same = users[0].target in (ALL_REDUCE, WAIT, CAST) or (users[0].target is PERMUTE and users[0].args[1] == [0, 1])
    return users if same else []


def _next(node: fx.Node) -> fx.Node:
    """The node after `node` that is no placeholder."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _product(graph: fx.Graph, like: fx.Node, left: fx.Node, *args: Any) -> fx.Node:
    """A matrix product of the same kind as `like`, whose shapes may have no implementation where the graph is looked at."""
    node = graph.call_function(like.target, (left, *args))  # type: ignore[arg-type]
    shape = (left.meta["val"].shape[0], args[0].meta["val"].shape[1])
    node.meta = {**like.meta, "val": like.meta["val"].new_empty(shape)}
    return node


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """An operator in the place of `like`: made by the same line of the same module."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda n: n.meta["val"]))}
    return node
