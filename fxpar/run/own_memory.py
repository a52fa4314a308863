"""own_memory: gradients that share memory with nothing, so that they can be scaled where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxpar import compat


def apart(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """These gradients, copied where one has gaps, or shares memory with an earlier one or with the inputs that it was made of.

    They may be parts of one tensor. Takes no more than a look at addresses: the host does not wait for the values.
    """
    given = {compat.storage_of(x) for x in inputs}
    ends: dict[int, list[tuple[int, int]]] = {}
    made: list[Tensor | None] = []
    for grad in grads:
        if grad is None:
            made.append(None)
            continue
        taken = ends.setdefault(compat.storage_of(grad), [])
        begin = int(grad.storage_offset()) * grad.itemsize
        end = begin + grad.numel() * grad.itemsize
        shares = compat.storage_of(grad) in given or any(begin < e and b < end for b, e in taken)
        if shares or not grad.is_contiguous():
            grad = grad.clone(memory_format=torch.contiguous_format)
        else:
            taken.append((begin, end))
        made.append(grad)
    return made


def scale_in_place(grads: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply them by a scalar, where they are."""
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        of_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, some in of_dtype.items():
        torch._foreach_mul_(some, scale.to(dtype))
