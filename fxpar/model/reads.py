"""reads: which Python attributes the forward of a model looks at while it is traced.

What it found there is part of the program, which must not run once it would find another value. Looked at are attributes of
modules, of the objects (a config) that these lead to and of their classes; global values and cells that a method names itself.
What a function that it calls reads by itself is not seen.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpar import compat

SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum)
"""Values that are compared by what they are; others are compared by which object they are."""

CONTAINERS = (list, tuple, dict, set, frozenset)
LONGEST, DEEPEST = 256, 8
"""Elements of a container up to which these are compared, too, and how deep it is looked into; beyond, it is their number."""

MISSING = object()
"""What a slot without a value holds."""

_TRACERS = ("torch.fx.", "torch.export.", "torch._")
"""Modules with classes of modules that a trace makes for itself."""

LISTED = "named_modules"
MACHINERY = frozenset((*vars(nn.Module()), compat.CALLED, LISTED))
"""Attributes that every module has: parts, modes and hooks, which are compared by themselves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place where a value was looked for: ``get(name, MISSING)``. holder: what has it; text: what messages call it."""

    holder: Any
    get: Callable[..., Any]
    name: str
    text: str


class Reads:
    """The objects and names that were looked at, each once; buffers (and constants, as a trace names them) whose values were.

    listener: called with the object and the name before every look at a watched object, once more for each."""

    def __init__(self) -> None:
        self.listener: Callable[[Any, str], None] | None = None
        self.found: dict[tuple[int, str], tuple[Any, str]] = {}
        self.unwatched: dict[int, Any] = {}  # objects that cannot be watched: any of their attributes
        self.buffers: set[str] = set()
        self._left: set[tuple[int, Any]] = set()
        self._holders: set[int] = set()

    def of_model(self, model: nn.Module) -> None:
        """Forget the modules that the trace made for itself, and with them the graphs that they hold."""
        modules = {id(vars(module)) for module in model.modules()}
        self.found = {key: (owner, name) for key, (owner, name) in self.found.items()
                      if key[0] in modules or not type(owner).__module__.startswith(_TRACERS)}

    def left_out(self, places: list[tuple[Any, Any]]) -> None:
        """Do not compare these: (a dict or list, key) where a forward stores something, or reads a tensor at every call."""
        self._left |= {(id(holder), key) for holder, key in places}
        self._holders |= {id(holder) for holder, _ in places}

    def leaves_out(self, slot: Slot) -> bool:
        """Whether a slot is one of those places, or leads to one."""
        return (id(slot.holder), slot.name) in self._left or _leads_to(slot.get(slot.name, MISSING), self._holders)

    def slots(self, model: nn.Module) -> list[Slot]:
        """Where to look again."""
        return [slot for slot in self._slots(model) if not self.leaves_out(slot)]

    def _slots(self, model: nn.Module) -> list[Slot]:
        paths = {id(vars(module)): path for path, module in model.named_modules()}
        made: dict[tuple[int, str], Slot] = {}
        for path, module in model.named_modules():
            for key in module._buffers:
                name = f"{path}.{key}".strip(".")
                if name in self.buffers:
                    made[id(module._buffers), key] = Slot(module._buffers, module._buffers.get, key, name)
        for owner in self.unwatched.values():
            made[id(owner), ""] = Slot(owner, _Fields(owner), "", type(owner).__name__)
        for owner, name in self.found.values():
            path = paths.get(id(vars(owner)), type(owner).__name__)
            for slot in slots_of(owner, name, f"{path}.{name}".strip(".")):
                made.setdefault((id(slot.holder), slot.name), slot)
        return list(made.values())


def slots_of(owner: Any, name: str, text: str) -> Iterator[Slot]:
    """The places that decide what an object has by a name, and what a method of that name names itself."""
    table, kind = vars(owner), type(owner)
    home = next((c for c in kind.__mro__ if name in vars(c)), None)
    if name in table:
        yield Slot(table, table.get, name, text)
    elif isinstance(owner, nn.Module):
        parts = any(name in t for t in (owner._parameters, owner._buffers, owner._modules))
        if not parts and (home is None or name == "forward" or not _of_torch(home)):
            yield Slot(table, table.get, name, text)
            yield from _of_class(home, name)
    elif home is None and (hasattr(kind, "__getattr__") or kind.__getattribute__ is not object.__getattribute__):
        yield Slot(owner, _Computed(owner), name, text)
    else:
        yield Slot(table, table.get, name, text)
        yield from _of_class(home, name)


def _leads_to(value: Any, holders: set[int], depth: int = 0) -> bool:
    if not holders or depth == DEEPEST:
        return False
    if id(value) in holders or (_has_attributes(value) and id(getattr(value, "__dict__", None)) in holders):
        return True
    if not isinstance(value, CONTAINERS) or len(value) > LONGEST:
        return False
    return any(_leads_to(part, holders, depth + 1) for part in (value.values() if isinstance(value, dict) else value))


def _of_torch(kind: type | types.FunctionType) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _of_class(home: type | None, name: str) -> Iterator[Slot]:
    if home is not None:
        value = vars(home)[name]
        yield Slot(home, vars(home).get, name, f"{home.__name__}.{name}")
        yield from _of_function(getattr(value, "fget", None) or getattr(value, "__func__", value), f"{home.__name__}.{name}")


def _of_function(function: Any, text: str, seen: tuple[Any, ...] = ()) -> Iterator[Slot]:
    """Values that a method of the user names: global ones and, with those of functions that it wraps, those of its cells."""
    if not isinstance(function, types.FunctionType) or function in seen or _of_torch(function):
        return
    for name in function.__code__.co_names:
        if _is_value(function.__globals__.get(name, MISSING)) and not name.startswith("__"):
            yield Slot(function.__globals__, function.__globals__.get, name, f"{function.__module__}.{name}")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        inside = _Cell(cell)(name, MISSING)
        if _is_value(inside):
            yield Slot(cell, _Cell(cell), name, f"{name} of {text}")
        yield from _of_function(inside, text, (*seen, function))


def _is_value(value: Any) -> bool:
    """Something to compute with, and no registry of functions."""
    if isinstance(value, CONTAINERS):
        parts = value.values() if isinstance(value, dict) else value
        return all(isinstance(part, (*SIMPLE, *CONTAINERS, Tensor)) for part in parts)
    return isinstance(value, (*SIMPLE, Tensor))


@dataclass(frozen=True, slots=True)
class _Cell:
    cell: Any

    def __call__(self, name: str, default: Any) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not filled yet
            return default


@dataclass(frozen=True, slots=True)
class _Fields:
    """All attributes of an object, of which it is not known which are read."""

    owner: Any

    def __call__(self, name: str = "", default: Any = None) -> dict[str, Any]:
        names = [n for kind in type(self.owner).__mro__ for n in _names(vars(kind).get("__slots__", ()))]
        return {**getattr(self.owner, "__dict__", {}), **{n: getattr(self.owner, n) for n in names if hasattr(self.owner, n)}}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@dataclass(frozen=True, slots=True)
class _Computed:
    """Of an object that answers to names which it does not hold, as configs do to older names."""

    owner: Any

    def __call__(self, name: str, default: Any) -> Any:
        return getattr(self.owner, name, default)


@contextlib.contextmanager
def recorded() -> Iterator[Reads]:
    """Inside, what is looked at of modules, and of what that leads to, is kept in what this yields."""
    reads = Reads()
    undo: list[tuple[Any, Any]] = []
    known: set[type] = set()
    unwatched: set[type] = set()

    def follow(value: Any, depth: int = 0) -> None:
        kind = type(value)
        if kind in CONTAINERS:
            for part in (value.values() if kind is dict else value) if len(value) <= LONGEST and depth < DEEPEST else ():
                follow(part, depth + 1)
        elif kind in unwatched:
            if id(value) not in reads.unwatched:
                reads.unwatched[id(value)] = value
                for part in _Fields(value)().values():
                    follow(part)
        elif kind not in known:
            known.add(kind)
            if _has_attributes(value) and not _of_torch(kind) and not watch(kind):
                unwatched.add(kind)
                follow(value)

    def watch(kind: Any) -> bool:
        """Whether what is looked at of objects of a class is kept from here on: it cannot be of one that is written in C."""
        if not kind.__dictoffset__:
            return False
        before, own = kind.__getattribute__, vars(kind).get("__getattribute__")

        def look(self: Any, name: str) -> Any:
            if reads.listener is not None:
                reads.listener(self, name)
            if name in MACHINERY or name[:2] == "__":
                return before(self, name)
            key = id(object.__getattribute__(self, "__dict__")), name
            if key not in reads.found:
                reads.found[key] = self, name
            value = before(self, name)
            if not isinstance(self, fx.GraphModule):  # with what a tracer keeps on the one that it makes
                follow(value)
            return value

        try:
            kind.__getattribute__ = look
        except TypeError:
            return False
        undo.append((kind, own))
        return True

    try:
        watch(nn.Module)
        yield reads
    finally:
        for kind, own in reversed(undo):
            if own is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = own


def everything(model: nn.Module) -> Reads:
    """For a trace that cannot be recorded: as if it had looked at all attributes of modules and of what they lead to."""
    reads = Reads()

    def follow(value: Any, depth: int) -> None:
        if isinstance(value, CONTAINERS) and len(value) <= LONGEST and depth < DEEPEST:
            for part in value.values() if isinstance(value, dict) else value:
                follow(part, depth + 1)
        elif _has_attributes(value) and id(value) not in reads.unwatched and depth < DEEPEST:
            reads.unwatched[id(value)] = value
            follow(_Fields(value)(), depth)

    for module in model.modules():
        for name in {"forward", *vars(module)} - MACHINERY:
            reads.found[id(vars(module)), name] = module, name
            follow(vars(module).get(name), 0)
    return reads


def _has_attributes(value: Any) -> bool:
    """Whether it is an object with values of its own, such as a config."""
    kinds = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, *SIMPLE)
    return not isinstance(value, kinds) and (hasattr(value, "__dict__") or hasattr(type(value), "__slots__"))


def same(a: Any, b: Any) -> bool:
    """Whether a program that was captured with one may run with the other, as far as they do not change themselves."""
    return a is b or (type(a) is type(b) and isinstance(a, SIMPLE) and a == b)


def content(value: Any, depth: int = 0) -> Any:
    """What is compared of a value that can change and be the same object: a tensor's version, the elements of a container."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if not isinstance(value, CONTAINERS):
        return value if isinstance(value, SIMPLE) else Same(value)
    if len(value) > LONGEST or depth == DEEPEST:
        return type(value), len(value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return type(value), [(Same(p) if isinstance(p, Tensor) else type(p), content(p, depth + 1)) for p in parts]


class Same:
    """Equal to what holds the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value
