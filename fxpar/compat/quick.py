"""quick: code that Inductor generated, as it runs from its second time on.

What generated code asserts of the tensors that it makes, and of those that another piece of the same graph hands to it, follows
from the graph: the first run has proved it, and a quick body leaves it out. What comes from outside is looked at where it enters
(see `Entrance`). Operators that were registered with `call_directly` are called as Python functions, one for each place in the
code, without PyTorch's dispatcher, which takes lists apart and puts them together again on the way. Kernels of Triton are started
by what their first start has chosen.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from fxpar.compat.profiles import RANGE, range_of, with_ranges

ASSERTIONS = ("assert_size_stride", "assert_alignment")
"""What generated code calls to find that a tensor is as the graph says."""

_direct: dict[str, Callable[[], Callable[..., Any]]] = {}
"""Name of an operator ("fxpar.gather_casts") -> what makes a function in its place."""
_finished: list[Callable[[bool], None]] = []


def call_directly(name: str, make: Callable[[], Callable[..., Any]]) -> None:
    """Have quick bodies call ``make()``, one for each place in the code, where that calls the operator `name`, as "c10d.wait"."""
    _direct[name] = make


def when_finished(check: Callable[[bool], None]) -> None:
    """Call ``check(failed)`` at the end of every run of quick bodies. failed: it broke off."""
    if check not in _finished:
        _finished.append(check)


class Entrance:
    """What the inputs of a code are like: it was generated, and proved, for these.

    counted: positions of those that have other sizes each time. Raises: AssertionError, where it is called with others.
    """

    def __init__(self, inputs: Sequence[Any], counted: Collection[int] = ()):
        self._like = [(tuple(x.shape), x.stride()) if isinstance(x, Tensor) and i not in counted else None
                      for i, x in enumerate(inputs)]

    def __call__(self, inputs: Sequence[Any]) -> None:
        check = torch._C._dynamo.guards.assert_size_stride
        for x, like in zip(inputs, self._like, strict=True):
            if like is not None:
                check(x, *like, "input")


def may_be_quick() -> bool:
    """Whether nobody looks at the operators that are called."""
    return torch._C._len_torch_dispatch_stack() == 0


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators do not look whether a gradient is wanted; some would do so in Python."""
    return torch._C._AutoDispatchBelowAutograd()


def run_quickly(run: Callable[[list[Any]], Any], inputs: list[Any]) -> Any:
    """``run(inputs)``, of quick bodies."""
    failed = True
    try:
        made = run(inputs)
        failed = False
        return made
    finally:
        for check in _finished:
            check(failed)


def quick(code: Any, ranges: bool = False) -> Callable[[list[Any]], Any]:
    """What runs a piece of generated code that ran before; that itself, where its form is not known. ranges: with those that a
    profiler sees (see `fxpar.compat.profiles`)."""
    call, again = _generated(code)
    function = call.__func__ if isinstance(call, MethodType) else None
    body = _quick_body(function, ranges) if isinstance(function, FunctionType) else None
    return code if body is None else again(MethodType(body, call.__self__))


def _generated(code: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The method that was generated, and what puts around another one what Inductor put around it: it copies what is not
    aligned."""
    from torch._inductor.utils import align_inputs_from_check_idxs

    call = getattr(code, "current_callable", None)
    held = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True)) if isinstance(call, FunctionType) else {}
    if held.keys() != {"inputs_to_check", "model", "mutated_input_idxs"}:
        return call, lambda other: other
    return held["model"].cell_contents, lambda other: align_inputs_from_check_idxs(
        other, held["inputs_to_check"].cell_contents, held["mutated_input_idxs"].cell_contents)


def _quick_body(function: FunctionType, ranges: bool) -> FunctionType | None:
    file = Path(function.__code__.co_filename)
    text = file.read_text() if file.exists() else ""
    where = function.__name__, function.__code__.co_firstlineno
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    definition = next((f for f in functions if (f.name, f.lineno) == where), None)
    if definition is None or function.__closure__:
        return None
    names = function.__globals__ | {RANGE: range_of}
    if ranges:
        definition.body = with_ranges(definition.body, text.splitlines(), definition.lineno)
    changed = ast.fix_missing_locations(ast.Module([_Quick(names, launches=not ranges).visit(definition)], []))
    exec(compile(changed, f"<quick form of {file}>", "exec"), names)
    return names[function.__name__]


class _Quick(ast.NodeTransformer):
    """Makes a quick body, whose functions are found in `names`. launches: a profiler need not see kernels of Triton by name."""

    def __init__(self, names: dict[str, Any], launches: bool):
        self.names, self.launches = names, launches

    def visit_Expr(self, statement: ast.Expr) -> ast.Expr | None:
        made = statement.value
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in ASSERTIONS:
            return None
        self.generic_visit(statement)
        return statement

    def visit_Call(self, made: ast.Call) -> ast.Call:
        self.generic_visit(made)
        operator = _operator(made.func)
        found = _direct[operator]() if operator in _direct else self._launcher(made.func) if self.launches else None
        if found is not None:
            name = f"_fxpar_{len(self.names)}"
            self.names[name] = found
            made.func = ast.Name(name, ast.Load())
        return made

    def _launcher(self, function: ast.expr) -> Callable[..., Any] | None:
        """What starts a kernel, for ``kernel.run``, if there is one thing that does. PyTorch 2.13 finds it by itself."""
        if not isinstance(function, ast.Attribute) or function.attr != "run" or not isinstance(function.value, ast.Name):
            return None
        kernel = self.names.get(function.value.id)
        if type(kernel).__name__ != "CachingAutotuner" or hasattr(kernel, "_cached_launcher") or any(
                getattr(kernel, name, False) for name in ("triton_interpret", "dump_launch_params", "dump_launch_tensors")):
            return None
        launchers = kernel.launchers
        return launchers[0] if len(launchers) == 1 and getattr(launchers[0], "_is_static", False) else None


def _operator(function: ast.expr) -> str:
    """ "fxpar.gather_casts" for ``torch.ops.fxpar.gather_casts.default``; nothing for what is no operator."""
    text = ast.unparse(function) if isinstance(function, ast.Attribute) else ""
    return text.removeprefix("torch.ops.").removesuffix(".default") if text.startswith("torch.ops.") else ""
