"""data: what ``dtensor.data = value`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def assign_data_by(assign: Callable[[Any, Any], None]) -> None:
    """Have ``dtensor.data = value`` be ``assign(dtensor, value)``. By itself it changes what the tensor says of itself, and not
    the part that it holds, so that nothing is written, in silence (torch 2.11 to 2.15)."""
    descriptor: Any = Tensor.data
    dtensor: Any = DTensor
    dtensor.data = property(lambda t: descriptor.__get__(t), assign)
