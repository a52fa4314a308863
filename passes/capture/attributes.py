"""attributes: what a forward leaves behind in the attributes of modules, and in the lists and dicts that they hold.

While a model is captured it stores tensors that have no values. `recorded_attributes` makes them outputs of the trace and puts
the attributes back as they were; `put_back` stores, after a call, what the forward would have stored.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.model.containers import know
from fxpar.passes.capture.traced import TraceGuard
from fxpar.program import Program
from fxpar.sharding.facts import sharding_at

SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
OWN = {"_parameters", "_buffers", "_modules", "forward"}
"""Entries of a module's dict that are no attributes of its author's."""
DEPTH = 3
WAY_OUT = "return it from forward, or keep a tensor in a buffer (register_buffer)"

Holder = dict | list
AttributePlace = tuple[Holder, Any]


@dataclass(frozen=True)
class Made:
    """Stands for the tensor that is the i-th output beside the model's own."""

    index: int


@dataclass
class Write:
    """A forward's assignment ``holder[key] = value``, or, where key is None, ``holder.extend(value)``.

    value: lists, tuples and dicts of Python values, of tensors that the model has, and of `Made`. read: whether the forward may
    have looked at what was there before.
    """

    name: str
    holder: Holder
    key: Any
    value: Any
    read: bool = True


@dataclass
class Recorded:
    """What one forward left behind, as far as it differs from what was there; `names` of the outputs that are beside the model's
    own (None: a mark). places: where attributes hold tensors, by their ids. holders: where the model keeps what it holds."""

    writes: list[Write] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    places: dict[int, AttributePlace] = field(default_factory=dict)
    holders: list[Holder] = field(default_factory=list)

    def held(self) -> list[list[Any]]:
        """What is in the model's dicts, lists and attributes now, keys included."""
        return [[*h, *h.values()] if isinstance(h, dict) else list(h) for h in self.holders]


@contextlib.contextmanager
def recorded_attributes(model: nn.Module, traced: TraceGuard, watch: bool = True) -> Iterator[Recorded]:
    """Inside, the model's forward returns its outputs and a tuple of tensors: those that it stores, then the marks in it;
    hooks around it do not run. watch: see what it reads; otherwise (Dynamo traces no watched module) it may have read everything.

    Afterwards: attributes are as they were. Raises: `CaptureError` for what cannot be stored again.
    """
    record = Recorded()
    original: Callable = model.forward
    own = {k: v for k, v in model.__dict__.items() if k == "forward"}
    before = _snapshot(model)
    record.holders = [h.holder for h in before]
    record.places = {id(t): (h.holder, key) for h in before for key, t in h.entries() if isinstance(t, Tensor)}

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        traced.given = {id(t) for t in pytree.tree_leaves((args, kwargs))}
        parts, buffers = _parts(model), [(m, dict(m._buffers)) for m in model.modules()]
        tensors: list[Tensor] = []
        try:
            with _watched({id(h.holder): h for h in before}) if watch else contextlib.nullcontext():
                out = original(*args, **kwargs)
            know(out)
            if parts != _parts(model):
                raise CaptureError("a forward that adds, replaces or removes parameters or submodules", None,
                                   "do so before, and call fxpar.parallelize afterwards")
            record.writes = [w if watch else replace(w, read=True) for h in before for w in h.written(tensors)]
            record.names = [w.name for w in record.writes for _ in _made(w.value)]
        finally:
            for h in before:
                h.restore()
        for module, table in buffers:
            _write_buffers(module, table)
        record.names += [None] * len(traced.marks)
        return out, (*tensors, *traced.marks)

    model.__dict__["forward"] = forward
    try:
        with compat.without_forward_hooks(model):
            yield record
    finally:
        del model.__dict__["forward"]
        model.__dict__.update(own)
        for h in before:
            h.restore()


def _write_buffers(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Write to the buffers that were there what those hold that took their places."""
    for name, value in list(module._buffers.items()):
        old = before.get(name)
        if value is old:
            continue
        if value is None or old is None or (value.shape, value.dtype) != (old.shape, old.dtype):
            raise CaptureError(f"a forward that replaces the buffer {name} of {type(module).__name__} by one of another shape or "
                               "dtype", None, "register a buffer of the shape that it is to have, and write to that")
        with torch.no_grad():
            old.copy_(value)
        module._buffers[name] = old


@contextlib.contextmanager
def _watched(by_table: dict[int, _Attributes]) -> Iterator[None]:
    """Inside, modules' `_Attributes` know which of their attributes were read as they had been."""

    def getattribute(module: nn.Module, name: str) -> Any:
        value = before(module, name)
        mine = by_table.get(id(object.__getattribute__(module, "__dict__")))
        if mine is not None and name in mine.before and mine.before[name] is value:
            mine.read.add(name)
        return value

    def absent(module: nn.Module, name: str) -> Any:
        mine = by_table.get(id(module.__dict__))
        if mine is not None:
            mine.read.add(name)
        return original(module, name)

    original, before, own = nn.Module.__getattr__, nn.Module.__getattribute__, vars(nn.Module).get("__getattribute__")
    nn.Module.__getattribute__, nn.Module.__getattr__ = getattribute, absent  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        if own is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = own  # type: ignore[method-assign]


class AttributeStates:
    """The places that the forwards of a model write or read besides parameters and buffers, as far as its programs show."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, Any], AttributePlace] = {}
        self._split: dict[tuple[int, Any], str] = {}
        self._numbers: dict[tuple, Any] = {}

    def state(self) -> tuple:
        """What a program depends on, of what is there now: Python values, the shapes of tensors, the lengths of lists."""
        return tuple([_described(holder, key) for holder, key in self._places.values()])

    def add(self, program: Program, call: tuple) -> None:
        """Know the places of a program that was captured for `call`.

        Raises: `CaptureError` where the next call would not be as this one (a counter), and where a forward reads a tensor of
        which ranks hold parts.
        """
        parts = {s.name for s, n in zip(program.tensor_sinks(), program.outputs(), strict=True)
                 if s.kind == "attribute" and any(p.axes for dim in sharding_at(n) for p in dim)}
        for write in program.writes:
            place = id(write.holder), write.key
            if write.read:
                self._places[place] = write.holder, write.key
            if write.name in parts:
                self._split[place] = write.name
            if isinstance(write.value, SIMPLE):
                if not _same(self._numbers.setdefault((call, *place), write.value), write.value):
                    raise CaptureError(f"a forward that changes {write.name} at every call (it is {write.value!r} now)", None,
                                       "keep a tensor in a buffer (register_buffer), or count outside of forward")
        for source in program.sources:
            if source.place is not None:
                holder, key = source.place
                self._places[id(holder), key] = holder, key
        wrong = [name for place, name in self._split.items() if any(
            s.place is not None and (id(s.place[0]), s.place[1]) == place for s in program.sources)]
        if wrong:
            raise CaptureError(f"a forward that reads what it stored in {wrong[0]} in an earlier call, of which every rank has a "
                               "part", None, "return it, and pass it in at the next call")


def _described(holder: Holder, key: Any) -> Any:
    if key is None:
        return len(holder)
    try:
        value = holder[key]
    except (KeyError, IndexError):
        return "absent"
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    return value if isinstance(value, SIMPLE) else (type(value).__name__, len(value) if isinstance(value, Sized) else None)


def put_back(writes: list[Write], tensors: list[Tensor]) -> None:
    """Store what a forward stores; `tensors` are those that `Made` stands for."""
    for write in writes:
        value = _filled(write.value, tensors)
        if write.key is None:
            write.holder.extend(value)
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


class _Attributes:
    """A dict or list that the model holds, and what was in it."""

    def __init__(self, name: str, holder: Holder, where: str | None, module: nn.Module | None = None):
        self.name, self.holder, self.where, self.module = name, holder, where, module
        self.before: Any = self.now()
        self.read: set[str] = set()

    def now(self) -> Any:
        kind: Any = type(self.module)
        if isinstance(self.holder, dict):
            return {k: v for k, v in self.holder.items() if self.module is None or not _is_own(kind, k)}
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
                raise CaptureError(f"a forward that deletes {self.name}.{gone[0]}", self.where, WAY_OUT)
            changed = [(k, v) for k, v in self.now().items() if not _same(self.before.get(k, tensors), v)]
            return [self._write(k, v, tensors) for k, v in changed]
        count = len(self.before)
        if len(self.holder) == count and all(map(_same, self.before, self.holder)):
            return []
        if len(self.holder) < count or not all(map(_same, self.before, self.holder)):
            raise CaptureError(f"a forward that changes the list {self.name}, other than by appending", self.where, WAY_OUT)
        return [Write(self.name, self.holder, None, [self._template(self.name, v, tensors) for v in list(self.holder)[count:]])]

    def _write(self, key: Any, value: Any, tensors: list[Tensor]) -> Write:
        name = f"{self.name}.{key}"
        read = self.module is None or key in self.read
        return Write(name, self.holder, key, self._template(name, value, tensors), read)

    def _template(self, name: str, value: Any, tensors: list[Tensor]) -> Any:
        if isinstance(value, Tensor) and (isinstance(value, compat.FakeTensor) or value.requires_grad):
            if isinstance(value, nn.Parameter):
                raise CaptureError(f"a forward that stores a parameter in {name}", self.where, "store it before")
            tensors.append(value)
            return Made(len(tensors) - 1)
        if isinstance(value, (Tensor, *SIMPLE)):
            return value
        if type(value) in (list, tuple):
            return type(value)(self._template(name, v, tensors) for v in value)
        if type(value) is dict:
            return {k: self._template(name, v, tensors) for k, v in value.items()}
        raise CaptureError(f"a forward that stores an object of type {type(value).__name__} in {name}", self.where,
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


def _snapshot(model: nn.Module) -> list[_Attributes]:
    """Every module's attributes, and what they hold: dicts, lists, and the attributes of plain objects."""
    found: dict[int, _Attributes] = {}

    def hold(name: str, value: Any, where: str | None, depth: int) -> None:
        if id(value) in found or depth > DEPTH:
            return
        if isinstance(value, dict | list | deque):
            found[id(value)] = _Attributes(name, value, where)  # type: ignore[arg-type]
            for key, item in found[id(value)].entries():
                hold(f"{name}.{key}", item, where, depth + 1)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                hold(f"{name}.{i}", item, where, depth + 1)
        elif _is_plain(value):
            hold(name, vars(value), where, depth + 1)

    for path, module in model.named_modules():
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        code = getattr(type(module).forward, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else None
        found[id(module.__dict__)] = own = _Attributes(name, module.__dict__, where, module)
        for key, value in own.entries():
            hold(f"{name}.{key}", value, where, 1)
    return list(found.values())


@functools.lru_cache(1 << 16)
def _is_own(kind: type, key: str) -> bool:
    """Whether it is no attribute of the module's author: PyTorch's modules keep lists of their weights (``_flat_weights``)."""
    return key in OWN or "_hooks" in key or (key.startswith("_") and kind.__module__.startswith("torch."))


def _is_plain(value: Any) -> bool:
    """Whether it is an instance of a class of Python's that keeps its state in attributes, and no module's or torch's."""
    if isinstance(value, nn.Module | type | Tensor | functools.partial) or callable(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not type(value).__module__.startswith(("torch", "builtins"))
