"""outputs: what a module returns where tp or cp splits it: DTensors that meet plain tensors as plain code expects.

Nothing is gathered that nobody reads: an output stays split as long as it is used by itself or along with other outputs. Where it
meets a plain tensor (labels, a mask, weights of a plain module), or becomes numbers of Python or numpy, it is gathered, by
all ranks that hold parts of it: they have to do the same with it, as with the module itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.backends.transport.control import Control, watch
from fxpar.errors import InputError

_NUMBERS = {Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__array__,
            Tensor.__index__, Tensor.cpu}
"""What takes a tensor to where no group of ranks is."""


_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or",
                                                         "xor", "lshift", "rshift"))}


_OF_WHOLE = {torch.nn.functional.cosine_embedding_loss}
"""Functions that DTensor computes wrongly of parts (torch 2.13: it subtracts a sum from 1 on each rank)."""

READ = ("what makes an output whole of which each rank has a part (a plain tensor beside it, or its numbers: where one rank "
        "alone reads it, have all ranks make it whole before: `logits = logits.full_tensor()`)")
"""What the ranks that read an output call, for those that do not."""


class Output(DTensor):
    """A DTensor whose operators take plain tensors beside it, too."""

    __slots__ = ()

    def full_tensor(self, **options: Any) -> Tensor:
        """As of any DTensor. Where the ranks of the world share it, they compare that all of them are here.

        Raises: `MismatchError`, on all ranks, if some call something else.
        """
        if self.device_mesh.size() == 1:
            return super().full_tensor(**options)
        control = Control()
        with control.watch.call(READ):
            if self.device_mesh.size() == control.world:
                control.agree(READ, {"shape": tuple(self.shape)})
            return super().full_tensor(**options)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with watch().waits("what an output is used for"), compat.no_torch_function():
            return pytree.tree_map_only(DTensor, as_output, _called(func, *_met(func, args, kwargs or {})))


class _CopiedOutput(Output, compat.CopiedPart):
    """A view of an output that is a copy: what is written to it is written to the output."""

    __slots__ = ()


def as_output(t: DTensor) -> DTensor:
    """The same tensor, as an `Output`."""
    if type(t) in _CLASSES:
        t.__class__ = _CLASSES[type(t)]
    return t


_CLASSES: dict[type, type] = {DTensor: Output, compat.CopiedPart: _CopiedOutput}


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    """What the function returns, of parts where DTensor can, and otherwise of whole tensors."""
    if func not in _OF_WHOLE:
        try:
            return compat.call_on_parts(func, args, kwargs)
        except (RuntimeError, NotImplementedError, AssertionError):
            if func is Tensor.backward or _written(func, args, kwargs) is not None:
                raise
    args, kwargs = pytree.tree_map_only(Output, lambda t: t.full_tensor(), (args, kwargs))
    return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What the function writes to, None if to nothing."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return args[0] if args and in_place else kwargs.get("out")


def _met(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, with whole tensors in the place of outputs if they meet plain ones.

    Raises: `InputError` for what would write to an output that then is a copy.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if func not in _NUMBERS and not any(isinstance(t, Tensor) and not isinstance(t, DTensor) for t in leaves):
        return args, kwargs
    if isinstance(_written(func, args, kwargs), Output):
        raise InputError(f"{getattr(func, '__name__', func)} writes plain tensors to an output that ranks hold parts of; take "
                         "all of it first: output = output.full_tensor()")
    return pytree.tree_map_only(Output, lambda t: t.full_tensor(), (args, kwargs))
