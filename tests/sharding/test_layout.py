"""Layouts: the parts that ranks hold make up the full tensor, each element exactly where the layout says."""

import itertools
import math
from random import Random

import torch
from hypothesis import given

from fxpar.sharding.factors import Factors, leaves
from fxpar.sharding.layout import local_extent, local_shape, pieces, place_of, put, restrict, sharding_of, show, take
from fxpar.sharding.mesh import Mesh
from tests.harness import MESHES, RANDOM, random_dims, random_layout


def example(r: Random):
    mesh = r.choice(MESHES)
    dims = random_dims(r)
    return mesh, dims, random_layout(r, [f for d in dims for f in leaves(d)], mesh, 0.7)


def numbered(dims):
    shape = [math.prod(f.size for f in d) for d in dims]
    return torch.arange(math.prod(shape)).reshape(shape)


@given(RANDOM)
def test_parts_have_the_local_shape_and_make_up_the_full_tensor(r):
    mesh, dims, layout = example(r)
    x, sharding = numbered(dims), sharding_of(dims, layout, mesh)
    parts = [take(x, sharding, mesh, rank) for rank in range(mesh.world_size)]
    assert all(list(p.shape) == local_shape(dims, layout, mesh) for p in parts)
    assert torch.equal(put(parts, sharding, x.shape, mesh), x)
    counts = torch.cat([p.reshape(-1) for p in parts]).bincount(minlength=x.numel())
    copies = mesh.world_size // mesh.size(*layout)
    assert (counts == copies).all()


@given(RANDOM)
def test_take_is_a_slice_of_each_factor(r):
    mesh, dims, layout = example(r)
    x = numbered(dims)
    flat = [f for d in dims for f in leaves(d)]
    rank = r.randrange(mesh.world_size)
    at = mesh.coordinate(rank)
    fine = x.reshape([f.size for f in flat])
    for i, f in enumerate(flat):
        for axis in mesh.names:  # major to minor
            if layout.get(axis) is f:
                fine = fine.chunk(mesh.size(axis), dim=i)[at[axis]]
    assert torch.equal(take(x, sharding_of(dims, layout, mesh), mesh, rank), fine.reshape(local_shape(dims, layout, mesh)))


@given(RANDOM)
def test_place_finds_the_factor_in_the_local_tensor(r):
    """Splitting at (dim, outer) by one more axis gives what the layout with that axis gives."""
    mesh, dims, layout = example(r)
    for axis in reversed(mesh.names):  # the most minor axis of its factor
        leaf = layout.get(axis)
        if leaf is None:
            continue
        rest = {a: f for a, f in layout.items() if a != axis}
        if any(f is leaf and mesh.names.index(a) > mesh.names.index(axis) for a, f in rest.items()):
            continue
        dim, outer = place_of(dims, rest, mesh, leaf)
        rank = r.randrange(mesh.world_size)
        before = take(numbered(dims), sharding_of(dims, rest, mesh), mesh, rank)
        n, shape = mesh.size(axis), list(before.shape)
        cut = before.reshape(*shape[:dim], outer, n, -1, *shape[dim + 1 :]).select(dim + 1, mesh.coordinate(rank)[axis])
        after = take(numbered(dims), sharding_of(dims, layout, mesh), mesh, rank)
        assert torch.equal(cut.reshape(after.shape), after)


@given(RANDOM)
def test_pieces_cover_each_dim(r):
    mesh, dims, layout = example(r)
    for dim in dims:
        cut = pieces(dim, layout, mesh)
        assert math.prod(p.size for p in cut) == math.prod(f.size for f in dim)
        assert not any(not a.axes and not b.axes for a, b in itertools.pairwise(cut))
        assert local_extent(dim, layout, mesh) * math.prod(mesh.size(*p.axes) for p in cut) == math.prod(
            f.size for f in dim
        )


def test_put_is_differentiable():
    mesh = Mesh(("a", "b"), (2, 2))
    dims = Factors().fresh([4, 2])
    sharding = sharding_of(dims, {"a": dims[0][0]}, mesh)
    parts = [torch.ones(2, 2, requires_grad=True) for _ in range(4)]
    put(parts, sharding, torch.Size([4, 2]), mesh).sum().backward()
    assert [None if p.grad is None else p.grad.sum().item() for p in parts] == [4, None, 4, None]


def test_restrict_and_show():
    mesh, factors = Mesh(("dp", "tp"), (2, 4)), Factors()
    (batch, rows), (other,) = factors.fresh([8, 12]), factors.fresh([4])
    rows[0].role = "ffn"
    layout = {"dp": batch[0], "tp": rows[0]}
    assert restrict(layout, (rows, other)) == {"tp": rows[0]}
    assert restrict(layout, (rows,), without=rows) == {}
    assert show((batch, rows, ()), layout, mesh) == "[a8/dp, ffn12/tp, 1]"
