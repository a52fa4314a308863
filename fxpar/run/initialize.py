"""Initialising a model that was built on the meta device, with the values that one device would have drawn.

The model's own initialisation is run once with every parameter on meta, while a tape notes what it does to each of
them; random operators are carried out on a throw-away tensor, so that the generator advances as it would have. Then
each parameter's part of the tape is played on its own, from the generator's state at that moment: only
one full parameter is in memory at a time, and each rank keeps its part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxpar import compat
from fxpar.sharding.layout import Sharding, take
from fxpar.sharding.mesh import BoundMesh

SMALL = 2**20
"""Elements up to which a parameter's value from the constructor is kept while it is on meta."""


def init_weights(model: nn.Module, seed: int, shardings: dict[str, Sharding], mesh: BoundMesh, device: torch.device,
                 elsewhere: Collection[str] = ()) -> None:
    """Fill `model`'s parameters (DTensors) and its meta buffers as ``torch.manual_seed(seed)`` and the model's own
    initialisation on a CPU would.

    Its own initialisation is: construction from its `config` for Hugging Face models; its `init_weights()` if it has
    one; else `reset_parameters()` of every submodule, in order. The caller's generator is left as it was.
    elsewhere: parameters for which meta tensors stand, as other ranks hold them.
    Raises: ValueError for a parameter or buffer that it does not fill.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tape = _Tape()
        fresh = _initialize(model, tape)
        for name, made in fresh.named_parameters():
            if name in elsewhere:
                continue
            slot = _slot(model, name)
            value = tape.play(made)
            if value is None or (value.is_floating_point() and value.isnan().any()):
                raise ValueError(f"the model's own initialisation does not fill parameter {name}: give its module a "
                                 "reset_parameters(), or the model an init_weights(), that does; or load a checkpoint")
            part = take(value, shardings[name], mesh.mesh, mesh.rank)
            compat.local_part(slot[0][slot[1]]).copy_(part)
        for name, buffer in fresh.named_buffers():
            table, key = _slot(model, name)
            value = tape.play(buffer) if buffer.is_meta else buffer
            if value is not None and table[key] is not value:
                table[key] = value.to(device)
    for name, b in model.named_buffers():
        if b.is_meta:
            raise ValueError(f"buffer {name} is on the meta device and the model's own initialisation does not fill it; "
                             "build the model on the CPU, or load a checkpoint that has it")


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def _initialize(model: nn.Module, tape: _Tape) -> nn.Module:
    """Run the model's own initialisation under `tape`; the module whose parameters it ran on."""
    if hasattr(model, "config") and hasattr(type(model), "_from_config"):
        with _parameters_on_meta(tape), _tracing(tape):
            return type(model)(model.config)
    fresh: Any = _on_meta(model)
    with _tracing(tape):
        if callable(getattr(type(model), "init_weights", None)):
            fresh.init_weights()
        else:
            for module in fresh.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
    return fresh


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the module tree with plain meta parameters in place of the DTensors, ties kept."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        memo[id(p)].__dict__.update(p.__dict__)  # an initialisation may ask for attributes
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _parameters_on_meta(tape: _Tape) -> Iterator[None]:
    """Parameters registered inside land on meta; buffers stay real, and so do the values of small parameters, which a
    constructor may have set (a temperature, a class token)."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            given = param.detach()
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
            if given.numel() <= SMALL:
                tape.given[id(param)] = given
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _tracing(tape: _Tape) -> Iterator[None]:
    """Inside, initialisation is recorded, of meta tensors, too, that it would leave alone."""
    with compat.trunc_normal_as(tape.record_fill), _NotMeta(), tape:
        yield


class _NotMeta(TorchFunctionMode):
    """No tensor says that it is on meta: `orthogonal_` and others skip those that do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_meta: Any = torch.Tensor.is_meta
        if func == is_meta.__get__:
            return False
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """Notes every operator on meta tensors, grouped by the tensors it connects."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, list[int], Tensor | None]] = []
        self.group: dict[int, int] = {}
        self.alive: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        metas = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
        if not metas:
            return func(*args, **kwargs)
        state = None
        if compat.is_random(func):
            state = torch.get_rng_state()
            real_args, real_kwargs = pytree.tree_map_only(Tensor, _scratch, (args, kwargs))
            func(*real_args, **_on_cpu(real_kwargs))
        out = func(*args, **kwargs)
        outs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        ids = [self._track(t) for t in outs]
        for t in [*metas, *outs]:
            self._join(self._track(metas[0]), self._track(t))
        refs = pytree.tree_map_only(Tensor, lambda t: _Ref(self._track(t)) if t.is_meta else t, (args, kwargs))
        self.entries.append((func, *refs, ids, state))
        return out

    def record_fill(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Record a random function that fills `tensor` as one operator."""
        if tensor.device.type != "meta":
            return function(tensor, *args, **kwargs)
        state = torch.get_rng_state()
        function(_scratch(tensor), *args, **kwargs)
        self.entries.append((function, (_Ref(self._track(tensor)), *args), kwargs, [id(tensor)], state))
        return tensor

    def _track(self, t: Tensor) -> int:
        self.alive[id(t)] = t
        self.group.setdefault(id(t), id(t))
        return id(t)

    def _find(self, i: int) -> int:
        while self.group[i] != i:
            i = self.group[i]
        return i

    def _join(self, a: int, b: int) -> None:
        self.group[self._find(b)] = self._find(a)

    def play(self, parameter: Tensor) -> Tensor | None:
        """The value that initialisation gives `parameter`; None if it does nothing to it."""
        if id(parameter) not in self.group:
            return self.given.get(id(parameter))
        mine = self._find(id(parameter))
        values: dict[int, Tensor] = {}

        def real(ref: _Ref) -> Tensor:
            if ref.id not in values:
                values[ref.id] = _scratch(self.alive[ref.id])
                if ref.id in self.given:
                    values[ref.id].copy_(self.given[ref.id])
                elif values[ref.id].is_floating_point():
                    values[ref.id].fill_(torch.nan)  # what is never written, or read before, shows
            return values[ref.id]

        for func, args, kwargs, ids, state in self.entries:
            if self._find(ids[0]) != mine:
                continue
            args, kwargs = pytree.tree_map_only(_Ref, real, (args, kwargs))
            if state is not None:
                torch.set_rng_state(state)
            out = func(*args, **_on_cpu(kwargs))
            for i, t in zip(ids, [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)], strict=True):
                values.setdefault(i, t)
        return values.get(id(parameter))


class _Ref:
    """Stands for a meta tensor in the tape's arguments."""

    def __init__(self, id: int):
        self.id = id


def _scratch(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if t.device.type == "meta" else t


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
