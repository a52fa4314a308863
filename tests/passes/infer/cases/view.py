"""Random arguments for rearrangements."""

from __future__ import annotations

import torch

from tests.harness import Gen
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


@case(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(g: Gen):
    x = g.any(*g.shape(0, 4))
    return x, _reshaped(g, x.numel())


def _reshaped(g: Gen, n: int) -> list[int]:
    out = []
    for _ in range(g.r.randint(0, 3)):
        factor = g.r.choice([k for k in (1, 2, 3, 4, 6, 8, 12) if n % k == 0])
        out.append(factor)
        n //= factor
    out.append(n)
    g.r.shuffle(out)
    if g.maybe(0.2):
        out[g.r.randrange(len(out))] = -1
    return out


@case(aten._reshape_alias.default)
def reshape_alias(g: Gen):
    x = g.any(*g.shape())
    return x, [x.numel()], [1]


@case(aten.view_as.default, aten.reshape_as.default)
def view_as(g: Gen):
    x = g.any(*g.shape())
    shape = [n if n != -1 else 0 for n in _reshaped(g, x.numel())]
    if 0 in shape:
        shape[shape.index(0)] = x.numel() // torch.Size([n for n in shape if n]).numel()
    return x, g.f(*shape)


@case(aten.flatten.using_ints)
def flatten(g: Gen):
    x = g.any(*g.shape(0, 4))
    rank = max(x.dim(), 1)
    a, b = sorted((g.r.randrange(rank), g.r.randrange(rank)))
    return x, a, b - rank if g.maybe() else b


@case(aten.unflatten.int)
def unflatten(g: Gen):
    shape = g.shape(1, 3)
    at = g.dim(len(shape))
    sizes = g.pick([2, 2], [2, 3], [1, 4], [2, 2, 2])
    shape[at] = torch.Size(sizes).numel()
    return g.any(*shape), at, [-1, *sizes[1:]] if g.maybe(0.3) else sizes


@case(aten.view.dtype)
def view_dtype(g: Gen):
    shape = g.shape()
    if g.maybe():
        return g.i(100, *shape), torch.float64
    return g.i(100, *shape[:-1], 4), torch.int32


@case(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim()), g.dim(x.dim())


@case(aten.t.default)
def t(g: Gen):
    return (g.any(*g.shape(0, 2)),)


@case(aten.numpy_T.default)
def numpy_t(g: Gen):
    return (g.any(*g.shape(1, 4)),)


@case(aten.mT.default, aten.adjoint.default)
def mt(g: Gen):
    return (g.any(*g.shape(2, 4)),)


@case(aten.permute.default)
def permute(g: Gen):
    x = g.any(*g.shape())
    order = list(range(x.dim()))
    g.r.shuffle(order)
    return x, [d - x.dim() if g.maybe() else d for d in order]


@case(aten.movedim.int, aten.moveaxis.int)
def movedim(g: Gen):
    x = g.any(*g.shape())
    return x, g.dim(x.dim()), g.dim(x.dim())


@case(aten.movedim.intlist, aten.moveaxis.intlist)
def movedims(g: Gen):
    x = g.any(*g.shape(2, 4))
    source, target = g.dims(x.dim()), g.r.sample(range(x.dim()), x.dim())
    return x, source, target[: len(source)]


@case(aten.unsqueeze.default)
def unsqueeze(g: Gen):
    x = g.any(*g.shape(0, 3))
    return x, g.dim(x.dim() + 1)


@case(aten.squeeze.default)
def squeeze(g: Gen):
    return (g.any(*[1 if g.maybe() else n for n in g.shape(0, 4)]),)


@case(aten.squeeze.dim)
def squeeze_dim(g: Gen):
    x = g.any(*[1 if g.maybe() else n for n in g.shape(1, 4)])
    return x, g.dim(x.dim())


@case(aten.squeeze.dims)
def squeeze_dims(g: Gen):
    x = g.any(*[1 if g.maybe() else n for n in g.shape(1, 4)])
    return x, g.dims(x.dim())


@case(aten.expand.default, aten.broadcast_to.default)
def expand(g: Gen):
    shape = g.shape(1, 4)
    own = g.broadcast(shape)
    return g.any(*own), [
        -1 if i >= len(shape) - len(own) and g.maybe(0.2) and own[i - len(shape)] == n else n
        for i, n in enumerate(shape)
    ]


@case(aten.expand_as.default)
def expand_as(g: Gen):
    shape = g.shape(1, 4)
    return g.any(*g.broadcast(shape)), g.f(*shape)


@case(aten.repeat.default, aten.tile.default)
def repeat(g: Gen):
    x = g.any(*g.shape(1, 3))
    return x, [g.pick(1, 2, 3) for _ in range(x.dim() + g.pick(0, 0, 1))]


@case(aten.repeat_interleave.self_int)
def repeat_interleave(g: Gen):
    x = g.any(*g.shape(1, 3))
    return x, g.pick(1, 2, 3), g.pick(None, g.dim(x.dim()), g.dim(x.dim()))


@case(aten.diagonal.default)
def diagonal(g: Gen):
    x = g.any(*g.shape(2, 4, least=2))
    a, b = g.r.sample(range(x.dim()), 2)
    return x, g.pick(0, 0, 1, -1), a - x.dim() if g.maybe() else a, b


@case(aten.unfold.default)
def unfold(g: Gen):
    x = g.any(*g.shape(1, 3))
    dim = g.dim(x.dim())
    return x, dim, g.r.randint(1, x.shape[dim]), g.pick(1, 2)


@case(aten.tril.default, aten.triu.default)
def triangle(g: Gen):
    return g.f(*g.shape(2, 4)), g.pick(0, 1, -1)
