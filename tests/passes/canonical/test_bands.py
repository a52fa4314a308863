"""The algebra of bands, and the verdicts on masks, against computing the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxpar.passes.canonical import bands, constants
from fxpar.passes.canonical.bands import Band, MaskValue, Plain
from fxpar.passes.canonical.masks import verdict


def dense(value: MaskValue) -> Tensor:
    if isinstance(value, Plain):
        return value.full
    m, n = value.shape[-2:]
    at = torch.arange(n)[None, :] - torch.arange(m)[:, None] + m - 1
    return value.data[at].expand(value.shape)


def evaluated(make: Callable[[], Tensor], limit: int) -> list[tuple[MaskValue | None, Tensor]]:
    """Each node of the graph of `make`: what `evaluate` says, and what it is."""
    graph = make_fx(make, tracing_mode="fake")().graph
    values: dict[fx.Node, MaskValue | None] = {}
    whole: dict[fx.Node, Tensor] = {}
    original, bands.LIMIT = bands.LIMIT, limit
    try:
        for n in graph.nodes:
            if n.op == "call_function":
                values[n] = constants.evaluate(n, values)
                args, kwargs = fx.map_arg((n.args, n.kwargs), whole.__getitem__)
                whole[n] = n.target(*args, **kwargs)
    finally:
        bands.LIMIT = original
    return [(values[n], whole[n]) for n in whole]


def build(data, m: int, n: int, depth: int) -> Tensor:
    """A random boolean m x n matrix made of ranges."""
    leaves = ["compare", "triangle", "uniform"]
    others = ["and", "or", "not", "xor", "where", "slice", "flip", "float", "expand"] if depth else []
    kind = data.draw(st.sampled_from(leaves + others))
    shift, step = data.draw(st.integers(-4, 4)), data.draw(st.sampled_from([1, 1, 1, -1, 2]))
    if kind == "compare":
        compare = data.draw(st.sampled_from([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]))
        q, k = torch.arange(m)[:, None] * step + shift, torch.arange(n)[None] * step
        return compare(k, q) if data.draw(st.booleans()) else compare(q - k, shift)
    if kind == "uniform":
        return torch.full((m, n), data.draw(st.booleans()))
    if kind == "triangle":
        whole = torch.ones(m, n, dtype=torch.bool)
        return whole.tril(shift) if data.draw(st.booleans()) else whole.triu(shift)
    if kind == "slice":
        i, j = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        return build(data, m + 3, n + 3, depth - 1)[i : i + m, j : j + n]
    if kind == "flip":
        return build(data, n, m, depth - 1).transpose(0, 1)
    if kind == "expand":
        return build(data, m, n, depth - 1)[None, None].expand(2, 1, m, n)[0].reshape(m, n)
    first = build(data, m, n, depth - 1)
    if kind == "not":
        return ~first
    if kind == "float":
        return (first.float() * 2 - 1) > 0
    second = build(data, m, n, depth - 1)
    if kind == "where":
        return torch.where(first, second, False)
    return {"and": first & second, "or": first | second, "xor": first ^ second}[kind]


@settings(deadline=None, max_examples=80)
@given(data=st.data(), m=st.integers(2, 9), n=st.integers(2, 9), depth=st.integers(0, 3))
def test_bands_equal_the_whole(data, m, n, depth):
    steps = evaluated(lambda: build(data, m, n, depth), limit=m + n + 30)
    for value, whole in steps:
        if value is not None:
            assert value.data.dtype == whole.dtype and value.shape == tuple(whole.shape)
            assert torch.equal(dense(value), whole)
            assert not isinstance(value, Band) or min(value.shape[-2:]) > 1
    value, whole = steps[-1]
    assert value is not None  # ranges, compared: always a band


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(2, 7))
def test_ranges_that_are_none(data, size):
    """Columns and rows of any integers: never a wrong band."""
    numbers = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    q, k = torch.tensor(data.draw(numbers)), torch.tensor(data.draw(numbers))
    aten = torch.ops.aten
    target = data.draw(st.sampled_from([aten.le.Tensor, aten.eq.Tensor, aten.sub.Tensor, aten.add.Tensor]))
    a, b = bands.plain(q[:, None]), bands.plain(k[None])
    found = bands.of_ranges(target, a, b, size, size)
    if found is not None:
        assert torch.equal(dense(Band((size, size), found)), target(q[:, None], k[None]))


def test_ranges_that_overflow_are_none():
    near = torch.arange(100, 110, dtype=torch.int8)
    wraps = torch.arange(250, 260).to(torch.uint8)
    for t in (near, wraps, torch.arange(10) + 2**62, torch.arange(10.0), torch.zeros(10, dtype=torch.bool)):
        a, b = bands.plain(t[:, None]), bands.plain(t[None])
        if a.data.numel() > 1:
            assert bands.of_ranges(torch.ops.aten.sub.Tensor, a, b, 10, 10) is None


@settings(deadline=None, max_examples=200)
@given(data=st.data(), m=st.integers(1, 6), n=st.integers(1, 6))
def test_verdicts(data, m, n):
    """Of any mask, band or not: a verdict says exactly which keys it allows."""
    if data.draw(st.booleans()):
        line = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m + n - 1, max_size=m + n - 1)))
        mask = dense(Band((m, n), line))
    else:
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m * n, max_size=m * n))).view(m, n)
    i, j = torch.arange(m)[:, None], torch.arange(n)
    said = verdict(bands.plain(mask), m, n)
    assert verdict(bands.plain(torch.where(mask, 0.0, -math.inf)), m, n) == said
    assert verdict(bands.plain(torch.where(mask, 0.0, -1e9)), m, n) == (said if mask.all() else None)
    if said == "all":
        assert mask.all()
    elif said == "causal":
        assert m == n and torch.equal(mask, j <= i)
    elif said is not None:
        assert m == n and 1 <= said < m and torch.equal(mask, (j <= i) & (i - j < said))
    else:
        assert not mask.all() and not (m == n and torch.equal(mask, j <= i))


def test_zeros_of_either_sign_and_nans_are_not_merged():
    zeros = torch.tensor([[0.0], [-0.0]])
    assert bands.plain(zeros).data.shape == (2, 1)
    assert bands.plain(torch.full((3, 3), math.nan)).data.numel() == 1
