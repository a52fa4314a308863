"""`before`: a buffer as it is when a forward that changes it begins."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("before(Tensor buffer) -> Tensor")
before = torch.ops.fxpar.before.default
"""A copy. An operator of its own, which no backward makes again: the buffer has changed by then."""


@torch.library.impl(_library, "before", "CompositeExplicitAutograd")
def _before(buffer: Tensor) -> Tensor:
    return buffer.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("fxpar::before", lib=_library)
def _fake(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer, memory_format=torch.contiguous_format)
