"""Dealing: the order in which a causal sequence lies on ranks, so that each has as much of attention to do as any other.

A sequence on n ranks is cut into 2n chunks, of which rank r gets chunks r and 2n - 1 - r: what one of them sees less of the
sequence, the other sees more. ``deal`` brings a whole sequence into the order in which the ranks' parts follow one another, and
``undeal`` back, so that a split is then one like any other:

    n = 2:   0 1 2 3   --deal-->   0 3 | 1 2

It nests: to deal to n ranks, and then each one's part to m, is to deal to n * m.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

At = TypeVar("At", int, Tensor)


def deal(x: Tensor, dim: int, outer: int, ranks: int) -> Tensor:
    """`x` with the sequence that lies in its dim `dim`, seen as ``[outer, sequence]`` and what follows, dealt to `ranks`.

    What follows the sequence in the dim goes along with it, as long as 2 * ranks divides the sequence.
    """
    if ranks == 1:
        return x
    shape = x.shape
    x = x.unflatten(dim, (outer, 2, ranks, shape[dim] // (outer * 2 * ranks)))
    ahead, behind = x.select(dim + 1, 0), x.select(dim + 1, 1).flip(dim + 1)
    return torch.stack((ahead, behind), dim + 2).reshape(shape)


def undeal(x: Tensor, dim: int, outer: int, ranks: int) -> Tensor:
    """The inverse of `deal`."""
    if ranks == 1:
        return x
    shape = x.shape
    x = x.unflatten(dim, (outer, ranks, 2, shape[dim] // (outer * 2 * ranks)))
    ahead, behind = x.select(dim + 2, 0), x.select(dim + 2, 1).flip(dim + 1)
    return torch.stack((ahead, behind), dim + 1).reshape(shape)


def dealt_from(at: At, size: int, ranks: int) -> At:
    """Where in the sequence of `size` the elements come from that `deal` brings to these places."""
    if ranks == 1:
        return at
    length = size // (2 * ranks)
    rank, behind, within = at // (2 * length), at // length % 2, at % length
    return (rank + behind * (2 * ranks - 1 - 2 * rank)) * length + within
