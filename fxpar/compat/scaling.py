"""scaling: where a GradScaler has looked for gradients that are not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Found = dict[torch.device, Tensor]
"""Of each device a scalar that is not 0 where a gradient is not finite."""


@functools.cache
def after_searches_for_inf(function: Callable[[Any, Found], None]) -> None:
    """From now on every `torch.amp.GradScaler` of this process that has looked at the gradients of an optimizer calls
    ``function(optimizer, found)``, which may change what was found. Once is enough."""
    scaler: Any = torch.amp.GradScaler
    search = scaler._unscale_grads_

    @functools.wraps(search)
    def searched(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Found:
        found: Found = search(self, optimizer, *args, **kwargs)
        function(optimizer, found)
        return found

    scaler._unscale_grads_ = searched
