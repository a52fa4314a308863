"""numbers: what is read from a DTensor with one element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def read_numbers_of(whole: Callable[[Any], Tensor]) -> None:
    """Have the numbers of DTensors (``item()``, ``float()``, ``bool()``, a format) be those of ``whole(dtensor)``.

    DTensor by itself reads them from the rank's part, and formats none (torch 2.11 to 2.15).
    """
    read = torch.ops.aten._local_scalar_dense.default
    dtensor: Any = DTensor
    dtensor._op_dispatcher._custom_op_handlers[read] = lambda _, args, kwargs: read(whole(args[0]))
    dtensor.__format__ = _format


def _format(t: DTensor, spec: str) -> str:
    return t.item().__format__(spec) if spec and t.dim() == 0 else object.__format__(t, spec)
