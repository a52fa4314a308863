"""Random arguments for slices, splits, concatenation and indexing."""

from __future__ import annotations

from typing import Any

import torch

from tests.harness import Gen
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


@case(aten.slice.Tensor)
def slice_(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    n = x.shape[dim]
    parts = g.r.choice([k for k in (1, 2, 3, 4) if n % k == 0])
    at, each = g.r.randrange(parts), n // parts
    if g.maybe(0.6):
        return (
            x,
            dim,
            at * each - (n if g.maybe() and at else 0),
            (at + 1) * each if at + 1 < parts else 2**63 - 1,
        )
    start = g.r.randint(-n - 1, n - 1)
    return x, dim, g.pick(start, None), g.pick(None, g.r.randint(-n, n + 2)), g.pick(1, 1, 2)


@case(aten.narrow.default)
def narrow(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    start = g.r.randrange(x.shape[dim])
    return x, dim, start, g.r.randint(1, x.shape[dim] - start)


@case(aten.select.int)
def select(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    return x, dim, g.r.randint(-x.shape[dim], x.shape[dim] - 1)


@case(aten.split.Tensor, aten.unsafe_split.Tensor)
def split(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    return x, g.r.randint(1, x.shape[dim]), dim


@case(aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections)
def chunk(g: Gen):
    x = g.any(*g.shape())
    return x, g.pick(1, 2, 3, 4), g.dim(x.dim())


@case(aten.split_with_sizes.default, aten.split.sizes, aten.split.default)
def split_with_sizes(g: Gen):
    shape = g.shape()
    dim = g.dim(len(shape))
    sizes = [g.pick(2, 4)] * g.pick(1, 2, 3) if g.maybe() else [g.pick(1, 2, 4) for _ in range(g.pick(2, 3))]
    shape[dim] = sum(sizes)
    return g.any(*shape), sizes, dim


@case(aten.unbind.int)
def unbind(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim())


@case(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(g: Gen):
    shape = g.shape()
    dim = g.dim(len(shape))
    equal, parts = g.maybe(), []
    for _ in range(g.pick(1, 2, 3)):
        if not equal:
            shape = [*shape]
            shape[dim] = g.pick(1, 2, 4, 0) if g.maybe(0.9) else 0
        parts.append(g.f(*shape))
    if g.maybe(0.2):
        parts.append(parts[0])
    if g.maybe(0.1):
        parts.append(g.f(0))
    return parts, dim


@case(aten.stack.default)
def stack(g: Gen):
    shape = g.shape(0, 3)
    parts = [g.f(*shape) for _ in range(g.pick(1, 2, 3))]
    return [*parts, parts[0]] if g.maybe(0.2) else parts, g.dim(len(shape) + 1)


@case(aten.pad.default)
def pad(g: Gen):
    x = g.f(*g.shape(3, 4, least=2))
    if g.maybe():
        return x, [g.pick(0, 1) for _ in range(2 * (x.dim() - 2))], g.pick("reflect", "replicate", "circular")
    return x, [g.pick(0, 0, 1, 2, -1) for _ in range(2 * g.r.randint(1, 3))], "constant", 0.5


@case(aten.constant_pad_nd.default)
def constant_pad(g: Gen):
    x = g.any(*g.shape(1, 4, least=2))
    return x, [g.pick(0, 0, 1, -1) for _ in range(2 * g.r.randint(1, x.dim()))], 1


@case(aten.reflection_pad1d.default, aten.replication_pad1d.default)
def pad1d(g: Gen):
    return g.f(*g.shape(2, 3, least=2)), [g.pick(0, 1), g.pick(0, 1)]


@case(aten.reflection_pad2d.default, aten.replication_pad2d.default)
def pad2d(g: Gen):
    return g.f(*g.shape(3, 4, least=2)), [g.pick(0, 1) for _ in range(4)]


@case(aten.index_select.default)
def index_select(g: Gen):
    x = g.any(*g.shape())
    dim = g.dim(x.dim())
    index = g.i(x.shape[dim]) if g.maybe(0.1) else g.i(x.shape[dim], g.n())
    return x, dim, index


@case(aten.gather.default)
def gather(g: Gen):
    shape = g.shape(0, 3)
    dim = g.dim(max(len(shape), 1))
    return g.f(*shape), dim, g.i(shape[dim] if shape else 1, *_inside(g, shape, dim))


def _inside(g: Gen, shape: list[int], dim: int, free: bool = True) -> list[int]:
    """The shape of an index into a tensor of that shape: along `dim` any, elsewhere at most as large."""
    index = [n if g.maybe(0.8) else g.r.randint(1, n) for n in shape]
    if shape:
        index[dim] = g.n() if free else g.r.randint(1, shape[dim])
    return index


@case(aten.take_along_dim.default)
def take_along_dim(g: Gen):
    shape = g.shape(1, 3)
    dim = g.dim(len(shape))
    x = [n if i == dim % len(shape) or g.maybe(0.8) else 1 for i, n in enumerate(shape)]
    index = [g.n() if i == dim % len(shape) else n if g.maybe(0.8) else 1 for i, n in enumerate(shape)]
    if g.maybe(0.2):
        return g.f(*x), g.i(torch.Size(x).numel(), g.n())
    return g.f(*x), g.i(shape[dim], *index), dim


def _scattered(g: Gen):
    shape = g.shape(0, 3)
    dim = g.dim(max(len(shape), 1))
    inside = _inside(g, shape, dim, free=False)
    return g.f(*shape), dim, _unique(g, shape, inside, dim), g.f(*inside)


def _unique(g: Gen, shape: list[int], inside: list[int], dim: int) -> torch.Tensor:
    """Indices along `dim` that are all different, so that a scatter does not depend on its order."""
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    full = torch.argsort(torch.rand(shape, generator=g.torch), dim=dim)
    return full[tuple(slice(0, n) for n in inside)].contiguous()


case(aten.scatter.src, aten.scatter_add.default)(lambda g: _larger_source(g) if g.maybe(0.3) else _scattered(g))
case(aten.scatter.value)(lambda g: (*_scattered(g)[:3], 0.5))
case(aten.scatter.reduce)(lambda g: ((*_larger_source(g),), {"reduce": "add"}))
case(aten.scatter.value_reduce)(lambda g: ((*_larger_source(g)[:3], 3), {"reduce": "multiply"}))


def _larger_source(g: Gen):
    """Integers, as no gradient is defined here."""
    x, dim, index, _ = _scattered(g)
    return g.i(9, *x.shape), dim, index, g.i(9, *[n if g.maybe(0.8) else n + 2 for n in index.shape])


@case(aten.scatter_reduce.two)
def scatter_reduce(g: Gen):
    shape = g.shape(1, 3)
    dim = g.dim(len(shape))
    inside = _inside(g, shape, dim, free=False)
    index = g.i(shape[dim], *inside)
    return (g.f(*shape), dim, index, g.f(*inside), g.pick("sum", "mean", "amax")), {"include_self": g.maybe()}


def _rows(g: Gen):
    x = g.f(*g.shape(1, 3))
    dim = g.dim(x.dim())
    count = g.r.randint(1, x.shape[dim])
    return x, dim, torch.randperm(x.shape[dim], generator=g.torch)[:count], count


@case(aten.index_add.default, aten.index_copy.default)
def index_add(g: Gen):
    x, dim, index, count = _rows(g)
    shape = list(x.shape)
    shape[dim] = count
    return x, dim, index, g.f(*shape)


case(aten.index_fill.int_Scalar)(lambda g: (*_rows(g)[:3], 0.5))
case(aten.index_fill.int_Tensor)(lambda g: (*_rows(g)[:3], g.f()))


@case(aten.index_put.default, aten._index_put_impl.default)
def index_put(g: Gen):
    x = g.f(*g.shape(1, 3))
    if g.maybe(0.3):
        return (x, [g.b(*x.shape)], g.f()), {}
    k = g.r.randrange(x.dim())
    index = torch.randperm(x.shape[k], generator=g.torch)[: g.r.randint(1, x.shape[k])]
    values = list(x.shape)
    values[k] = len(index)
    return x, [*[None] * k, index], g.f(*g.broadcast(values)), g.maybe()


@case(aten.slice_scatter.default)
def slice_scatter(g: Gen):
    x = g.f(*g.shape())
    dim = g.dim(x.dim())
    start = g.r.randrange(x.shape[dim])
    end = g.r.randint(start + 1, x.shape[dim])
    source = list(x.shape)
    source[dim] = end - start
    return x, g.f(*source), dim, start, end


@case(aten.select_scatter.default)
def select_scatter(g: Gen):
    x = g.f(*g.shape())
    dim = g.dim(x.dim())
    source = list(x.shape)
    del source[dim]
    return x, g.f(*source), dim, g.r.randrange(x.shape[dim])


@case(aten.masked_scatter.default)
def masked_scatter(g: Gen):
    shape = g.shape()
    x = g.f(*shape)
    return x, g.b(*g.broadcast(shape)), g.f(x.numel())


@case(aten.index.Tensor)
def index_or_mask(g: Gen):
    x = g.f(*g.shape(1, 4))
    return (x, [g.b(*x.shape)]) if g.maybe(0.1) else index(g)


@case(aten._unsafe_index.Tensor)
def index(g: Gen):
    x = g.f(*g.shape(1, 4))
    together = g.shape(0, 2)
    used = sorted(g.r.sample(range(x.dim()), g.r.randint(1, x.dim())))
    indices: list[Any] = [None] * (used[-1] + 1)
    for k in used:
        indices[k] = g.i(x.shape[k], *g.broadcast(together), low=-x.shape[k])
    return x, indices


@case(aten.one_hot.default)
def one_hot(g: Gen):
    return g.i(4, *g.shape()), g.pick(4, 6, -1)
