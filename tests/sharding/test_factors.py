"""Factors: relating dims never loses an extent, never makes one factor of two that stand in one tensor."""

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxpar.sharding.factors import Factors, extent, label, leaves
from tests.harness import RANDOM

EXTENTS = (1, 2, 3, 4, 6, 8, 12, 24)


def sizes(dim):
    return [f.size for f in leaves(dim)]


def tensor(r: Random, factors: Factors):
    dims = tuple(tuple(f for n in r.choices(EXTENTS, k=r.randint(0, 3)) for f in factors.new(n)) for _ in range(3))
    return factors.beside(dims)


class World:
    """Some tensors, related at random; remembers what must stay true."""

    def __init__(self, r: Random):
        self.r, self.factors = r, Factors()
        self.tensors = [tensor(r, self.factors) for _ in range(r.randint(2, 4))]
        self.extents = [[extent(leaves(d)) for d in t] for t in self.tensors]
        self.same: list = []

    def relate(self):
        a, b = (self.r.choice(self.r.choice(self.tensors)) for _ in range(2))
        before = [sizes(a), sizes(b)]
        if self.factors.align(a, b):
            self.same.append((a, b))
        elif extent(leaves(a)) != extent(leaves(b)):
            assert [sizes(a), sizes(b)] == before

    def split(self):
        flat = [f for t in self.tensors for d in t for f in leaves(d)]
        able = [(f, k) for f in flat for k in (2, 3, 4) if f.size % k == 0 and f.size > k]
        if able:
            self.factors.split(*self.r.choice(able))

    def check(self):
        for dims, extents in zip(self.tensors, self.extents, strict=True):
            assert [extent(leaves(d)) for d in dims] == extents
            flat = [f for d in dims for f in leaves(d)]
            assert len(set(flat)) == len(flat) and self.factors.distinct(dims)
            assert all(f.root() is f and not f.parts and f.size > 1 for f in flat)
            for f in flat:
                assert f not in f.apart
                assert all(g in f.apart and f in g.apart for g in flat if g is not f)
        for a, b in self.same:
            assert leaves(a) == leaves(b)


@given(RANDOM)
def test_what_was_related_stays_related_and_what_is_apart_stays_apart(r):
    world = World(r)
    for _ in range(r.randint(1, 12)):
        r.choice([world.relate, world.relate, world.split])()
        world.check()


@given(RANDOM)
def test_align_is_idempotent_and_symmetric(r):
    world = World(r)
    a, b = world.tensors[0][0], world.tensors[1][0]
    if world.factors.align(a, b):
        made = leaves(a)
        count = world.factors.count
        assert world.factors.align(b, a) and world.factors.align(a, b)
        assert leaves(a) == leaves(b) == made and world.factors.count == count


@given(st.lists(st.sampled_from(EXTENTS), max_size=4), st.lists(st.sampled_from(EXTENTS), max_size=4))
def test_align_finds_the_coarsest_common_refinement(left, right):
    """Two fresh lists align exactly if their cuts nest, and then have no more cuts than both."""
    factors = Factors()
    a = tuple(f for n in left for f in factors.new(n))
    b = tuple(f for n in right for f in factors.new(n))

    def cuts(ns):
        out, total = set(), 1
        for n in reversed(ns):
            total *= n
            out.add(total)
        return out

    every = sorted(cuts(left) | cuts(right) | {1})
    nest = all(hi % lo == 0 for lo, hi in itertools.pairwise(every))
    same = extent(a) == extent(b)
    assert factors.align(a, b) == (same and nest)
    if same and nest:
        assert sizes(a) == sizes(b) == [hi // lo for lo, hi in itertools.pairwise(every)][::-1]


@pytest.mark.parametrize(
    "left, right, common",
    [
        ([12], [3, 4], [3, 4]),
        ([3, 4], [12], [3, 4]),
        ([2, 6], [4, 3], [2, 2, 3]),
        ([4, 6], [6, 4], None),
        ([6], [4], None),
        ([], [], []),
        ([8], [2, 2, 2], [2, 2, 2]),
    ],
)
def test_align(left, right, common):
    factors = Factors()
    a = tuple(f for n in left for f in factors.new(n))
    b = tuple(f for n in right for f in factors.new(n))
    assert factors.align(a, b) == (common is not None)
    if common is not None:
        assert sizes(a) == sizes(b) == common


def test_factors_of_one_tensor_never_merge_even_through_a_third():
    factors = Factors()
    square = factors.beside(factors.fresh([4, 4]))
    other = factors.beside(factors.fresh([4]))
    assert factors.align(square[0], other[0])
    assert not factors.align(other[0], square[1])
    assert leaves(square[0]) != leaves(square[1])


def test_parts_of_a_split_inherit_role_and_apart():
    factors = Factors()
    dims = factors.beside(factors.fresh([12, 4]))
    dims[0][0].role = "heads"
    factors.split(dims[0][0], 3)
    major, minor = leaves(dims[0])
    assert (major.size, minor.size) == (3, 4) and major.role == minor.role == "heads"
    assert not factors.align((minor,), dims[1]) and not factors.align(dims[1], (minor,))


def test_a_dim_of_extent_one_has_no_factor():
    assert Factors().fresh([1, 2, 1])[0] == () and extent(()) == 1


def test_labels_are_distinct():
    names = [label(i) for i in range(1000)]
    assert names[:3] == ["a", "b", "c"] and names[26] == "aa" and len(set(names)) == 1000
