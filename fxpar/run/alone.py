"""alone: parts of a parallel module that are called by themselves, on parameters of which each rank has a part.

PyTorch refuses plain tensors beside DTensors. Here that is an error that says which call of the user's it was, and the way out.
A call of a part costs a frame more; programs call none.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxpar import compat
from fxpar.errors import InputError

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
    """From now on, calls of parts of `model` raise `InputError` where they mix plain tensors with DTensors."""
    for path, module in model.named_modules():
        if module is not model:
            compat.call_by(module, functools.partial(_called, module, f"{type(model).__name__}.{path}", f"model.{path}(...)"))


@contextlib.contextmanager
def unguarded(model: nn.Module) -> Iterator[None]:
    """Inside, they are called as ever: a trace sees nothing else."""
    for module in model.modules():
        compat.call_by(module, None)
    try:
        yield
    finally:
        guard(model)


def _called(module: nn.Module, what: str, call: str, *args: Any, **kwargs: Any) -> Any:
    with mixing_refused(what, call):
        return compat.call_plainly(module, *args, **kwargs)
