"""whole: what asks for a model's whole parameters is told how to get them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.errors import InputError, PlanError
from fxpar.model.hugging_face import OF_WHOLE_MODELS
from fxpar.run import alone, storage
from fxpar.run.store import ParameterStore


def method(function: Callable, name: str, what: str) -> Callable:
    """A method of the model, other than its forward, as it is called on a parallel module: on parameters in parts.

    Raises (that method): `InputError` if it is one that needs them whole, or mixes them with plain tensors.
    """
    call = f"model.{name}(...)"

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if name in OF_WHOLE_MODELS:
            raise InputError(f"{what}.{name} cannot run {alone.way_out(call)}")
        with alone.mixing_refused(f"{what}.{name}", call):
            return function(*args, **kwargs)

    return called


def with_signature(forward: Callable, model: nn.Module) -> Callable:
    """`forward`, which looks like that of the model."""

    def as_of_model(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    as_of_model.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    as_of_model.__doc__, as_of_model.__name__ = forward.__doc__, "forward"
    return as_of_model


def refuse_wrapping() -> None:
    """Raises: `PlanError` if what wants to know the parts of a parallel module is about to make it parallel, too."""
    frame, depth = sys._getframe(2), 0
    while frame is not None and depth < 24:
        if (name := frame.f_globals.get("__name__")) in compat.WRAPPERS:
            raise PlanError("model", "ParallelModule", f"is parallel already, and {name} is about to wrap it (which is also what "
                            "Accelerator.prepare and Fabric.setup do): gradients would be reduced twice",
                            "the parallel module as it is, or in a loop of Trainer, accelerate or Fabric what "
                            "fxpar.integrations has for it")
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]


def in_parts(store: ParameterStore, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Names -> tensors, whole ones cut into what ranks hold of these parameters; without those that other ranks hold."""
    sharding = {id(p): store.layouts[n] for n, p in store.model.named_parameters() if n in store.layouts}
    held = dict(store.model.named_parameters(remove_duplicate=False))

    def part(name: str, t: Any) -> Any:
        p = held.get(name)
        whole = isinstance(t, Tensor) and not isinstance(t, DTensor) and not t.is_meta
        if not whole or p is None or id(p) not in sharding or p.shape != t.shape:
            return t
        return storage.distribute(t, sharding[id(p)], store.bound, store.device)

    return {n: part(n, t) for n, t in state_dict.items() if n not in store.elsewhere}
