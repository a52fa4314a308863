"""data: what ``dtensor.data = value`` and ``dtensor.share_memory_()`` do."""

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


def share_memory_by(share: Callable[[Any], Any]) -> None:
    """Have ``dtensor.share_memory_()`` be ``share(dtensor)``. By itself it ends the process (torch 2.11 to 2.15)."""
    dtensor: Any = DTensor
    dtensor.share_memory_ = share
