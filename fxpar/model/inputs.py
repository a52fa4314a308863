"""Inputs: one canonical form of a call, its signature, and its parts per rank."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxpar.errors import CaptureError, InputError
from fxpar.model.containers import know
from fxpar.sharding.mesh import Mesh

Call = tuple[tuple, dict[str, Any]]
SIMPLE = (int, float, str, bool, type(None))


def canonical(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Call:
    """The call with positional arguments given their names, in the order of `forward`'s signature.

    Arguments left at a default of None are dropped. Raises `InputError` where the arguments do not fit `forward`.
    """
    parameters = _parameters(model.forward)
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward{parameters}: {error}") from error
    kinds = {n: p.kind for n, p in parameters.parameters.items()}
    if any(k in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY) and n in bound.arguments
           for n, k in kinds.items()):
        know((args, dict(kwargs)))
        _require_dense({**dict(enumerate(args)), **kwargs})
        return tuple(args), dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif value is not None:
            named[name] = value
    know(named)
    _require_dense(named)
    return (), named


def _require_dense(named: Mapping[Any, Any]) -> None:
    """Raises: `InputError` for numbers that no program takes: sparse and nested tensors, and those of numpy."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                raise InputError(f"input {name!r} is a tensor of the layout {value.layout}, of which ranks cannot take parts: "
                                 "pass it dense (to_dense(), torch.nested.to_padded_tensor), or its indices and values")
        elif type(value).__module__ == "numpy" and not isinstance(value, float):
            raise InputError(f"input {name!r} is of numpy ({type(value).__name__}): pass torch.as_tensor(x), or float(x) or "
                             "int(x) of a single number")


def require_dense_state(model: nn.Module) -> None:
    """Raises: `CaptureError` for a parameter or buffer of a layout of which ranks cannot take parts: sparse ones and MKL-DNN's;
    and for one of a lazy module, which has no shape yet."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if nn.parameter.is_lazy(tensor):
                raise CaptureError(f"{kind} {name!r} of a lazy module, which has no shape before the first call", None,
                                   "call the model once, with inputs of the right shapes, before it is made parallel")
            if tensor.layout is not torch.strided:
                raise CaptureError(f"{kind} {name!r} of the layout {tensor.layout}, of which ranks cannot take parts", None,
                                   "keep it dense (to_dense()), or keep its indices and values as buffers of their own, and "
                                   "compute with those in the forward (index_select and index_add)")


_methods: weakref.WeakKeyDictionary[Callable, inspect.Signature] = weakref.WeakKeyDictionary()


def _parameters(forward: Callable) -> inspect.Signature:
    """`inspect.signature`, which takes as long as starting many kernels: remembered for methods."""
    if not inspect.ismethod(forward):
        return inspect.signature(forward)
    if forward.__func__ not in _methods:
        _methods[forward.__func__] = inspect.signature(forward)
    return _methods[forward.__func__]


def example_call(model: nn.Module, example: Any) -> Call:
    """The canonical call of `example_inputs` (a dict, a tuple, one tensor; None: what the model says it takes).

    Raises: `InputError`; `CaptureError` for a model that holds what no program takes (see `require_dense_state`).
    """
    require_dense_state(model)
    if example is None:
        return default_example(model)
    if isinstance(example, Mapping):
        return canonical(model, (), example)
    return canonical(model, tuple(example) if isinstance(example, tuple | list) else (example,), {})


def default_example(model: nn.Module) -> Call:
    """Inputs that a Hugging Face model says it takes; `InputError` for a model that does not say."""
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        raise InputError(f"{type(model).__name__} does not say what it takes: pass example_inputs (a dict of keyword "
                         "arguments, or a tuple), with the shapes that one rank will pass to forward")
    return canonical(model, (), {k: v for k, v in dummy.items() if isinstance(v, torch.Tensor)})


def leaves(call: Call) -> dict[str, Any]:
    """Path -> leaf: "input_ids", "0", "batch.mask"; the paths that capture names its inputs by."""
    args, kwargs = call
    if not args and all(isinstance(v, torch.Tensor) for v in kwargs.values()):
        return dict(kwargs)  # as most calls are: the same, sooner
    out = {}
    for tree in (args, kwargs):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            out[".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)] = leaf
    return out


def signature(named: Mapping[str, Any]) -> tuple:
    """What a captured program depends on, of a call's `leaves`: structure, shapes, dtypes, which of them want gradients, the
    values of those that are no tensors."""
    parts: list[tuple] = []
    for path, leaf in named.items():
        if isinstance(leaf, torch.Tensor):
            parts.append((path, tuple(leaf.shape), leaf.dtype, leaf.requires_grad))
        else:
            parts.append((path, leaf if isinstance(leaf, SIMPLE) else described(leaf)))
    return tuple(parts)


def structure(call: Call) -> tuple[str, ...]:
    """What `signature` needs besides leaves, where a call has more than tensors and simple values: which containers they are in,
    and values that PyTorch's pytrees take for a part of those (`register_constant`)."""
    if all(isinstance(v, (torch.Tensor, *SIMPLE)) for part in (call[0], call[1].values()) for v in part):
        return ()
    return (str(pytree.tree_structure(call)),)


def described(value: Any) -> str:
    """A text that is alike for alike values, on every rank; of what has none, and is no input of programs, its kind."""
    known = type(value).__repr__ is not object.__repr__ and not callable(value)
    return repr(value) if known else f"a {type(value).__module__}.{type(value).__qualname__}"


def globalize(call: Call, mesh: Mesh, batch: Mapping[str, int | None]) -> Call:
    """A replica's call -> meta tensors of the global one: batch dims are multiplied by dp.

    batch: input path -> batch dim (None for inputs that have none).
    """
    n = mesh.size(*mesh.axes("dp"))

    def resized(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape, dim = list(leaf.shape), batch.get(path)
        if dim is not None:
            shape[dim] *= n
        return torch.empty(shape, dtype=leaf.dtype, device="meta").requires_grad_(leaf.requires_grad)

    args, kwargs = call
    flat = iter([resized(p, v) for p, v in leaves(call).items()])
    return pytree.tree_map(lambda _: next(flat), (args, kwargs))
