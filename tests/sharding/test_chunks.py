"""Rectangles: those of all ranks make up the full tensor, and each is where `take` says."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from hypothesis import given
from torch import Tensor

from fxpar.checkpoint.part import Part, Shares
from fxpar.sharding import chunks
from fxpar.sharding.factors import leaves
from fxpar.sharding.layout import Piece, Sharding, sharding_of, take
from fxpar.sharding.mesh import Mesh
from tests.harness import MESHES, RANDOM, random_dims, random_layout


def example(r: Random) -> tuple[Mesh, Sharding, Tensor]:
    mesh = r.choice(MESHES)
    dims = random_dims(r)
    layout = random_layout(r, [f for d in dims for f in leaves(d)], mesh, 0.7)
    shape = [math.prod(f.size for f in d) for d in dims]
    return mesh, sharding_of(dims, layout, mesh), torch.arange(math.prod(shape)).reshape(shape)


def parts(mesh: Mesh, sharding: Sharding, full: Tensor) -> list[Part]:
    return [Part(full.shape, take(full, sharding, mesh, r), sharding, mesh, r) for r in range(mesh.world_size)]


def count(seen: Tensor, chunk: Any) -> None:
    chunk.of_full(seen).add_(1)


@given(RANDOM)
def test_chunks_are_what_take_takes(r):
    mesh, sharding, full = example(r)
    seen = torch.zeros_like(full)
    for part in parts(mesh, sharding, full):
        mine = torch.zeros_like(part.local)
        for chunk, local in part.chunks():
            assert torch.equal(local, chunk.of_full(full))
            count(seen, chunk)
            chunk.of_part(mine).add_(1)
        assert (mine == 1).all()
    assert (seen == mesh.size(*chunks.replicas(sharding, mesh))).all()


@given(RANDOM)
def test_every_element_is_written_once_and_the_work_is_shared(r):
    mesh, sharding, full = example(r)
    shares, wrote = [Shares() for _ in range(mesh.world_size)], [0] * mesh.world_size
    copies = mesh.size(*chunks.replicas(sharding, mesh))
    for _ in range(copies):
        seen = torch.zeros_like(full)
        for part, share in zip(parts(mesh, sharding, full), shares, strict=True):
            if share.mine(part):
                wrote[part.rank] += 1
                for chunk, _ in part.chunks():
                    count(seen, chunk)
        assert (seen == 1).all()
    assert wrote == [1] * mesh.world_size


@given(RANDOM)
def test_within_is_what_lies_in_a_rectangle(r):
    mesh, sharding, full = example(r)
    start = tuple(r.randrange(n) for n in full.shape)
    size = tuple(r.randint(1, n - s) for n, s in zip(full.shape, start, strict=True))
    inside = chunks.view(full, start, size)
    for part in parts(mesh, sharding, full):
        found = list(chunks.chunks(chunks.within(part.runs, start, size)))
        for chunk in found:
            assert torch.equal(chunk.of_part(part.local), chunk.of_full(inside, start))
        want = set(part.local.reshape(-1).tolist()) & set(inside.reshape(-1).tolist())
        assert sum(math.prod(c.size) for c in found) == len(want)


def test_a_factor_inside_a_dim_is_one_run_in_each_of_those_before_it():
    mesh = Mesh(("tp",), (2,))
    runs = chunks.runs_of(((Piece(3), Piece(4, ("tp",)), Piece(2)), (Piece(5),)), (24, 5), mesh, 1)
    assert [(c.start, c.local, c.size) for c in chunks.chunks(runs)] == [
        ((4, 0), (0, 0), (4, 5)), ((12, 0), (4, 0), (4, 5)), ((20, 0), (8, 0), (4, 5))]  # fmt: skip


def test_scalars_and_dims_of_no_pieces_are_not_split():
    mesh = Mesh(("tp",), (2,))
    assert [c.size for c in chunks.chunks(chunks.runs_of((), (), mesh, 1))] == [()]
    assert [c.size for c in chunks.chunks(chunks.runs_of(((), ()), (1, 3), mesh, 1))] == [(1, 3)]
