"""Random arguments for products, lookups and attention."""

from __future__ import annotations

from typing import Any

import torch

from fxpar.ops.attention import windowed_attention
from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.pick import pick
from tests.harness import Gen
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


@case(aten.linear.default)
def linear(g: Gen):
    lead, i, o = g.shape(0, 3), g.n(), g.n()
    x = g.f(*lead, i)
    w = x if len(lead) == 1 and g.maybe(0.1) else g.f(o, i)
    return (x, w, g.f(w.shape[0])) if g.maybe() else (x, w)


@case(aten.addmm.default)
def addmm(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    bias = g.f(*g.pick([n], [m, n], [1, n], [m, 1], [1], []))
    scales = {} if g.maybe() else {"beta": g.pick(0.5, 2, 0), "alpha": g.pick(0.25, 3)}
    return (bias, g.f(m, k), g.f(k, n)), scales


@case(aten.baddbmm.default)
def baddbmm(g: Gen):
    b, m, k, n = g.n(), g.n(), g.n(), g.n()
    bias = g.f(*g.broadcast([b, m, n]))
    return (bias, g.f(b, m, k), g.f(b, k, n)), {} if g.maybe() else {"beta": 0.5, "alpha": 3}


@case(aten.mm.default)
def mm(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    if g.maybe(0.1):
        square = g.f(m, m)
        return square, square
    return g.f(m, k), g.f(k, n)


@case(aten.bmm.default)
def bmm(g: Gen):
    b, m, k, n = g.n(), g.n(), g.n(), g.n()
    return g.f(b, m, k), g.f(b, k, n)


@case(aten.mv.default)
def mv(g: Gen):
    m, k = g.n(), g.n()
    return g.f(m, k), g.f(k)


@case(aten.dot.default, aten.vdot.default)
def dot(g: Gen):
    n = g.n()
    x = g.f(n)
    return x, x if g.maybe(0.2) else g.f(n)


@case(aten.outer.default, aten.ger.default)
def outer(g: Gen):
    x = g.f(g.n())
    return x, x if g.maybe(0.2) else g.f(g.n())


@case(aten.matmul.default)
def matmul(g: Gen):
    m, k, n = g.n(), g.n(), g.n()
    lead = g.shape(0, 2)
    left = [k] if g.maybe(0.2) else [*g.broadcast(lead), m, k]
    right = [k] if g.maybe(0.2) else [*g.broadcast(lead), k, n]
    return g.f(*left), g.f(*right)


@case(aten.einsum.default)
def einsum(g: Gen):
    equation = g.pick(
        "bhqd,bhkd->bhqk",
        "ij,jk->ik",
        "bij,bjk->bik",
        "i,j->ij",
        "ij->ji",
        "ijk->j",
        "ij,ij->i",
        "bid,bjd,d->bij",
        "...ij,jk->...ik",
        "ii->i",
        "ab,bc",
        "iJ,Jk->ik",
        "ij,jk -> ik",
        "ab->",
        "i,i->",
    )
    sizes: dict[str, int] = {}
    tensors = []
    for term in equation.replace(" ", "").partition("->")[0].split(","):
        lead = [2, 3] if "..." in term else []
        letters = term.replace("...", "")
        dims = [sizes.setdefault(c, g.pick(1, 2, 3, 4, 6)) for c in letters]
        if len(set(letters)) == len(letters) and g.maybe(0.15):
            dims = [1 if g.maybe(0.3) else n for n in dims]
        tensors.append(g.f(*lead, *dims))
    return (equation, tensors), {}


@case(aten.embedding.default)
def embedding(g: Gen):
    rows, width = g.n(2), g.n()
    ids = g.i(rows, *g.shape(0, 3))
    if g.maybe(0.3):
        return g.f(rows, width), ids
    if g.maybe(0.2):
        return g.f(rows, width), ids, -1, True  # a gradient that depends on how often an id occurs
    return g.f(rows, width), ids, g.i(rows).item()


@case(pick)
def pick_one(g: Gen):
    lead, classes = g.shape(0, 2), g.n(2)
    index = g.i(classes, *lead)
    return g.f(*lead, classes), index


@case(aten.scaled_dot_product_attention.default)
def attention(g: Gen):
    b, j, d, e = g.pick(1, 2, 4), g.pick(1, 2, 4), g.pick(2, 4), g.pick(2, 4, 6)
    group = g.pick(1, 1, 2, 3)
    h, length = j * group, g.pick(1, 2, 4, 6)
    keys = length if g.maybe() else g.pick(2, 3, 4)
    rank = g.pick(4, 4, 4, 3, 5) if group == 1 else 4
    lead = {3: [h], 4: [b, h], 5: [2, b, h]}[rank]
    kv = {3: [h], 4: [b, j], 5: [2, b, h]}[rank]
    q, k, v = g.f(*lead, length, d), g.f(*kv, keys, d), g.f(*kv, keys, e)
    if group == 1 and e == d and g.maybe(0.1):
        v = k
    kwargs: dict[str, Any] = {"enable_gqa": True} if group > 1 else {}
    if g.maybe(0.3):
        kwargs["scale"] = 0.3
    how = g.pick("none", "causal", "bool", "float", "float")
    if how == "causal":
        return (q, k, v), {"is_causal": True, **kwargs}
    if how == "none":
        return (q, k, v), kwargs
    shape = g.broadcast([*lead, length, keys]) if g.maybe() else [length, keys]
    shape = shape if len(shape) >= 2 else [length, keys]
    mask = g.f(*shape)
    if how == "bool":
        mask = mask > -1
        mask[..., 0] = True
    return (q, k, v, mask), kwargs


@case(windowed_attention)
def windowed(g: Gen):
    b, j, group, length, d, e = (
        g.pick(1, 2, 4),
        g.pick(1, 2, 4),
        g.pick(1, 1, 2, 3),
        g.pick(2, 4, 6),
        4,
        g.pick(2, 4),
    )
    kwargs = {"window": g.pick(1, 2, 3), **({"enable_gqa": True} if group > 1 else {})}
    return (g.f(b, j * group, length, d), g.f(b, j, length, d), g.f(b, j, length, e)), kwargs


@case(dropout_attention)
def dropping(g: Gen):
    b, j, group, length, d, e = g.pick(1, 2, 4), g.pick(1, 2, 4), g.pick(1, 1, 2), g.pick(2, 4, 6), 4, g.pick(2, 4)
    keys = g.pick(length, length, 3)
    kwargs: dict[str, Any] = {"p": 0.4, "site": g.r.randint(0, 5), **({"enable_gqa": True} if group > 1 else {})}
    how = g.pick("none", "causal", "window", "bool", "added")
    if how in ("causal", "window"):
        kwargs.update({"is_causal": True} if how == "causal" else {"window": 2})
    elif how != "none":
        mask = g.f(*g.broadcast([b, j * group, length, keys]))
        kwargs["attn_mask"] = (mask > -1) if how == "bool" else mask.detach()
    seed = torch.tensor(g.r.randint(0, 2**40))
    return (g.f(b, j * group, length, d), g.f(b, j, keys, d), g.f(b, j, keys, e), seed), kwargs
