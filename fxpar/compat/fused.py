"""fused: an optimizer's fused step of DTensors is one of the ranks' parts, which it reads and writes element by element.

DTensor's own way to it asks of every tensor of every list how it is split, and makes new ones: several times as long as the step
takes otherwise, for hundreds of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NAMES = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")


@functools.cache
def step_parts_directly() -> None:
    """From now on fused steps of DTensors that are split alike go to their parts at once, in this process; others go the way of
    DTensor."""
    for name in NAMES:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            _handlers()[getattr(packet, overload)] = _on_parts


def _handlers() -> dict[Any, Any]:
    return DTensor._op_dispatcher._custom_op_handlers


def _on_parts(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = *args, *kwargs.values()
    lists = [x for x in given if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    numbers = all(_is_split(x) for x in given if isinstance(x, DTensor))  # a rate, a scale: whole on each rank
    if numbers and lists and all(_is_split(x) for x in lists[0]) and all(_goes_with(x, lists[0]) for x in lists):
        return operator(*map(_parts, args), **{name: _parts(x) for name, x in kwargs.items()})
    handlers = _handlers()
    del handlers[operator]
    try:
        return operator(*args, **kwargs)
    finally:
        handlers[operator] = _on_parts


def _is_split(x: Any) -> bool:
    """Whether ranks have parts of it, or copies, and no terms of a sum."""
    return isinstance(x, DTensor) and not any(place.is_partial() for place in x._spec.placements)


def _goes_with(others: Sequence[Any], split: Sequence[Any]) -> bool:
    """Whether tensors are split as these are, one by one, or are numbers, such as counts of steps."""
    return len(others) == len(split) and all(
        (x._spec is y._spec or (x._spec.placements == y._spec.placements and x._spec.mesh == y._spec.mesh and x.shape == y.shape))
        if isinstance(x, DTensor) else x.dim() == 0 for x, y in zip(others, split, strict=True))


def _parts(given: Any) -> Any:
    if isinstance(given, list | tuple):
        return [x._local_tensor if isinstance(x, DTensor) else x for x in given]
    return given._local_tensor if isinstance(given, DTensor) and not given.dim() else given
