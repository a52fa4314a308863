"""whole: what asks for a model's whole parameters is told how to get them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar.errors import InputError
from fxpar.model.hugging_face import OF_WHOLE_MODELS
from fxpar.run import alone, storage
from fxpar.run.store import ParameterStore

COMPILED = "a parallel module is compiled by its own backend: fxpar.parallelize(..., backend=\"inductor\")"


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
    """`forward`, which looks like that of the model; `torch.compile` of what calls it leaves it as it is."""

    def as_of_model(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    as_of_model.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    as_of_model.__doc__, as_of_model.__name__ = forward.__doc__, "forward"
    return torch.compiler.disable(as_of_model, reason=COMPILED)


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
