"""Rules of slices, splits, concatenations and indexing.

Equal, aligned pieces are seen for what they are: ``[3 * n]`` split in three is the factors ``3 n``, of which only the
3 must stay replicated. That is how a fused qkv weight is split over its heads in place.
"""

from __future__ import annotations

import torch
from torch import fx

from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Operand, Spec, broadcast, relate, unknown
from fxpar.sharding.factors import Dim, Dims, Factor, extent

aten = torch.ops.aten


def _pieces(op: Op, dim: Dim, count: int, replicated: set[Factor]) -> Dim | None:
    """See `dim` as ``count`` equal pieces: the factors of one piece, or None if it cannot be."""
    size = extent(dim)
    if count <= 1 or size % count:
        return None
    number, piece = op.factors.new(count), op.factors.new(size // count)
    if not op.factors.align(dim, (*number, *piece)):
        return None
    replicated.update(number)
    return piece


def _cut(op: Op, dim: Dim, size: int, replicated: set[Factor]) -> Dim:
    """A piece of a dim that is not one of several equal pieces: both sides replicated."""
    made = op.factors.new(size)
    replicated.update(dim, made)
    return made


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Spec:
    (x,) = op.tensors()
    dims, shape = list(op.dims(x)), op.shape(x)
    at = op["dim"] % len(dims)
    full, got = shape[at], int(op.out.shape[at])
    if got == full and op["step"] == 1:
        return Spec(op.operands(), [tuple(dims)], emit=lambda local: local.operand(0))
    replicated: set[Factor] = set()
    start = max(0, op["start"] or 0) if (op["start"] or 0) >= 0 else max(0, full + op["start"])
    aligned = op["step"] == 1 and got and full % got == 0 and start % got == 0
    piece = _pieces(op, dims[at], full // got, replicated) if aligned else None
    if piece is None:
        dims[at] = _cut(op, dims[at], got, replicated)
        return Spec(op.operands(), [tuple(dims)], replicated=replicated)
    dims[at] = piece
    index = start // got

    def emit(local):
        n = local.extent(piece)
        return local.call(aten.slice.Tensor, local.operand(0), at, index * n, (index + 1) * n)

    return Spec(op.operands(), [tuple(dims)], replicated=replicated, emit=emit)


@rule(aten.narrow.default)
def narrow(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = list(op.dims(x))
    at = op["dim"] % len(dims)
    replicated: set[Factor] = set()
    dims[at] = _cut(op, dims[at], int(op.out.shape[at]), replicated)
    return Spec(op.operands(), [tuple(dims)], replicated=replicated)


@rule(aten.select.int)
def select(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = list(op.dims(x))
    gone = dims.pop(op["dim"] % len(dims))
    return Spec(op.operands(), [tuple(dims)], replicated=set(gone))


@rule(aten.split, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections,
      aten.unsafe_split.Tensor, aten.unsafe_chunk.default)  # fmt: skip
def split(op: Op) -> Spec:
    """Pieces of one dim. Equal ones keep their factors; of unequal ones the dim stays replicated."""
    (x,) = op.tensors()
    own = op.dims(x)
    replicated: set[Factor] = set()
    at = op["dim"] % len(own)
    sizes = [int(v.shape[at]) for v in op.outs()]
    equal = len(set(sizes)) == 1
    piece = _pieces(op, own[at], len(sizes), replicated) if equal else None
    if len(sizes) == 1:
        piece = own[at]
    unit = min(sizes)
    if piece is None and unit and not equal and all(n % unit == 0 for n in sizes):
        piece = _pieces(op, own[at], sum(sizes) // unit, replicated)  # as in [q, kv]: one piece and two of its size
    if piece is None:
        outs = [(*own[:at], _cut(op, own[at], n, replicated), *own[at + 1 :]) for n in sizes]
        return Spec(op.operands(), outs, replicated=replicated)
    if not equal:
        numbers = [op.factors.new(n // unit) for n in sizes]
        replicated.update(f for number in numbers for f in number)
        outs = [(*own[:at], (*number, *piece), *own[at + 1 :]) for number in numbers]
        return Spec(
            op.operands(),
            outs,
            replicated=replicated,
            emit=lambda local: local.call(
                aten.split_with_sizes.default, local.operand(0), [n // unit * local.extent(piece) for n in sizes], at
            ),
        )

    def emit(local):
        return local.call(aten.split.Tensor, local.operand(0), local.extent(piece), at)

    return Spec(op.operands(), [(*own[:at], piece, *own[at + 1 :]) for _ in sizes], replicated=replicated, emit=emit)


@rule(aten.unbind.int)
def unbind(op: Op) -> Spec:
    (x,) = op.tensors()
    dims = list(op.dims(x))
    gone = dims.pop(op["dim"] % len(dims))
    return Spec(op.operands(), [tuple(dims) for _ in op.outs()], replicated=set(gone))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(op: Op) -> Spec:
    """Equal parts make ``(number, part)``; unequal ones have the dim replicated."""
    nodes = [n for n in op["tensors"] if len(op.dims(n)) == len(op.out.shape)]
    at = op["dim"] % len(op.out.shape)
    replicated: set[Factor] = set()
    dims: list[Dim] = []
    for i in range(len(op.out.shape)):
        here = [op.dim(n, i) for n in nodes]
        dims.append(relate(op, [d for d in here if d], replicated, int(op.out.shape[i])) if i != at else ())
    parts = [op.dim(n, at) for n in nodes]
    if len({extent(p) for p in parts}) == 1 and len(nodes) > 1:
        part = relate(op, parts, replicated, extent(parts[0]))
        number = op.factors.new(len(nodes))
        replicated.update(number)
        dims[at] = (*number, *part)
    else:
        dims[at] = _cut(op, tuple(f for p in parts for f in p), int(op.out.shape[at]), replicated)
    return Spec(op.operands(), [tuple(dims)], replicated=replicated)


@rule(aten.stack.default)
def stack(op: Op) -> Spec:
    at = op["dim"] % len(op.out.shape)
    replicated: set[Factor] = set()
    first = op["tensors"][0]
    dims = [
        relate(op, [op.dim(n, i) for n in op["tensors"]], replicated, op.shape(first)[i]) for i in range(len(op.dims(first)))
    ]
    number = op.factors.new(len(op["tensors"]))
    replicated.update(number)
    dims.insert(at, number)
    return Spec(op.operands(), [tuple(dims)], replicated=replicated)


@rule(aten.pad.default, aten.constant_pad_nd.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
      aten.replication_pad1d.default, aten.replication_pad2d.default)  # fmt: skip
def pad(op: Op) -> Spec:
    (x,) = op.tensors()
    replicated: set[Factor] = set()
    dims = tuple(
        d if n == int(m) else _cut(op, d, int(m), replicated)
        for d, n, m in zip(op.dims(x), op.shape(x), op.out.shape, strict=True)
    )
    amounts = op["pad"] if "pad" in op.args else op["padding"]
    touched = {len(op.dims(x)) - 1 - i // 2 for i, n in enumerate(amounts) if n}
    replicated.update(f for i in touched for f in (*op.dim(x, i), *dims[i]))
    return Spec(op.operands(), [dims], replicated=replicated)


@rule(aten.index_select.default)
def index_select(op: Op) -> Spec:
    x, index = op["self"], op["index"]
    dims = list(op.dims(x))
    at = op["dim"] % len(dims)
    gone = dims[at]
    dims[at] = op.dim(index, 0) if op.dims(index) else ()
    return Spec(op.operands(), [tuple(dims)], replicated=set(gone))


@rule(aten.gather.default, aten.take_along_dim.default)
def gather(op: Op) -> Spec:
    """Along `dim` the operand stays replicated; the other dims are parallel where the index spans them all."""
    x, index = op["self"], op["index"] if "index" in op.args else op["indices"]
    if op["dim"] is None or (op.target is aten.take_along_dim.default and _stretched(op, x, index)):
        return unknown(op)
    at = op["dim"] % len(op.dims(x)) if op.dims(x) else 0
    replicated: set[Factor] = set(op.dim(x, at)) if op.dims(x) else set()
    dims = list(op.dims(index))
    for i, (a, b) in enumerate(zip(op.dims(x), op.dims(index), strict=True)):
        if i == at:
            continue
        if extent(a) == extent(b):
            dims[i] = relate(op, [b, a], replicated, extent(b))
        else:
            replicated.update(a, b)
    return Spec(op.operands(), [tuple(dims)], replicated=replicated)


def _stretched(op: Op, x: fx.Node, index: fx.Node) -> bool:
    """Whether operand and index broadcast against each other."""
    at = op["dim"] % len(op.dims(x))
    return any(n != m for i, (n, m) in enumerate(zip(op.shape(x), op.shape(index), strict=True)) if i != at)


@rule(aten.scatter_add.default)
def scatter_add(op: Op) -> Spec:
    """What is added may be split: each rank adds up its own, and what is added to comes last."""
    x, index, source = op["self"], op["index"], op["src"]
    if not op.dims(x) or len({x, index, source}) < 3 or op.shape(index) != op.shape(source):
        return scatter(op)
    at = op["dim"] % len(op.dims(x))
    added = set(op.dim(index, at))
    operands = [Operand(x, op.dims(x), deferred=True), *op.operands()[1:]]
    spec = Spec(operands, [op.dims(x)], sums=added, replicated=set(op.dim(x, at)))
    for i, (own, of_index, of_source) in enumerate(zip(op.dims(x), op.dims(index), op.dims(source), strict=True)):
        if not op.factors.align(of_index, of_source) or (i != at and not op.factors.align(own, of_index)):
            spec.replicated.update(own, of_index, of_source)
    spec.emit = _emit_scatter_add
    return spec


def _emit_scatter_add(local):
    if not local.skip_deferred:
        return local.default()
    index, source = local.operand(1), local.operand(2)
    zeros = local.call(aten.new_zeros.default, source, local.shape(local.spec.outs[0]))
    return local.call(aten.scatter_add.default, zeros, local.op["dim"], index, source)


@rule(aten.scatter, aten.scatter_reduce.two, aten.index_add.default, aten.index_copy.default,
      aten.index_fill, aten.index_put.default, aten._index_put_impl.default, aten.slice_scatter.default,
      aten.select_scatter.default, aten.masked_scatter.default)  # fmt: skip
def scatter(op: Op) -> Spec:
    """Writes into a copy of the first operand. Only what no index touches is parallel."""
    x = op["self"]
    own = op.dims(x)
    others = [n for n in op.tensors() if n is not x]
    spec = Spec(op.operands(), [own])
    if op.target in (aten.slice_scatter.default, aten.select_scatter.default):
        at = op["dim"] % len(own)
        source = op["src"]
        dims = list(op.dims(source))
        if op.target is aten.select_scatter.default:
            dims.insert(at, ())
        for i, (a, b) in enumerate(zip(own, dims, strict=True)):
            if i == at or not op.factors.align(a, b):
                spec.replicated.update(a, b)
        return spec
    if op.target in (aten.scatter_add.default, aten.scatter.src, aten.scatter.value, aten.scatter_reduce.two):
        at = op["dim"] % len(own) if own else 0
        for node in others:
            for i, (a, b) in enumerate(zip(own, op.dims(node), strict=True)):
                if i == at or extent(a) != extent(b) or not op.factors.align(a, b):
                    spec.replicated.update(a, b)
        return spec
    spec.replicated = {f for n in op.tensors() for d in op.dims(n) for f in d}
    if op.target in (aten.index_put.default, aten._index_put_impl.default) and not _has_mask(op["indices"]):
        made = [d if i is None else op.factors.new(n) for d, n, i in zip(own, op.shape(x), op["indices"], strict=False)]
        spec.outs = [(*made, *own[len(made) :])]  # what is put together by an index is a dim of its own
        spec.replicated.update(f for d in made for f in d)
    return spec


def _has_mask(indices: list) -> bool:
    return any(isinstance(i, fx.Node) and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def advanced_index(op: Op) -> Spec:
    """``x[i, j]``: indexed dims stay replicated; the rest, and the index's own dims, are parallel."""
    x, indices = op["self"], list(op["indices"])
    if _has_mask(indices):
        return unknown(op)
    own = op.dims(x)
    used = [k for k, i in enumerate(indices) if i is not None]
    replicated = {f for k in used for f in own[k]}
    tables: list[Dims] = [op.dims(indices[k]) for k in used]
    rank = max(len(t) for t in tables)
    shape = list(torch.broadcast_shapes(*[tuple(op.shape(indices[k])) for k in used]))
    made = broadcast(op, tables, shape, replicated) if rank else ()
    adjacent = used == list(range(used[0], used[-1] + 1))
    rest = [d for k, d in enumerate(own) if k not in used]
    at = used[0] if adjacent else 0
    spec = Spec([Operand(n, op.dims(n)) for n in op.tensors()], [(*rest[:at], *made, *rest[at:])], replicated=replicated)
    return spec


@rule(aten.one_hot.default)
def one_hot(op: Op) -> Spec:
    (x,) = op.tensors()
    classes = op.factors.new(int(op.out.shape[-1]))
    return Spec(
        op.operands(),
        [(*op.dims(x), classes)],
        replicated=set(classes),
        emit=lambda local: local.call(aten.one_hot.default, local.operand(0), int(op.out.shape[-1])),
    )
