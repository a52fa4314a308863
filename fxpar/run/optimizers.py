"""optimizers: those that would compute something else of parts of parameters are refused; others step the parts at once.

DTensor's own way to an optimizer's step asks of every tensor how it is split, and makes new ones: several times as long as the
step takes otherwise, for hundreds of parameters. What goes element by element is a step of the parts, and where it is capturable
it is played back (`fxpar.run.repeated`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adafactor, Rprop
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxpar import compat
from fxpar.errors import InputError
from fxpar.run.repeated import RepeatedWork, StepRecordings, step_recordings_of

NEEDS = {Adafactor: "norms of whole rows and columns", LBFGS: "all gradients in one vector",
         Rprop: "to choose elements by their signs"}
"""What optimizers need that the parts of a parameter do not give."""

Lists = list[list[Any]]
"""What is stepped: see `fxpar.compat.stepping`."""


def _nothing() -> None:
    pass


class _Group:
    """One group of parameters of an optimizer. known: how all that is stepped was split when it was found to go together; plain:
    the numbers of lists in which there are plain tensors; lacks: whether something was still to be made. tells: whether versions
    of tensors tell that they were stepped. first: its first parameter. repeats: of the module that this is of."""

    def __init__(self) -> None:
        self.known: list[list[Any]] | None = None
        self.plain: list[int] = []
        self.lacks = self.tells = False
        self.first: Callable[[], Any] = _nothing
        self.repeats: Callable[[], StepRecordings | None] = _nothing


_of_stages: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models of which ranks hold stages of a pipeline."""
_groups: weakref.WeakKeyDictionary[Any, list[_Group]] = weakref.WeakKeyDictionary()
_stepping: tuple[Callable[[], Any], int] = _nothing, 0
"""The optimizer whose step is under way, and how many of its groups were stepped."""


def watch(model: nn.Module | None = None) -> None:
    """From now on, the optimizers of this process refuse parameters that they cannot step, and step parts of others at once.

    model: one of which this rank holds some stages, if there is one.
    """
    if model is not None:
        _of_stages.add(model)
    _register()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_begin)
    register_optimizer_step_post_hook(_end)
    compat.step_elements_by(_step)


def _begin(optimizer: Any, *_: Any) -> None:
    """Raises: as `_check`."""
    global _stepping
    _check(optimizer)
    hashed = isinstance(optimizer, Hashable)  # what is remembered of it is found by it
    _stepping = weakref.ref(optimizer) if hashed else _nothing, 0


def _end(*_: Any) -> None:
    global _stepping
    _stepping = _nothing, 0


def _check(optimizer: Any) -> None:
    """Raises: `InputError` for an optimizer of `NEEDS` with parameters of which ranks hold parts; for LBFGS, where ranks hold
    some of the parameters; for another library's Adafactor, whose state are plain tensors."""
    needs = next((what for kind, what in NEEDS.items() if isinstance(optimizer, kind)), None)
    foreign = needs is None and type(optimizer).__name__ == "Adafactor"
    if needs is None and not foreign:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    if parameters and foreign:
        raise InputError(f"{type(optimizer).__module__}.Adafactor mixes plain tensors with parameters, which are DTensors here: "
                         "use another optimizer (AdamW), or torch.optim.Adafactor where the plan stores parameters whole (dp)")
    if any(not place.is_replicate() for p in parameters for place in p.placements):
        raise InputError(f"torch.optim.{type(optimizer).__name__} cannot step parameters of which each rank has a part (tp, "
                         f"zero): it needs {needs}; use another optimizer (AdamW), or a plan that stores parameters whole (dp)")
    if isinstance(optimizer, LBFGS):
        staged = {id(p) for model in _of_stages for p in model.parameters()}
        if any(id(p) in staged for p in parameters):
            raise InputError("torch.optim.LBFGS cannot step the parameters of a pipeline (pp), of which each rank has some: it "
                             f"needs {needs}; use another optimizer (AdamW), or a plan that stores parameters whole (dp)")


# ---- what optimizers hand over ----


def _step(function: Callable[..., None], lists: Lists, options: dict[str, Any]) -> None:
    """``function(*lists, **options)``, on the parts where all is split alike; else DTensor sees to it."""
    optimizer, number = _now()
    group, splits = _group(optimizer, number), [compat.splits(x) for x in lists]
    alike = all(compat.has_parts(x) for x in options.values() if isinstance(x, DTensor))  # a rate, a scale
    if alike and splits != group.known:
        alike = all(map(compat.has_parts, lists[0])) and all(compat.goes_with(x, lists[0]) for x in lists if x)
        if alike:
            group.known, group.plain = splits, [i for i, split in enumerate(splits) if any(isinstance(x, type) for x in split)]
            group.lacks = any(x is None for of in lists for x in of)
    if not alike:
        function(*lists, **options)
        return
    parts = [compat.local_parts(x) for x in lists]
    options = {name: compat.local_parts([x])[0] if isinstance(x, Tensor) else x for name, x in options.items()}
    work = _work(group, optimizer, number, lists[0][0])
    if work is None or not _repeat(work, function, parts, options, group):
        _as_it_is(function, parts, options, group)
        if group.lacks:  # SGD makes what it sums up of the gradients
            for of, made in zip(lists, parts, strict=True):
                of[:] = [compat.like_dtensor(y, grad) if x is None and y is not None else x
                         for x, y, grad in zip(of, made, lists[1] if of else (), strict=True)]
    if group.tells:  # autograd looks at those of DTensors that it keeps
        torch.autograd.graph.increment_version(lists[0])


def _as_it_is(function: Callable[..., None], parts: Lists, options: dict[str, Any], group: _Group) -> None:
    first = parts[0][0]
    version = None if first.is_inference() else first._version
    function(*parts, **options)
    group.tells = version is not None and first._version != version


def _now() -> tuple[Any, int]:
    """The optimizer whose step this is, None where it did not tell, and the number of its group."""
    global _stepping
    of, number = _stepping
    _stepping = of, number + 1
    return of(), number


def _group(optimizer: Any, number: int) -> _Group:
    if optimizer is None:
        return _Group()
    groups = _groups.setdefault(optimizer, [])
    groups.extend(_Group() for _ in range(number + 1 - len(groups)))
    return groups[number]


def _work(group: _Group, optimizer: Any, number: int, first: Tensor) -> RepeatedWork | None:
    """What records the steps of a group, whose first parameter this is."""
    if group.first() is not first:
        found = step_recordings_of(first)
        group.first, group.repeats = weakref.ref(first), _nothing if found is None else weakref.ref(found)
    repeats = group.repeats()
    return None if repeats is None or optimizer is None else repeats.step_of(optimizer, number)


def _repeat(work: RepeatedWork, function: Callable[..., None], parts: Lists, options: dict[str, Any],
            group: _Group) -> bool:
    """Have a step recorded or played back, if it can be; whether that is done."""
    if not options.get("capturable"):
        work.why = "capturable=False" if "capturable" in options else "it is none of those that can be captured"
        return False
    device = parts[0][0].device
    moved = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.device == device}
    numbers = {name: x.tolist() if isinstance(x, Tensor) and x.device.type == "cpu" else x
               for name, x in options.items() if name not in moved}
    flat = [*chain.from_iterable(parts), *moved.values()]
    if {*map(type, flat)} != {Tensor} or any(isinstance(x, Tensor) for x in numbers.values()):
        work.why = "what is stepped is not all memory of one device"
        return False
    plain = [*moved.values(), *chain.from_iterable(parts[i] for i in group.plain)]
    run = work.now((("function", function), ("tensors", [*moved]), *numbers.items()), lambda: [
        [x.data_ptr() for x in flat], group.known, [x.stride() for x in parts[1]],
        [(x.shape, x.stride(), x.dtype) for x in plain]])
    if run is None:
        return False
    run("step", functools.partial(_in_lists, function, [len(x) for x in parts], options, [*moved]), flat)
    if group.tells:
        torch.autograd.graph.increment_version(parts[0])
    return True


def _in_lists(function: Callable[..., None], sizes: list[int], options: dict[str, Any], names: list[str],
              flat: list[Tensor]) -> None:
    """A step of lists of so many tensors, behind which those of options lie, which have these names."""
    given = iter(flat)
    lists = [[*islice(given, size)] for size in sizes]
    function(*lists, **options | dict(zip(names, given, strict=True)))
