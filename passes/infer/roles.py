"""Roles: what each factor is to the model, read off where it occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpar.errors import PlanError
from fxpar.ops.experts import expert_product
from fxpar.ops.pick import pick
from fxpar.ops.vocabulary import ATTENTION
from fxpar.passes.infer.rules.attention import sight_of
from fxpar.passes.infer.rules.matmul import grouped_product
from fxpar.passes.infer.rules.registry import find
from fxpar.program import Program
from fxpar.sharding.factors import Factor, leaves
from fxpar.sharding.facts import describe_global, dims_of, global_value

aten = torch.ops.aten
ROLES = ("batch", "seq", "keys", "heads", "head_dim", "ffn", "vocab", "experts", "hidden")
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
SCORES = (*SOFTMAX, aten.sigmoid.default)


def assign_roles(program: Program) -> None:
    """Set `Factor.role` on every factor that has one.

    batch: dim 0 of the inputs (or the batch of attention, where dim 0 turns out to be its sequence; or what the plan
    says). seq: the query and key dims of attention, also where it is written out; there, columns of scores that have a name of
    their own are keys, which no plan splits. heads: the head dims of
    attention, or batch dims of a product of two activations that come from a weight. head_dim: the last dims of what
    attention takes, beside heads or where they would be ffn; no plan splits them. vocab: the rows of a table
    looked up by an input and taller than wide, the classes of the loss. experts: the groups of a grouped product, or dims of
    weights in products that are the last dim of a router's scores, too. ffn:
    made by one weight and contracted by another, and by nothing else. hidden: what remains of the weights' dims that
    other weights contract. The first that applies stays. Raises `PlanError` if an override names no such dim.
    """
    params = [n for n, s in program.source_of().items() if s.kind == "param"]
    in_params = {f for n in params for d in dims_of(n) for f in leaves(d)}
    _overrides(program)
    one_head = _attention(program, in_params)
    _batch(program)
    _vocab(program)
    _experts(program)
    _weights(program, in_params, one_head)


def _give(dim, role: str) -> None:
    for f in leaves(dim):
        if f.role is None:
            f.role = role


def _overrides(program: Program) -> None:
    sources = {s.name: n for n, s in program.source_of().items() if s.kind in ("param", "input")}
    for key, role in dict(program.plan.roles or ()).items():
        name, _, index = key.rstrip("]").partition("[")
        node = sources.get(name)
        if node is None or not index.isdigit() or int(index) >= len(global_value(node).dims or ()):
            known = ", ".join(list(sources)[:6])
            raise PlanError("roles", key, 'must name a dim of a parameter or input, as "name[dim]"', f"one of {known}")
        for f in leaves(dims_of(node)[int(index)]):
            f.role = role or "none"


def _attention(program: Program, in_params: set[Factor]) -> set[Factor]:
    """seq, heads and head_dim; returns the last dims of operands that have no heads. (These may be the residual stream's.)"""
    scores: dict[tuple[Factor, Factor], _Product] = {}
    products: dict[fx.Node, _Product] = {}
    one_head: set[Factor] = set()
    for node in program.graph.nodes:
        if node.target in ATTENTION:
            q, k, v = (dims_of(n) for n in node.args[:3])
            _give(q[-2], "seq")
            _give(k[-2], "seq")
            if (sight := sight_of(node)) is not None and sight.causal:
                for f in set(leaves(q[-2])) & set(leaves(k[-2])):
                    f.causal = True
            if len(q) == 4:
                _give([f for f in leaves(q[1]) if f in in_params or f.role], "heads")
                _give([f for f in leaves(k[1]) if f in in_params], "heads")
            for dims in (q, k, v):
                _head_dim(dims[-1], q[:-2], one_head)
        elif node.target in SOFTMAX and len(dims_of(node)) >= 3:
            rows, columns = (leaves(d) for d in dims_of(node)[-2:])
            made_by = next((scores[r, c] for r in rows for c in columns if (r, c) in scores), None) or _among(node, products)
            if made_by is not None:
                _give(rows, "seq")
                _give(made_by.columns, "seq")
                _give(columns, "keys")
        elif node.target in PRODUCTS:
            product = _product(node)
            if product is not None:
                _give([f for f in product.batch if f in in_params], "heads")
                scores.update({(r, c): product for r in product.made[0] for c in product.made[1]})
                products[node] = product
    for product in products.values():
        if _is_seq(product.inner):  # probabilities and values
            _head_dim(product.columns, [product.batch], one_head)
        elif _is_seq(product.made[0]) and _is_seq(product.made[1]):  # queries and keys
            _head_dim(product.inner, [product.batch], one_head)
    return one_head


@dataclass
class _Product:
    """Of two activations, [batch, rows, inner] and [batch, inner, columns]: factors. made: the result's rows and columns (in
    which keys that are the queries, too, have got another name)."""

    batch: list[Factor]
    inner: list[Factor]
    columns: list[Factor]
    made: tuple[list[Factor], list[Factor]]


def _among(softmax: fx.Node, products: dict[fx.Node, _Product]) -> _Product | None:
    """The product whose result is among the columns of a softmax, beside others (attention sinks)."""
    rows, pending, seen = leaves(dims_of(softmax)[-2]), list(softmax.all_input_nodes), set()
    while pending:
        node = pending.pop()
        known = global_value(node)
        if node in seen or known.dims is None or len(known.dims) < 2 or not set(rows) <= set(leaves(known.dims[-2])):
            continue
        if node in products:
            return products[node]
        seen.add(node)
        if known.spec is not None and not known.spec.sums:
            pending += node.all_input_nodes
    return None


def _product(node: fx.Node) -> _Product | None:
    args: Any = node.args
    if node.target is aten.einsum.default:
        left, _, right = args[0].replace(" ", "").partition("->")
        (one, _, other), nodes = left.partition(","), args[1]
        if "." in left or "," in other or not right or not other:
            return None
    else:
        nodes = args[1:3] if node.target is aten.baddbmm.default else args[:2]
        a, b = (len(dims_of(n)) for n in nodes)
        if a < 3 or b < 3:
            return None
        lead = "abcdefgh"[: max(a, b) - 2]
        one, other, right = (lead[len(lead) - r + 2 :] + end for r, end in ((a, "mk"), (b, "kn"), (max(a, b), "mn")))
    if not all(global_value(n).needs_grad and not _is_weight(n) for n in nodes):
        return None
    first, second, made = ({c: leaves(d) for c, d in zip(text, dims_of(n), strict=True)}
                           for text, n in ((one, nodes[0]), (other, nodes[1]), (right, node)))

    def of(dims: dict[str, list[Factor]], letters: set[str]) -> list[Factor]:
        return [f for c, d in dims.items() if c in letters for f in d]

    both = set(one) & set(other)
    batch = of(first, both & set(right))
    batch = [f for f in batch if f in of(second, both & set(right))]
    rows, columns = (of(made, set(text) - both) for text in (one, other))
    return _Product(batch, of(first, both - set(right)), of(second, set(other) - both), (rows, columns))


def _is_seq(dim: Iterable[Factor]) -> bool:
    return any(f.role in ("seq", "keys") for f in leaves(dim))


def _head_dim(dim: Iterable[Factor], lead: Iterable[Iterable[Factor]], one_head: set[Factor]) -> None:
    if any(f.role == "heads" for d in lead for f in leaves(d)):
        _give(dim, "head_dim")
    else:
        one_head.update(leaves(dim))


def batch_dim_error(name: str, dim: int, dims: int) -> PlanError:
    """Of an input that has no such dim."""
    return PlanError("batch_dims", {name: dim}, f"must be a dim of input {name!r}, which has {dims}, counted from 0",
                     f'batch_dims={{"{name}": 0}}' if dims else f'batch_dims={{"{name}": None}}')


def _batch(program: Program) -> None:
    inputs = [(n, s) for n, s in program.source_of().items() if s.kind == "input" and global_value(n).dims]
    asked = dict(program.plan.batch_dims or ())
    unknown = set(asked) - {s.name for _, s in inputs}
    if unknown:
        raise PlanError(
            "batch_dims", sorted(unknown)[0], "must name an input", f"one of {', '.join(s.name for _, s in inputs)}"
        )
    first: int | None = None
    for node, source in inputs:
        dims = dims_of(node)
        if source.name in asked:
            at = asked[source.name]
            if at is not None and at >= len(dims):
                raise batch_dim_error(source.name, at, len(dims))
        else:
            at = next((i for i, d in enumerate(dims) if any(f.role == "batch" for f in leaves(d))), None)
            if at is None:
                at = _batch_dim(node, first)
        if at is None:
            continue
        size = node.meta["val"].shape[at]
        first = int(size) if first is None else first
        describe_global(node, batch_dim=at)
        for f in leaves(dims[at]):
            f.role = "batch"


def _batch_dim(node: fx.Node, first: int | None) -> int | None:
    """Dim 0, unless attention showed it to be a sequence: then the first dim that is not. Other inputs follow in size."""
    dims, shape = dims_of(node), node.meta["val"].shape
    for i, dim in enumerate(dims):
        flat = leaves(dim)
        if any(f.role == "seq" for f in flat):
            continue
        if not flat or (first is not None and int(shape[i]) != first) or any(f.role for f in flat):
            return None
        return i
    return None


def _vocab(program: Program) -> None:
    sources = program.source_of()
    from_inputs: set[fx.Node] = set()
    for node in program.graph.nodes:
        if (node in sources and sources[node].kind == "input") or any(n in from_inputs for n in node.all_input_nodes):
            from_inputs.add(node)
        if node.target is aten.embedding.default:
            table, ids = node.args[:2]
            rows, columns = table.meta["val"].shape
            if ids in from_inputs and rows > columns:
                _give(dims_of(table)[0], "vocab")
        elif node.target is pick:
            _give(dims_of(node.args[0])[-1], "vocab")


def _experts(program: Program) -> None:
    scored: set[Factor] = set()
    for node in program.graph.nodes:
        spec = global_value(node).spec
        if spec is None:
            continue
        if node.target is expert_product or find(node.target) is grouped_product:
            _give(dims_of(node.args[1])[0], "experts")
        elif node.target in SCORES and global_value(node).needs_grad and dims_of(node):
            scored.update(leaves(dims_of(node)[-1]))
    for node in program.graph.nodes:
        spec = global_value(node).spec
        if spec is not None and spec.sums and node.target in (*PRODUCTS, aten.linear.default):
            for operand in spec.operands:
                if len(operand.dims) > 2 and _is_weight(operand.node):
                    _give([f for d in operand.dims for f in leaves(d) if f in scored], "experts")


def _weights(program: Program, in_params: set[Factor], one_head: set[Factor]) -> None:
    """ffn (of `one_head`: head_dim) and hidden, from how weights make and contract factors."""
    made: Counter[Factor] = Counter()
    contracted: Counter[Factor] = Counter()
    reduced: set[Factor] = set()
    for node in program.graph.nodes:
        spec = global_value(node).spec
        if spec is None or not global_value(node).needs_grad:
            continue
        sums = {f for s in spec.sums for f in s.leaves()}
        weights = [o for o in spec.operands if not o.deferred and _is_weight(o.node)] if sums else []
        activations = [o for o in spec.operands if not o.deferred and not _is_weight(o.node)] if sums else []
        if node.target is aten.embedding.default:
            continue  # a lookup contracts its rows in name only, and what it makes is the residual stream
        if weights and activations:
            flat = [f for d in weights[0].dims for f in leaves(d)]
            contracted.update(f for f in flat if f in sums)
            made.update(f for f in flat if f not in sums)
        else:
            reduced |= sums
        reduced |= {f for s in (*spec.replicated, *spec.inner, *spec.maxes) for f in s.leaves()}
    for f in in_params:
        if f.role is None and made[f] and contracted[f] and f not in reduced:
            f.role = "head_dim" if f in one_head else "ffn"
    for f in in_params:
        if f.role is None and contracted[f]:
            f.role = "hidden"


def _is_weight(node: fx.Node) -> bool:
    """A parameter, possibly cast or rearranged."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and global_value(node).is_param
