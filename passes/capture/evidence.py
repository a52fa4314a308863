"""evidence: what the trace of a layer depended on, written down so that it can be compared with what another layer would find.

A trace follows from the layer's inputs, parameters and buffers, from what the code that ran looked at, and from PyTorch's modes.
`Evidence` sees what is looked at while a layer is traced: attributes of modules and of the objects that these lead to (through
`fxpar.model.reads`), and of every function of the user's that ran the global values, cells and defaults that it names. Each place
is described when it is first looked at. What has another description once the layer is done, the layer wrote to. What cannot be
described is equal to nothing, itself included: then nothing is proved, and every layer is traced.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import gc
import logging
import operator
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxpar import compat
from fxpar.model.reads import CONTAINERS, MACHINERY, MISSING, SIMPLE, Reads, Same, Slot, slots_of
from fxpar.model.reads import LONGEST as FOLLOWED
from fxpar.program import is_library_file

Watch = Callable[[types.FrameType, str, Any], None]

LONGEST, DEEPEST = 4096, 10
"""Elements of a container up to which it is described, and how deep."""
OPAQUE = {"id", "hash", "globals", "locals", "vars", "eval", "exec", "compile", "open", "input", "__import__"}
"""Builtin functions with which code finds what cannot be seen here."""
_CACHED = type(functools.lru_cache(len))
_LASTING = (type, types.ModuleType, logging.Logger, re.Pattern, types.GetSetDescriptorType, types.MemberDescriptorType,
            types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType)
"""Objects that are the same as long as they are the same object."""
_LASTING_OF_TORCH = (torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
_GETTERS = (operator.itemgetter, operator.attrgetter)
_IMMUTABLE, _HEAP = 1 << 8, 1 << 9
"""Flags of classes: that their attributes cannot be set, and that they are not written in C."""
_OF_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
_PLAIN = {Tensor, nn.Parameter, compat.FakeTensor, bool, int, float, complex, str, type(None), type(...), slice, torch.Size,
          torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Of arguments, by their exact types: those that hold no code of the user's."""


class _Unknown:
    """What cannot be described."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class View:
    """A layer, and what belongs to it: to describe a value that leads to its modules and tensors by which of them it leads to.
    A function with an attribute `stands_for` is described as that.

    modules: each once. tensors: parameters and buffers as they are now, table by table. code: of the functions described so far.
    """

    def __init__(self, layer: nn.Module):
        found = list(layer.named_modules(remove_duplicate=False))
        self.modules = list({id(m): m for _, m in found}.values())
        self.number = {id(m): i for i, m in enumerate(self.modules)}
        self.tree = tuple((path, self.number[id(m)], type(m), m.training) for path, m in found)
        self.tables = [t for m in self.modules for t in (m._parameters, m._buffers)]
        self.tensors = [t for table in self.tables for t in table.values() if t is not None]
        self.names = tuple(tuple((k, t is None) for k, t in table.items()) for table in self.tables)
        self.code: set[types.CodeType] = set()
        self._tensors = {id(t): i for i, t in reversed(list(enumerate(self.tensors)))}

    def describe(self, value: Any, inside: bool = True, path: tuple[int, ...] = ()) -> Any:
        """What is equal for a value that is to another layer what this one is to this layer.

        inside: whether the attributes of an object are described, too; otherwise it is seen which are looked at.
        """
        kind = type(value)
        if isinstance(value, SIMPLE) and not isinstance(value, Enum):
            return kind, repr(value) if isinstance(value, (float, complex)) else value
        if isinstance(value, nn.Module):
            number = self.number.get(id(value))
            return _Unknown() if number is None else ("module", number)
        if isinstance(value, Tensor):
            number = self._tensors.get(id(value))
            return (Same(value), _version(value)) if number is None else ("tensor", number)
        if id(value) in path:
            return "again", len(path) - path.index(id(value))
        if len(path) == DEEPEST:
            return _Unknown()
        followed = kind in CONTAINERS and len(value) <= FOLLOWED
        below = functools.partial(self.describe, inside=inside or not followed, path=(*path, id(value)))
        if isinstance(value, types.FunctionType):
            return self._function(value, below)
        if isinstance(value, types.MethodType):
            return "method", below(value.__func__), below(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", below(value.func), below(value.args), below(value.keywords)
        if isinstance(value, (property, staticmethod, classmethod)):
            parts = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
            return kind, [below(part) for part in parts]
        if isinstance(value, (list, tuple, deque, dict, set, frozenset)):
            return kind, self._container(value, below), self._fields(value, below) if hasattr(value, "__dict__") else None
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__
            lasting = owner is None or isinstance(owner, (type, types.ModuleType))
            return Same(value) if lasting else (value.__name__, below(owner))
        if isinstance(value, _CACHED):
            return Same(value), below(value.__wrapped__)
        if value is MISSING or isinstance(value, (Enum, *_LASTING, *_LASTING_OF_TORCH)) or _is_operator(value):
            return Same(value)
        if _holds_more(kind):
            return _Unknown()
        if not inside and kind.__flags__ & _HEAP and not kind.__flags__ & _IMMUTABLE and kind.__dictoffset__ and \
                not _is_of_torch(kind):
            return Same(value)
        return Same(value), self._fields(value, below)

    def _function(self, function: types.FunctionType, below: Callable) -> Any:
        self.code.add(function.__code__)
        cells = [_content(cell) for cell in function.__closure__ or ()]
        if "stands_for" in vars(function):
            return below(function.stands_for)  # type: ignore[attr-defined]
        if is_library_file(function.__code__.co_filename):
            return Same(function), [below(c) for c in cells if isinstance(c, (types.FunctionType, types.MethodType))]
        named = zip(function.__code__.co_freevars, cells, strict=True)
        return (Same(function.__code__), below(function.__defaults__), below(function.__kwdefaults__),
                [below(c) for name, c in named if name != "__class__"])

    def _container(self, value: Any, below: Callable) -> Any:
        if len(value) > LONGEST:
            return _Unknown()
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value)) if all(isinstance(v, SIMPLE) for v in value) else _Unknown()
        if isinstance(value, dict):
            return [(below(k), below(v)) for k, v in dict.items(value)]
        return [below(v) for v in value]

    def _fields(self, value: Any, below: Callable) -> Any:
        """The attributes of an object, and the values in its classes."""
        slots = [n for c in type(value).__mro__ for n in _names(vars(c).get("__slots__", ())) if hasattr(value, n)]
        own = {**getattr(value, "__dict__", {}), **{n: getattr(value, n) for n in slots if n not in ("__dict__", "__weakref__")}}
        of_classes = [(name, below(v)) for c in type(value).__mro__ for name, v in values_of(c)]
        return [(name, below(v)) for name, v in own.items()], of_classes


def values_of(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class of the user's holds that can change, and its functions that hold something: names and values."""
    if kind.__flags__ & _HEAP and not _is_of_torch(kind):
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", value)
            holds = isinstance(function, types.FunctionType) and function.__code__.co_freevars not in ((), ("__class__",)) and \
                not is_library_file(function.__code__.co_filename)
            if holds or (isinstance(value, (*SIMPLE, list, tuple, dict, set, deque, Tensor)) and not name.startswith("__")):
                yield name, value


def _is_of_torch(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _is_operator(value: Any) -> bool:
    """Whether it is a function in all but name, which holds nothing that changes."""
    kind = type(value)
    ufunc = str(kind.__module__).partition(".")[0] == "numpy" and kind.__name__ == "ufunc"
    return (_is_of_torch(kind) and callable(value)) or ufunc or isinstance(value, _GETTERS)


def _holds_more(kind: type) -> bool:
    """Whether objects of a class hold something beside their attributes, as those do that are written in C."""
    slots = sum(len(_names(vars(c).get("__slots__", ()))) for c in kind.__mro__)
    return kind.__basicsize__ > object.__basicsize__ + 8 * (slots + 2)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return MISSING


class Evidence:
    """What the trace of one layer looked at, while `watching`; `reason` is why nothing can be proved of it, if so."""

    def __init__(self, view: View, function: Any):
        self.view, self.reason = view, ""
        self._slots: dict[tuple[int, str], tuple[Slot, int | None, Any]] = {}
        self._tables = {id(vars(m)): i for i, m in enumerate(view.modules)}
        self._looked: set[tuple[int, str]] = set()
        self._ran: dict[int, types.CodeType] = {}
        self._made: set[types.CodeType] = set()
        self._busy = False
        view.describe(function)
        for kind in {c for m in view.modules for c in type(m).__mro__ if not _is_of_torch(c)}:
            self._note(Slot(kind, lambda *_, kind=kind: tuple(vars(kind)), "", kind.__name__), True)
            for name, _ in values_of(kind):
                self._note(Slot(kind, vars(kind).get, name, f"{kind.__name__}.{name}"), True)

    @contextlib.contextmanager
    def watching(self, reads: Reads) -> Iterator[None]:
        """Inside, it is seen what is looked at. Garbage is not collected, as what is called then is none of the layer's."""
        collects = gc.isenabled()
        gc.disable()
        reads.listener = self._look
        operators = contextlib.nullcontext() if compat.has_foreign_modes() else _UnwatchedOperators(self._call)
        try:
            with operators:
                sys.setprofile(self._call)
                yield
        finally:
            sys.setprofile(None)
            reads.listener = None
            if collects:
                gc.enable()

    def settle(self) -> None:
        """Afterwards, `reason` says whether something that was looked at was written to."""
        for slot, _, was in self._slots.values():
            if self.view.describe(slot.get(slot.name, MISSING), was[0]) != was[1]:
                self._spoil(f"it changes {slot.text}, or that is nothing to compare")

    def holds(self, view: View) -> bool:
        """Whether another layer would have found the same."""
        for slot, number, was in self._slots.values():
            get = slot.get if number is None else vars(view.modules[number]).get
            if view.describe(get(slot.name, MISSING), was[0]) != was[1]:
                return False
        return True

    def share(self, reads: Reads, view: View) -> None:
        """Know of another layer, which is not traced, what would have been looked at."""
        for number, name in self._looked:
            module = view.modules[number]
            reads.found.setdefault((id(vars(module)), name), (module, name))

    # ---- what is looked at ----

    def _spoil(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _note(self, slot: Slot, inside: bool) -> None:
        key = id(slot.holder), slot.name
        if key not in self._slots:
            was = inside, self.view.describe(slot.get(slot.name, MISSING), inside)
            self._slots[key] = slot, self._tables.get(id(slot.holder)), was

    def _look(self, owner: Any, name: str) -> None:
        """An attribute of a module, or of an object that one leads to."""
        if self._busy:
            return
        number = self.view.number.get(id(owner))
        if (number, name) in self._looked:
            return
        self._busy = True
        try:
            if name == "__dict__" or (number is None and isinstance(owner, nn.Module)):
                if not is_library_file(sys._getframe(2).f_code.co_filename):
                    self._spoil(f"it reads {name} of {type(owner).__name__}")
            elif not (name in MACHINERY or name.startswith("__")):
                if number is not None:
                    self._looked.add((number, name))
                for slot in slots_of(owner, name, f"{type(owner).__name__}.{name}"):
                    self._note(slot, slot.holder is not vars(owner))
        finally:
            self._busy = False

    def _call(self, frame: types.FrameType, event: str, _: Any) -> None:
        """A function begins to run."""
        if event != "call" or id(frame.f_code) in self._ran:
            return
        code, space = frame.f_code, frame.f_globals
        self._ran[id(code)] = code
        if _is_library(code, space):
            return
        loaded, writes = _globals_of(code)
        if writes:
            self._spoil(f"{code.co_name} writes to a global variable")
        if {*code.co_freevars} - {"__class__"} and code not in self.view.code and code not in self._made:
            self._spoil(f"{code.co_name} was not found before it ran")
        self._made.update(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name in loaded:
            if name in space:
                self._note(Slot(space, space.get, name, name), True)
                self._lead(space[name], code.co_names)
            elif name in OPAQUE and hasattr(builtins, name):
                self._spoil(f"{code.co_name} calls {name}")
        for name in code.co_names:
            if name in sys.modules and name not in space:
                self._lead(sys.modules[name], code.co_names)

    def _lead(self, value: Any, names: tuple[str, ...], depth: int = 0) -> None:
        """Note what code may look at of a module of Python's, or of a class, which it names."""
        if isinstance(value, types.ModuleType):
            if depth < DEEPEST and not is_library_file(_file(value)):
                table = vars(value)
                for name in names:
                    if name in table:
                        self._note(Slot(table, table.get, name, f"{value.__name__}.{name}"), True)
                        self._lead(table[name], names, depth + 1)
        elif isinstance(value, type) and value.__flags__ & _HEAP and not _is_of_torch(value):
            for kind in value.__mro__:
                for name in names:
                    if name in vars(kind):
                        self._note(Slot(kind, vars(kind).get, name, f"{kind.__name__}.{name}"), True)


class _UnwatchedOperators(TorchFunctionMode):
    """Inside, PyTorch's operators are traced without `watch`, the profiler, to which they would be thousands of calls each: none
    of those is the layer's. A kernel that Python code registered for one of PyTorch's own operators counts as PyTorch's.

    Where code of the user's could be called on the way, the operator is watched: if an argument is an object of another kind, if
    the layer entered a mode that sees operators, or if hooks of its see what is saved for a backward.
    """

    def __init__(self, watch: Watch):
        super().__init__()
        self._watch, self._modes = watch, compat.dispatch_modes()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not (isinstance(func, _OF_C) and _are_plain(args) and _are_plain(kwargs.values())) or \
                compat.dispatch_modes() != self._modes or compat.saves_elsewhere():
            return func(*args, **kwargs)
        sys.setprofile(None)
        try:
            return func(*args, **kwargs)
        finally:
            sys.setprofile(self._watch)


def _are_plain(values: Iterable[Any]) -> bool:
    return all(type(v) in _PLAIN or (type(v) in (tuple, list) and _are_plain(v)) for v in values)


def _is_library(code: types.CodeType, space: dict[str, Any]) -> bool:
    """Whether code is the library's; what is generated (a dataclass's methods) is from where its global values are."""
    file = code.co_filename
    if file.startswith("<"):
        file = contextlib.__file__ if file.startswith("<frozen") else str(space.get("__file__") or "")
    return is_library_file(file)


def _file(module: types.ModuleType) -> str:
    """Where a module of Python's is from; one written in C counts as a library's."""
    return getattr(module, "__file__", None) or contextlib.__file__


@functools.lru_cache(4096)
def _globals_of(code: types.CodeType) -> tuple[tuple[str, ...], bool]:
    """The global names that code looks at, and whether it writes to any."""
    found = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    loaded = {name for op, name in found if op in ("LOAD_GLOBAL", "LOAD_NAME")}
    return tuple(sorted(loaded)), any(op in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME") for op, _ in found)
