"""`unbiased`: the variance of what rows were drawn from, of which there is the variance of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("unbiased(Tensor variance, int count) -> Tensor")
unbiased = torch.ops.fxpar.unbiased.default
"""variance, count -> ``variance * correction(count)``. An operator of its own, which no trace takes apart, for as long as it is
not known how many rows are computed at once. It has no derivative."""


def correction(count: int) -> float:
    """``n / (n - 1)``, of `count` rows; 1 for a single one."""
    return count / max(count - 1, 1)


@torch.library.impl(_library, "unbiased", "CompositeExplicitAutograd")
def _unbiased(variance: Tensor, count: int) -> Tensor:
    return variance * correction(count)
