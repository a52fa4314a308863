"""Parameters keep their identity: whoever held a parameter of the model holds the DTensor that has taken its place.

An `nn.Parameter` cannot be made a DTensor in place (``torch.utils.swap_tensors`` refuses: a DTensor object has two slots more).
So a new object takes over what belongs to the old one (hooks, attributes, its gradient), and takes its place in every list,
dict, set, tuple, closure and object that Python's garbage collector knows: an optimizer's groups, a list of parameters, the
default of an argument. ``id(p)``, where lists, sets and keys of dicts hold it, is changed likewise. The old object stays behind
for what is left (local variables of functions that are running, bound methods) and passes on what is done with it.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import InputError, PlanError

_DICTS = (dict, OrderedDict, defaultdict)
_COLLECTIONS = (set, list, *_DICTS)
_FIXED = frozenset((FunctionType, tuple, type, ModuleType, BuiltinFunctionType, GenericAlias, UnionType, weakref.ref,
                    GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType))
"""Of objects that make up most of what there is: what they hold cannot be exchanged, but in dicts and cells of theirs, or is
looked at by itself."""
TOGETHER = 256
"""Objects whose referents are looked at together: most refer to no parameter."""


def check(model: nn.Module) -> None:
    """Raises `PlanError` where something that belongs to a parameter could not be kept. Nothing is changed."""
    named = {id(p): (name, p) for name, p in model.named_parameters()}
    free = _references(nn.Parameter(torch.empty(0)))
    for name, p in named.values():
        if type(p) is not nn.Parameter:
            raise PlanError("model", type(model).__name__, f"has parameter {name!r} of class {type(p).__name__}; parameters "
                            "become DTensors, which are not of that class", "an nn.Parameter (its attributes are kept)")
        if p.requires_grad and _references(p) > free:
            raise PlanError("model", type(model).__name__, f"has parameter {name!r} whose AccumulateGrad node the program holds; "
                            "hooks on that node would not run", "a hook of the parameter (`register_post_accumulate_grad_hook`)")
    for optimizer in _optimizers():
        used = next((named[id(p)][0] for p, state in optimizer.state.items() if id(p) in named and state), None)
        if used is not None:
            raise PlanError("model", type(model).__name__, f"has parameter {used!r}, for which a {type(optimizer).__name__} has "
                            "state already; that is of the full parameter, and each rank is to update a part",
                            "an optimizer that has made no step; load its state after `parallelize` (`fxpar.load_checkpoint`)")


def _optimizers() -> list[Optimizer]:
    """Those that there are."""
    everything = gc.get_objects()
    kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, Optimizer)}
    return [o for o in everything if type(o) in kinds] if kinds else []


@torch.enable_grad()
def _references(p: Tensor) -> int:
    """How many references there are to the node that adds to ``p.grad``, if a graph holds it."""
    graph = p.expand_as(p)
    count = sys.getrefcount(torch.autograd.graph.get_gradient_edge(p).node)
    del graph
    return count


def inherit(old: nn.Parameter, new: Tensor, name: str, part: Callable[[Tensor], Tensor]) -> None:
    """Give `new`, a DTensor, what belongs to `old` besides its value: hooks and attributes. `old` gives up its memory.

    part: a full tensor -> the DTensor laid out as `new` is. Hooks on gradients were written for full ones: they get those.
    """
    new.__dict__.update(old.__dict__)
    compat.move_hooks(old, new, lambda hook: _on_full(hook, part), lambda hook: _after(hook, name))
    if old.requires_grad:  # graphs that were made before may still be there
        torch.autograd.graph.get_gradient_edge(old).node.register_prehook(_too_late)
    old.grad = None
    old.data = old.data.new_empty(0)


def _on_full(hook: Callable[[Tensor], Tensor | None], part: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    def on_part(grad: Any) -> Tensor:
        full = grad.full_tensor()
        result = hook(full)
        return part(full if result is None else result)

    return on_part


def _after(hook: Callable[[Tensor], None], name: str) -> Callable[[Tensor], None]:
    def after(p: Tensor) -> None:
        try:
            return hook(p)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise InputError(f"hook {_place(hook)} runs after the gradient of parameter {name!r} was accumulated, and mixes "
                             "plain tensors with that DTensor; `register_hook` gives hooks full gradients, or distribute "
                             "what is mixed (`torch.distributed.tensor.distribute_tensor(t, p.device_mesh, p.placements)`)"
                             ) from error

    return after


def _place(hook: Any) -> str:
    code = getattr(hook, "__code__", None)
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


class _Former(nn.Parameter):
    """A parameter whose place a DTensor has taken. What is done with it is done with that."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(_Former, _successor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(_successor(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_successor(self), name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for `isinstance`
        return type(_successor(self))

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_successor(self))

    def __deepcopy__(self, memo: Any) -> Any:
        return _successor(self).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _successor(self).__reduce_ex__(protocol)


def _successor(former: _Former) -> Any:
    return former.__dict__["_successor"]


def take_over(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Put the second of each pair wherever the first is held. The first becomes a name of the second."""
    old = {id(a): a for a, _ in pairs}
    new: dict[int, Any] = {id(a): b for a, b in pairs}
    ids = {a: id(b) for a, b in new.items()}
    own = {id(x) for x in (pairs, old, new, ids, *pairs)}
    everything = gc.get_objects()
    tuples = [t for t in everything if type(t) is tuple and id(t) not in own]
    if replaced := _tuples(tuples, new):
        new.update(replaced)
        for function in [f for f in everything if type(f) is FunctionType and id(f.__defaults__) in replaced]:
            function.__defaults__ = replaced[id(function.__defaults__)]
    for some in _together([x for x in everything if type(x) not in _FIXED]):
        _take_over_in(some, new, ids, own)
    for some in _together(tuples):
        _rename(_untracked(gc.get_referents(*some)), ids, own)
    for a in old.values():
        a.__dict__.clear()
        a.__dict__["_successor"] = new[id(a)]
        a.__class__ = _Former


def _together(objects: list[Any]) -> Iterator[list[Any]]:
    return (objects[first : first + TOGETHER] for first in range(0, len(objects), TOGETHER))


def _take_over_in(holders: list[Any], new: Mapping[int, Any], ids: Mapping[int, int], own: set[int]) -> None:
    """The same in these objects, but for those of `own`."""
    referents = gc.get_referents(*holders)
    if not new.keys().isdisjoint(map(id, referents)):
        for holder in holders:
            if id(holder) not in own and not new.keys().isdisjoint(map(id, gc.get_referents(holder))):
                _put(holder, new)
    _rename([x for x in holders if type(x) in _COLLECTIONS] + _untracked(referents), ids, own)


def _untracked(referents: list[Any]) -> list[dict]:
    """Dicts of numbers and strings alone, which the garbage collector does not list."""
    return [x for x in referents if type(x) is dict and not gc.is_tracked(x)]


def _rename(holders: list[Any], ids: Mapping[int, int], own: set[int]) -> None:
    for x in holders:
        if id(x) not in own and _notes(x, ids):
            _note(x, ids)


def give_up(parameters: list[nn.Parameter]) -> None:
    """Take parameters that other ranks hold out of optimizers that were made before, and free their memory."""
    gone = {id(p) for p in parameters}
    for optimizer in _optimizers() if gone else ():
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in parameters:
        p.grad = None
        p.data = p.data.new_empty(0)


def _tuples(every: list[tuple], new: Mapping[int, Any]) -> dict[int, tuple]:
    """What takes the place of those tuples that hold what is to be replaced, directly or in tuples."""
    found: dict[int, tuple] = {}
    inside = set(new)
    while more := [t for some in _together(every) if not inside.isdisjoint(map(id, gc.get_referents(*some)))
                   for t in some if not inside.isdisjoint(map(id, t)) and id(t) not in found]:
        found.update((id(t), t) for t in more)
        inside.update(found)

    def made(x: Any) -> Any:
        return tuple(map(made, x)) if id(x) in found else new.get(id(x), x)

    return {i: made(t) for i, t in found.items()}


def _too_late(grads: Any) -> None:
    raise InputError("backward through a forward that ran before `parallelize`: its gradients would reach nobody; "
                     "run the forward again")


def _put(holder: Any, new: Mapping[int, Any]) -> None:
    """Put ``new[id(x)]`` in the place of every x in `holder`, if that can be changed."""
    if isinstance(holder, list):
        for i, x in enumerate(holder):
            if id(x) in new:
                holder[i] = new[id(x)]
    elif isinstance(holder, dict):
        for key, value in list(holder.items()):
            if id(value) in new:
                dict.__setitem__(holder, key, new[id(value)])
        if type(holder) in _DICTS and not new.keys().isdisjoint(map(id, holder)):
            _rekey(holder, lambda key: new.get(id(key), key))
    elif isinstance(holder, set):
        for x in [x for x in holder if id(x) in new]:
            holder.discard(x)
            holder.add(new[id(x)])
    elif isinstance(holder, CellType):
        holder.cell_contents = new[id(holder.cell_contents)]
    elif isinstance(holder, functools.partial):
        args = new.get(id(holder.args), holder.args)
        holder.__setstate__((holder.func, args, holder.keywords, vars(holder)))  # type: ignore[attr-defined]
    else:
        _put_in_object(holder, new)


def _put_in_object(holder: Any, new: Mapping[int, Any]) -> None:
    try:
        attributes = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        attributes = {}
    if isinstance(attributes, dict):
        _put(attributes, new)
    for kind in type(holder).__mro__:
        for slot in [s for s in vars(kind).values() if isinstance(s, MemberDescriptorType)]:
            try:
                value = slot.__get__(holder)
                if id(value) in new:
                    slot.__set__(holder, new[id(value)])
            except (AttributeError, TypeError):  # an empty slot, or one that is not to be written to
                continue


def _notes(holder: Any, ids: Mapping[int, int]) -> bool:
    """Whether a set, list or dict that begins with a number has one of `ids`."""
    try:
        return type(next(iter(holder), None)) is int and not ids.keys().isdisjoint(holder)
    except TypeError:  # something in it cannot be hashed: it is not a collection of numbers
        return False


def _note(holder: Any, ids: Mapping[int, int]) -> None:
    if isinstance(holder, list):
        holder[:] = [ids.get(x, x) for x in holder]
    elif isinstance(holder, set):
        holder |= {ids[x] for x in holder if x in ids}
        holder -= ids.keys()
    else:
        _rekey(holder, lambda key: ids.get(key, key))


def _rekey(holder: Any, key: Callable[[Any], Any]) -> None:
    items = [(key(k), v) for k, v in holder.items()]
    holder.clear()
    holder.update(items)
