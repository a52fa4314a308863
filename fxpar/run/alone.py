"""alone: parts of a parallel module that are called by themselves, on parameters of which each rank has a part.

PyTorch refuses plain tensors beside DTensors. Here that is an error that says which call of the user's it was, and the way out.
A call of a part costs a frame more; programs call none. What makes models parallel by itself is refused for parts, too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxpar import compat
from fxpar.errors import InputError, PlanError
from fxpar.model.reads import LISTED

_calls = threading.local()


@contextlib.contextmanager
def mixing_refused(what: str, call: str) -> Iterator[None]:
    """Around what may mix plain tensors with DTensors. what: is called, as ``call`` on the plain model.

    Raises: `InputError` where it does; where one such call is inside of another, this names the outer one.
    """
    if getattr(_calls, "inside", False):
        yield
        return
    _calls.inside = True
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise InputError(f"{what} mixes plain tensors with parameters, and cannot run {way_out(call)}") from error
    finally:
        _calls.inside = False


def way_out(call: str) -> str:
    return (f"on parameters of which each rank has a part; write `with module.gathered() as model: {call}` on all ranks: inside, "
            "the plain model is there, whole (rank0_only=True, offload=\"cpu\" where no GPU holds it; write_back=True for "
            "changes to stay); for what is to be trained, have the model's forward call it")


def guard(model: nn.Module) -> None:
    """From now on, calls of parts of `model`, compiled ones, too, raise `InputError` where they mix plain tensors with DTensors;
    and what would make a part parallel by itself raises `PlanError`."""
    called = torch.compiler.disable(_called)
    for path, module in model.named_modules():
        if module is not model:
            name = f"{type(model).__name__}.{path}"
            compat.call_by(module, functools.partial(called, module, name, f"model.{path}(...)"))
            module.__dict__[LISTED] = _Listed(module, name)


@contextlib.contextmanager
def unguarded(model: nn.Module) -> Iterator[None]:
    """Inside, they are called as ever: a trace sees nothing else."""
    for module in model.modules():
        compat.call_by(module, None)
        if isinstance(module.__dict__.get(LISTED), _Listed):
            del module.__dict__[LISTED]
    try:
        yield
    finally:
        guard(model)


class _Listed:
    """``part.named_modules()`` of a part of a parallel module: what makes a module parallel begins with it. A copy or pickle of
    the part has the plain method in its place."""

    def __init__(self, part: nn.Module, name: str):
        self._part, self._name = part, name

    def __call__(self, memo: Any = None, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        if memo is None:  # it is asked for this part, and not for one that holds it
            refuse_wrapping(f"{self._name} of a ParallelModule")
        return type(self._part).named_modules(self._part, memo, *args, **kwargs)

    def __reduce__(self) -> Any:
        return types.MethodType, (type(self._part).named_modules, self._part)


def refuse_wrapping(what: str) -> None:
    """Raises: `PlanError` if what asks for the parts of a parallel module is about to make it parallel, too."""
    frame, depth = sys._getframe(2), 0
    while frame is not None and depth < 24:
        if (name := frame.f_globals.get("__name__")) in compat.WRAPPERS:
            raise PlanError("model", what, f"is parallel already, and {name} is about to wrap it (which is also what "
                            "Accelerator.prepare and Fabric.setup do): gradients would be reduced twice",
                            "what fxpar.integrations has for Trainer, accelerate and Fabric, or the parallel module as it is: "
                            "give prepare or setup the optimizer and the data loader alone")
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]


def _called(module: nn.Module, what: str, call: str, *args: Any, **kwargs: Any) -> Any:
    with mixing_refused(what, call):
        return compat.call_plainly(module, *args, **kwargs)
