"""attributes: what a forward leaves behind in the attributes of modules, and in the lists and dicts that they hold.

While a model is captured it stores tensors that have no values. `recorded_attributes` makes them outputs of the trace and puts
the attributes back as they were; `put_back` stores, after a call, what the forward would have stored.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.passes.traced import Traced

SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
OWN = {"_parameters", "_buffers", "_modules", "forward"}
"""Entries of a module's dict that are no attributes of its author's."""
DEPTH = 3
WAY_OUT = "return it from forward, or keep a tensor in a buffer (register_buffer)"

Holder = dict | list
Place = tuple[Holder, Any]


@dataclass(frozen=True)
class Made:
    """Stands for the tensor that is the i-th output beside the model's own."""

    index: int


@dataclass
class Write:
    """A forward's assignment ``holder[key] = value``, or, where key is None, ``holder.extend(value)``.

    value: lists, tuples and dicts of Python values, of tensors that the model has, and of `Made`. before: what was there.
    """

    name: str
    holder: Holder
    key: Any
    value: Any
    before: Any = None


@dataclass
class Recorded:
    """What one forward left behind, as far as it differs from what was there; `names` of the outputs that are beside the model's
    own (None: a mark). places: where attributes hold tensors, by their ids, and what those places are called."""

    writes: list[Write] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    places: dict[int, tuple[str, Place]] = field(default_factory=dict)


@contextlib.contextmanager
def recorded_attributes(model: nn.Module, traced: Traced) -> Iterator[Recorded]:
    """Inside, the model's forward returns its outputs and a tuple of tensors: those that it stores, then the marks of hooks;
    hooks around it do not run.

    Afterwards: attributes are as they were. Raises: `CaptureError` for what cannot be stored again.
    """
    record = Recorded()
    original: Callable = model.forward
    mine = model.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = _snapshot(model)
        traced.given = {id(t) for t in pytree.tree_leaves((args, kwargs))}
        record.places = {id(t): (f"{h.name}.{key}", (h.holder, key)) for h in before for key, t in h.entries() if
                         isinstance(t, Tensor)}
        parts = _parts(model)
        try:
            out = original(*args, **kwargs)
            if parts != _parts(model):
                raise CaptureError("a forward that adds, replaces or removes parameters or submodules", None,
                                   "do so before, and call fxpar.parallelize afterwards")
            tensors: list[Tensor] = []
            record.writes = [w for h in before for w in h.written(tensors)]
            record.names = [w.name for w in record.writes for _ in _made(w.value)]
        finally:
            for h in before:
                h.restore()
        record.names += [None] * len(traced.hooks)
        return out, (*tensors, *traced.hooks)

    model.__dict__["forward"] = forward
    try:
        with compat.without_forward_hooks(model):
            yield record
    finally:
        del model.__dict__["forward"]
        if mine is not None:
            model.__dict__["forward"] = mine


def put_back(writes: list[Write], tensors: list[Tensor]) -> None:
    """Store what a forward stores; `tensors` are those that `Made` stands for."""
    for write in writes:
        value = _filled(write.value, tensors)
        if write.key is None:
            write.holder.extend(value)  # type: ignore[union-attr]
        else:
            write.holder[write.key] = value


def _filled(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, Made):
        return tensors[tree.index]
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(x, tensors) for x in tree)
    return {k: _filled(v, tensors) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _made(tree: Any) -> list[Made]:
    if isinstance(tree, Made):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [m for x in items for m in _made(x)]


def _parts(model: nn.Module) -> list[Any]:
    return [(id(m), {k: id(p) for k, p in m._parameters.items()}, {k: id(c) for k, c in m._modules.items()})
            for m in model.modules()]


class _Held:
    """A dict or list that the model holds, and what was in it."""

    def __init__(self, name: str, holder: Holder, skip: Callable[[Any], bool] = lambda key: False):
        self.name, self.holder, self.skip = name, holder, skip
        self.before: Any = self.now()

    def now(self) -> Any:
        if isinstance(self.holder, dict):
            return {k: v for k, v in self.holder.items() if not self.skip(k)}
        return list(self.holder)

    def entries(self) -> list[tuple[Any, Any]]:
        return list(self.before.items() if isinstance(self.before, dict) else enumerate(self.before))

    def restore(self) -> None:
        if isinstance(self.holder, dict):
            for key in [k for k in self.now() if k not in self.before]:
                del self.holder[key]
            self.holder.update(self.before)
        else:
            self.holder.clear()
            self.holder.extend(self.before)

    def written(self, tensors: list[Tensor]) -> list[Write]:
        """The writes that make what is there of what was; `tensors` grows by those that were made."""
        if isinstance(self.holder, dict):
            gone = [k for k in self.before if k not in self.holder]
            if gone:
                raise CaptureError(f"a forward that deletes {self.name}.{gone[0]}", None, WAY_OUT)
            changed = [(k, v) for k, v in self.now().items() if not _same(self.before.get(k, tensors), v)]
            return [self._write(k, v, tensors) for k, v in changed]
        count = len(self.before)
        if len(self.holder) == count and all(map(_same, self.before, self.holder)):
            return []
        if len(self.holder) < count or not all(map(_same, self.before, self.holder)):
            raise CaptureError(f"a forward that changes the list {self.name}, other than by appending", None, WAY_OUT)
        return [Write(self.name, self.holder, None, [self._template(self.name, v, tensors) for v in list(self.holder)[count:]])]

    def _write(self, key: Any, value: Any, tensors: list[Tensor]) -> Write:
        name = f"{self.name}.{key}"
        return Write(name, self.holder, key, self._template(name, value, tensors), self.before.get(key))

    def _template(self, name: str, value: Any, tensors: list[Tensor]) -> Any:
        if isinstance(value, Tensor) and (isinstance(value, compat.FakeTensor) or value.requires_grad):
            if isinstance(value, nn.Parameter):
                raise CaptureError(f"a forward that stores a parameter in {name}", None, "store it before")
            tensors.append(value)
            return Made(len(tensors) - 1)
        if isinstance(value, Tensor | SIMPLE):
            return value
        if type(value) in (list, tuple):
            return type(value)(self._template(name, v, tensors) for v in value)
        if type(value) is dict:
            return {k: self._template(name, v, tensors) for k, v in value.items()}
        raise CaptureError(f"a forward that stores an object of type {type(value).__name__} in {name}", None,
                           "store tensors, Python numbers and strings, or lists, tuples and dicts of them, or " + WAY_OUT)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, SIMPLE):
        return a == b or (a != a and b != b)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is dict and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)


def _snapshot(model: nn.Module) -> list[_Held]:
    """Every module's attributes, and what they hold: dicts, lists, and the attributes of plain objects."""
    found: dict[int, _Held] = {}

    def hold(name: str, value: Any, depth: int) -> None:
        if id(value) in found or depth > DEPTH:
            return
        if isinstance(value, dict | list | deque):
            found[id(value)] = _Held(name, value)  # type: ignore[arg-type]
            for key, item in found[id(value)].entries():
                hold(f"{name}.{key}", item, depth + 1)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                hold(f"{name}.{i}", item, depth + 1)
        elif _is_plain(value):
            hold(name, vars(value), depth + 1)

    for path, module in model.named_modules():
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        found[id(module.__dict__)] = held = _Held(name, module.__dict__, _is_own)
        for key, value in held.entries():
            hold(f"{name}.{key}", value, 1)
    return list(found.values())


def _is_own(key: str) -> bool:
    return key in OWN or "_hooks" in key


def _is_plain(value: Any) -> bool:
    """Whether it is an instance of a class of Python's that keeps its state in attributes, and no module's or torch's."""
    if isinstance(value, nn.Module | type | Tensor | functools.partial) or callable(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not type(value).__module__.startswith(("torch", "builtins"))
