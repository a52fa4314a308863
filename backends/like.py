"""like: gradients of outputs, laid out as a backward was traced for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxpar.errors import InputError


@dataclass(frozen=True)
class Like:
    """A gradient of an output, as the backward was traced for it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def traced(value: Tensor) -> Like:
        return Like(tuple(value.shape), value.stride(), value.dtype, value.device)

    def of(self, grad: Tensor | None, position: int) -> Tensor:
        """The gradient laid out so, and zeros for none.

        position: of the output, for the message. Raises: `InputError` for a gradient of another shape or dtype.
        """
        if grad is None:
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device).zero_()
        if grad.shape != self.shape or grad.dtype != self.dtype:
            raise InputError(f"the gradient of output {position} is {grad.dtype} {list(grad.shape)}, and the output "
                             f"{self.dtype} {list(self.shape)}")
        if grad.stride() == self.strides:
            return grad.detach()
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device).copy_(grad)
