"""Grouped matrix products (mixtures of experts), traced as one operator that can be differentiated and compiled."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from fxpar import compat
from fxpar.ops.grouped_mm import grouped_mm

HUGGING_FACE = "transformers.grouped_mm_fallback"
"""What Hugging Face's models call where they do not trust PyTorch's. Its backward reads the groups into Python."""


class GroupedProducts(TorchFunctionMode):
    """Inside, rows in groups times a matrix each are `fxpar.ops.grouped_mm`, whether PyTorch's or Hugging Face's is called.

    PyTorch's remains in its other forms (groups along another dim, a bias, a result of another dtype). Where it has no kernel
    (other dtypes than bf16, and CPUs) it cannot be traced; where it has one, it wants operands that lie as eager programs lay
    them, which a compiler does not know. Values are the same but for the rows after the last group, which are zero here where
    they may have been anything.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).removesuffix(".default") == HUGGING_FACE or compat.is_grouped_product(func):
            x, weights, ends, bias, dtype = _operands(args, kwargs)
            plain = ends is not None and bias is None and dtype in (None, x.dtype)
            if plain and (x.dim(), weights.dim()) == (2, 3):
                return grouped_mm(x, weights, ends)
        return func(*args, **kwargs)


NAMES = (("self", "input"), ("mat2", "weight"), ("offs",), ("bias",), ("out_dtype",))
"""What the two operators call their arguments."""


def _operands(args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    given = [next((kwargs[n] for n in names if n in kwargs), None) for names in NAMES]
    return [*args, *given[len(args) :]]
