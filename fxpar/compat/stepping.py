"""stepping: where optimizers that go element by element hand over what they step: parameters, gradients, state and numbers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NAMES = ("adadelta", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd")
"""Functions of torch.optim that compute each element of a parameter from the same element of its gradient and its state, and from
numbers. Every class calls the one of its module; AdamW calls Adam's."""

Lists = list[list[Any]]
"""What is stepped: parameters, then their gradients, then their state, kind by kind, with None for what is still to be made. A
list may be empty."""
Stepper = Callable[[Callable[..., None], Lists, dict[str, Any]], None]


@functools.cache
def step_elements_by(stepper: Stepper) -> None:
    """From now on ``stepper(function, lists, options)`` is called in this process where an optimizer would call
    ``function(*lists, **options)`` for a group whose first parameter is a DTensor. Once is enough."""
    for name in NAMES:
        module = importlib.import_module(f"torch.optim.{name}")
        setattr(module, name, _handing_over(getattr(module, name), stepper))


def _handing_over(function: Callable[..., None], stepper: Stepper) -> Callable[..., None]:
    @functools.wraps(function)
    def step(*given: Any, **options: Any) -> None:
        if (torch.compiler.is_compiling() or options.get("differentiable") or not given or not given[0]
                or not isinstance(given[0][0], DTensor) or not all(isinstance(x, list) for x in given)):
            function(*given, **options)
        else:
            stepper(function, [*given], options)

    return step


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each DTensor, itself and not detached; other tensors as they are."""
    return [x._local_tensor if isinstance(x, DTensor) else x for x in tensors]


def splits(tensors: Sequence[Tensor | None]) -> list[Any]:
    """How each DTensor is split, of which shape and dtype; of what is none its type. Two lists are compared quickly as long as
    it is mostly the same objects."""
    return [x._spec if isinstance(x, DTensor) else type(x) for x in tensors]


def has_parts(x: Any) -> bool:
    """Whether a DTensor is one of which ranks have parts, or copies, and no terms of a sum."""
    return isinstance(x, DTensor) and not any(place.is_partial() for place in x._spec.placements)


def goes_with(others: Sequence[Any], split: Sequence[Any]) -> bool:
    """Whether tensors are split as these are, one by one, or are numbers, such as counts of steps, or still to be made."""
    return len(others) == len(split) and all(
        (x._spec is y._spec or (x._spec.placements == y._spec.placements and x._spec.mesh == y._spec.mesh and x.shape == y.shape))
        if isinstance(x, DTensor) else x is None or x.dim() == 0 for x, y in zip(others, split, strict=True))
