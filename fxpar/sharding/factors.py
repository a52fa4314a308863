"""Factors: the logical dimensions of a model, inferred by unifying what its operators relate.

A tensor dimension is an ordered list of factors, major to minor, whose sizes multiply to its extent; a
dimension of extent 1 is the empty list. Two factors that an operator relates become one; a factor
that a `view` cuts is *split* into smaller ones, everywhere at once. The idea is that of Shardy's op
sharding rules, for ATen.

Worked example, attention heads: ``linear: x[b, s, h] w[o, h] -> [b, s, o]`` gives the dims ``[b][s][o]``;
``view(4, 16, 8, 8)`` splits ``o64`` into ``c8 d8``, and with it the weight's rows.

Of the pairs (expert, token) of a mixture of experts, k of E are there. Rows that stand for these pairs are one dimension, made of
the experts, the tokens and their slots, and of a *share*: a factor of size 1/E, which nothing splits. So extents are as ever the
products of sizes: of all rows their number, and of the rows of some experts their number if the router is balanced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any


class Factor:
    """One logical dimension (a union-find node). Compare factors after `Factors.leaves`.

    size: its extent; of a share, one of `of`. parts: the smaller factors it was split into, major to minor.
    apart: factors that occur beside it in some tensor, and so can never be the same one.
    role: what it is to the model ("batch", "heads", ...), set by roles.assign_roles; so is causal: whether causal attention goes
    along it.
    """

    __slots__ = ("apart", "causal", "id", "of", "parent", "parts", "role", "size")

    def __init__(self, size: Any, id: int):
        self.size: int = size
        self.of = size.denominator if isinstance(size, Fraction) else 0
        self.id = id
        self.parent: Factor | None = None
        self.parts: tuple[Factor, ...] = ()
        self.apart: set[Factor] = set()
        self.role: str | None = None
        self.causal = False

    def root(self) -> Factor:
        node = self
        while node.parent is not None:
            if node.parent.parent is not None:
                node.parent = node.parent.parent
            node = node.parent
        return node

    def leaves(self) -> Iterator[Factor]:
        root = self.root()
        if not root.parts:
            yield root
        for part in root.parts:
            yield from part.leaves()

    def __repr__(self) -> str:
        return f"{label(self.id)}{self.size}"


Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]


def label(i: int) -> str:
    """0 -> a, 1 -> b, ... 26 -> aa."""
    text = ""
    i += 1
    while i:
        i, r = divmod(i - 1, 26)
        text = chr(97 + r) + text
    return text


def leaves(dim: Iterable[Factor]) -> list[Factor]:
    """The factors of a dimension as they are now, fully split, major to minor."""
    out: list[Factor] = []
    for f in dim:
        if f.parent is None and not f.parts:
            out.append(f)
        else:
            out.extend(f.leaves())
    return out


def extent(dim: Iterable[Factor]) -> int:
    return whole(math.prod(f.size for f in dim))


def whole(size: int | Fraction) -> int:
    """A number of elements; of rows that are there only on average, rounded up."""
    return math.ceil(size)


def share_of(dim: Iterable[Factor]) -> Factor | None:
    """The share of a dimension whose rows are some pairs of experts and tokens; None of any other dimension."""
    return next((f for f in leaves(dim) if f.of), None)


class Factors:
    """Makes factors and relates them. All rules of one program share one."""

    def __init__(self) -> None:
        self.count = 0

    def new(self, size: int) -> Dim:
        """A dimension made of one fresh factor (none for extent 1)."""
        if size == 1:
            return ()
        self.count += 1
        return (Factor(size, self.count - 1),)

    def fresh(self, shape: Iterable[int]) -> Dims:
        return tuple(self.new(int(n)) for n in shape)

    def share(self, of: int) -> Dim:
        """One of so many."""
        self.count += 1
        return (Factor(Fraction(1, of), self.count - 1),)

    def beside(self, dims: Dims) -> Dims:
        """State that these are the dims of one tensor: no two of their factors may ever merge."""
        flat = [f for d in dims for f in leaves(d)]
        for i, a in enumerate(flat):
            for b in flat[:i]:
                if b not in a.apart:
                    a.apart.add(b)
                    b.apart.add(a)
        return dims

    def distinct(self, dims: Dims) -> bool:
        """Whether no factor occurs twice in these dims."""
        flat = [f for d in dims for f in leaves(d)]
        return len(set(flat)) == len(flat)

    def merge(self, a: Factor, b: Factor) -> bool:
        """Make two leaves of one size the same factor; False if some tensor has both."""
        if a is b:
            return True
        if b in a.apart:
            return False
        if len(a.apart) < len(b.apart):
            a, b = b, a
        b.parent = a
        for other in b.apart:
            other.apart.discard(b)
            other.apart.add(a)
        a.apart |= b.apart
        a.role = a.role or b.role
        return True

    def split(self, leaf: Factor, major: int) -> None:
        """Split a leaf into ``(major, size // major)``."""
        parts = self.new(major) + self.new(leaf.size // major)
        for part in parts:
            part.role = leaf.role
            part.apart = {p for p in parts if p is not part} | leaf.apart
            for other in leaf.apart:
                other.apart.add(part)
        leaf.parts = parts

    def align(self, a: Sequence[Factor], b: Sequence[Factor]) -> bool:
        """Make two factor lists the same, major to minor, splitting where their sizes nest.

        ``[12] ~ [3, 4]`` splits the first; ``[4, 6] ~ [6, 4]`` has no common refinement and gives False
        (what was related before the failure stays related, which is harmless).
        """
        left, right = leaves(a)[::-1], leaves(b)[::-1]
        if math.prod(f.size for f in left) != math.prod(f.size for f in right):
            return False
        while left and right:
            x, y = left.pop().root(), right.pop().root()
            if x.parts or y.parts:
                left.extend(list(x.leaves())[::-1])
                right.extend(list(y.leaves())[::-1])
            elif x.of or y.of:  # a share is itself alone
                if x is not y:
                    return False
            elif x.size == y.size:
                if not self.merge(x, y):
                    return False
            elif x.size > y.size and x.size % y.size == 0:
                self.split(x, y.size)
                left.extend(x.parts[::-1])
                right.append(y)
            elif y.size > x.size and y.size % x.size == 0:
                self.split(y, x.size)
                right.extend(y.parts[::-1])
                left.append(x)
            else:
                return False
        return True
