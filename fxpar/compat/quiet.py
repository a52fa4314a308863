"""What PyTorch does beside what it is asked to do, left out for a while; and who makes models parallel."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.overrides import TorchFunctionMode

WRAPPERS = (
    "torch.nn.parallel.distributed", "torch.nn.parallel.data_parallel", "torch.distributed.fsdp.fully_sharded_data_parallel",
    "torch.distributed.fsdp._fully_shard._fully_shard", "torch.distributed._composable.contract",
    "torch.distributed.tensor._api",
)  # fmt: skip
"""Modules of PyTorch whose functions make a model parallel; by their names, as they may not have been imported."""


def no_torch_function() -> contextlib.AbstractContextManager:
    """Inside, classes derived from Tensor do not see the functions that are called on them."""
    return torch._C.DisableTorchFunctionSubclass()


def untraced() -> contextlib.AbstractContextManager:
    """Inside, neither classes derived from Tensor nor modes see the functions that are called: what is looked at of tensors while
    a trace is made costs what it costs otherwise."""
    return torch._C.DisableTorchFunction()


def no_modes() -> contextlib.AbstractContextManager:
    """Inside, no mode sees the operators that are called: what is made beside a trace is no part of it."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def dispatch_modes() -> int:
    """How many modes see the operators that are called."""
    return torch._C._len_torch_dispatch_stack() + torch._ops._len_torch_dispatch_stack_pre_dispatch()


def function_modes() -> int:
    """How many modes see the functions that are called."""
    return torch.overrides._len_torch_function_stack()


@contextlib.contextmanager
def modes_at(depth: int, *modes: TorchFunctionMode) -> Iterator[None]:
    """Inside, these modes see the functions that are called, behind those that were entered when there were `depth` already."""
    above = _modes_above(depth)
    try:
        with contextlib.ExitStack() as entered:
            for mode in modes:
                entered.enter_context(mode)
            _enter_again(above)
            try:
                yield
            finally:
                _modes_above(depth + len(modes))
    finally:
        _enter_again(above)


def _modes_above(depth: int) -> list[TorchFunctionMode]:
    """The modes of function calls, but for the first ones, which are left; the last one first."""
    return [torch.overrides._pop_mode() for _ in range(function_modes() - depth)]


def _enter_again(modes: list[TorchFunctionMode]) -> None:
    for mode in reversed(modes):
        torch.overrides._push_mode(mode)


def has_foreign_modes() -> bool:
    """Whether a mode sees functions or operators that is neither PyTorch's nor fxpar's."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    return any(type(mode).__module__.partition(".")[0] not in ("torch", "fxpar") for mode in modes)


def inside_of_transform() -> bool:
    """Whether this is called by what `torch.func` transforms (vmap, grad, jvp)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose code is generated when it is first called, or looked at."""
    return _LazyGraphModule(root, graph)


@contextlib.contextmanager
def code_when_called() -> Iterator[None]:
    """Inside, the code of graph modules that PyTorch makes is generated when they are first called. `torch.export` makes, and
    changes, dozens that are never called, which takes a quarter of its time (torch 2.13; in 2.11 most do not listen)."""
    exports = mock.patch.object(torch.export.exported_program, "_create_graph_module_for_export", graph_module)
    with _use_lazy_graph_module(True), exports:
        yield


_CALLERS = (torch.nn.modules.module.__file__, str(Path(__file__).parents[1]) + os.sep)


def _is_called_as_forward(code: types.CodeType, caller: types.CodeType) -> bool:
    """Whether a module's call, or fxpar's trace of one, ran this: the module's forward, whatever its name is, or a hook."""
    return caller.co_filename.startswith(_CALLERS) and not code.co_filename.startswith(_CALLERS)


class _Stacks:
    """Stands for `torch.utils._traceback.CapturedTraceback`. PyTorch keeps the lines of functions that are called `forward`, and
    is told so of those that are called in the place of one (``model.forward = another``)."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[types.CodeType, traceback.FrameSummary]] = {}

    def extract(self) -> _Stacks:
        return self

    def summary(self) -> traceback.StackSummary:
        stack, frame = traceback.StackSummary(), sys._getframe(1)
        while frame is not None:
            code, line = frame.f_code, frame.f_lineno
            caller = frame.f_back
            known = self._known.get((id(code), line))
            if known is None:
                name = "forward" if caller is not None and _is_called_as_forward(code, caller.f_code) else code.co_name
                known = code, traceback.FrameSummary(code.co_filename, line, name)
                self._known[id(code), line] = known
            stack.append(known[1])
            frame = caller  # type: ignore[assignment]
        stack.reverse()
        return stack


def lines_looked_up_once() -> contextlib.AbstractContextManager:
    """Inside, a line that is on the way to many operators of a trace is looked up once. PyTorch does so for every operator, which
    takes a sixth of a trace."""
    return mock.patch.object(torch.fx.proxy, "CapturedTraceback", _Stacks())


def forget_fake_results(most: int) -> None:
    """If PyTorch remembers more than so many results of operators on fake tensors, have it forget them all: it keeps those of
    every shape there was."""
    if len(FakeTensorMode.cache) > most:
        FakeTensorMode.cache_clear()


@contextlib.contextmanager
def quiet_traces() -> Iterator[None]:
    """Inside, what cannot be traced raises, and nothing is written to the log and to stderr besides: no traceback, no warning
    that the user's code was not found, and not the graph up to there."""
    exports = importlib.import_module("torch.export._trace")  # which PyTorch imports when it is needed
    logs = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")]
    before = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    try:
        with mock.patch.object(exports, "print", _print, create=True):
            yield
    finally:
        for log, was in zip(logs, before, strict=True):
            log.disabled = was


def _print(*values: object, file: object = None, **options: object) -> None:
    """Python's `print`, but for graphs of a trace that failed, which `torch.export` writes to stderr."""
    if file is not sys.stderr:
        print(*values, file=file, **options)  # type: ignore[call-overload]


@contextlib.contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Inside, `torch.distributions` do not look whether their arguments are valid, unless they are told to."""
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)
