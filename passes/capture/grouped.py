"""What is called that cannot be traced as it is: grouped matrix products, counts of experts, functions that read values."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fxpar import compat
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.within import within
from fxpar.passes.capture.traced import DESCRIPTIONS, asking_file
from fxpar.passes.capture.written import WRITTEN, Counts

BATCH_NORM = torch.nn.modules.batchnorm.__file__
HUGGING_FACE = "transformers.grouped_mm_fallback"
"""What Hugging Face's models call where they do not trust PyTorch's. Its backward reads the groups into Python."""


class Traceable(TorchFunctionMode):
    """Inside, functions are called that have values no trace knows where those of PyTorch would read some.

    Rows in groups times a matrix each are `fxpar.ops.grouped_mm`, whether PyTorch's or Hugging Face's is called.

    PyTorch's remains in its other forms (groups along another dim, a bias, a result of another dtype). Where it has no kernel
    (other dtypes than bf16, and CPUs) it cannot be traced; where it has one, it wants operands that lie as eager programs lay
    them, which a compiler does not know. Values are the same but for the rows after the last group, which are zero here where
    they may have been anything. A `bincount` of at least so many numbers has exactly so many, which `within` makes sure of: what
    counts how often each expert was chosen knows how many there are, and without that the size would depend on the values.
    Others are in `fxpar.passes.capture.written`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DESCRIPTIONS:
            return func(*args, **kwargs)
        if func in WRITTEN:
            return WRITTEN[func](*args, **kwargs)
        if func is F.batch_norm:
            return self.counts.batch_norm(*args, **kwargs)
        if func is torch.Tensor.__float__ and asking_file() == BATCH_NORM:
            return self.counts.stand_in(args[0])
        if _is_grouped_product(func):
            x, weights, ends, bias, dtype = _given(NAMES, args, kwargs)
            plain = ends is not None and bias is None and dtype in (None, x.dtype)
            if plain and (x.dim(), weights.dim()) == (2, 3):
                return grouped_mm(x, weights, ends)
        if func in (torch.bincount, torch.Tensor.bincount):
            numbers, weights, least = _given(BINCOUNT, args, kwargs)
            if weights is None and least:
                places = torch.arange(least, device=numbers.device)
                return (within(numbers, least).unsqueeze(-1) == places).sum(0)
        return func(*args, **kwargs)


@functools.lru_cache(4096)
def _is_grouped_product(func: Any) -> bool:
    return str(func).removesuffix(".default") == HUGGING_FACE or compat.is_grouped_product(func)


BINCOUNT = (("input", "self"), ("weights",), ("minlength",))
NAMES = (("self", "input"), ("mat2", "weight"), ("offs",), ("bias",), ("out_dtype",))
"""What the operators call their arguments."""


def _given(arguments: tuple[tuple[str, ...], ...], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    given = [next((kwargs[n] for n in names if n in kwargs), None) for names in arguments]
    return [*args, *given[len(args) :]]
