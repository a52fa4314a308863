"""whole: what asks for a model's whole parameters is told how to get them."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar.errors import InputError
from fxpar.model.hugging_face import OF_WHOLE_MODELS
from fxpar.run import alone, storage
from fxpar.run.store import ParameterStore

SAMPLE = 1024
"""Elements of each tensor that a digest of many is made of."""
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


def digest_of(store: ParameterStore, state_dict: Mapping[str, Any]) -> str:
    """What is alike on ranks that load the same whole tensors: of all names, and of some elements of each."""
    if store.bound.kinds > 1:
        return "its own stages"
    made = hashlib.sha256()
    for name, t in state_dict.items():
        made.update(name.encode())
        if isinstance(t, Tensor) and not isinstance(t, DTensor) and t.numel() and t.device.type in ("cpu", "cuda"):
            flat = t.detach().reshape(-1)
            some = flat[:: -(-flat.numel() // SAMPLE)].contiguous().cpu()
            made.update(some.view(torch.uint8).numpy().tobytes())
    return f"{len(state_dict)} tensors of digest {made.hexdigest()[:12]}"
