"""traced: the calls that a trace would not see as they are meant, while it is made."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.passes.capture.functions import line_here, record_hook
from fxpar.program import is_library_file

_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]
_GRAD_FN = torch.Tensor.grad_fn.__get__

_GRADIENT = "leave it to the loss's backward, compute it outside of the model, or write the derivative out"
_GRAPH = "read gradients outside of the model, after the backward"
REFUSED: dict[Any, tuple[str, str]] = {
    _SET_DATA: ("a forward that replaces the .data of a tensor", "a forward may write to buffers alone: replace it outside of "
                "forward, between steps"),
    torch.autograd.grad: ("torch.autograd.grad inside of the forward", _GRADIENT),
    torch.Tensor.backward: ("a backward inside of the forward", _GRADIENT),
    torch.Tensor.retain_grad: ("retain_grad inside of the forward", _GRAPH),
    _GRAD_FN: ("a forward that reads grad_fn", _GRAPH),
    torch.nn.functional.ctc_loss: ("ctc_loss, which reads the lengths of labels in Python", "return the log-probabilities, and "
                                   "compute the loss of them outside of the model"),
    compat.pack_rows: ("pack_padded_sequence, which reads the lengths of rows in Python", "give the recurrent layer the padded "
                       "rows, and leave out what it makes of the padding: by a mask in the loss, or by gather of the last ones"),
    torch.Tensor.register_post_accumulate_grad_hook: ("register_post_accumulate_grad_hook inside of the forward",
                                                      "register it once, outside of forward"),
}
"""Functions that cannot be traced: what they are called, and the way out."""

_DRAWS = ("draw from PyTorch's default generator, whose numbers fxpar makes of one seed a call (`module.seed`), or make the "
          "random tensor outside of the model and pass it in")

DESCRIPTIONS = frozenset(getattr(torch.Tensor, name).__get__ for name in (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_sparse", "is_quantized", "is_nested",
    "is_meta", "is_cpu", "is_cuda", "itemsize", "nbytes",
)) | {torch.Tensor.size, torch.Tensor.stride, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.storage_offset,
      torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.is_complex}  # fmt: skip
"""Functions that say of one tensor what a trace knows of it anyway, whichever object it is."""

_NO_TREES = {type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format}

Places = Mapping[int, tuple[dict[str, Any], str]]
"""Where the model keeps each of its parameters: id -> the module's table and the name in it."""


class TraceGuard(TorchFunctionMode):
    """What a trace does not see as it is meant.

    ``torch.rand([]) < p`` is answered where it does not depend on the draw: p is 0 or 1 (layer dropping is off). ``x.data``,
    which would be a constant, is `x` detached. A parameter that the forward finds elsewhere than in its module (in a list, a
    closure, a partial) is the module's: `places` says where that is. ``x.register_hook(f)`` leaves a mark in `marks`:
    results that have to be outputs of the trace.
    Raises: `CaptureError` for the functions of `REFUSED`, for a tensor that wants a gradient and is no parameter, and for a
    generator of random numbers that is not PyTorch's default one.
    """

    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self.draws: list[torch.Tensor] = []
        self.marks: list[torch.Tensor] = []
        self.given: set[int] = set()
        self._made: list[tuple[Any, Any]] = []
        self._imports = _imports()

    def __enter__(self):
        self._generator = torch.default_generator.get_state()
        return super().__enter__()

    def __exit__(self, *error):
        torch.default_generator.set_state(self._generator)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in DESCRIPTIONS:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.lt and len(args) == 2 and any(args[0] is d for d in self.draws):
            if isinstance(args[1], int | float) and not 0 < args[1] < 1:
                return args[1] >= 1
        if func == _GRAD_FN and _asked_by_torch():
            return func(*args)
        if func in REFUSED:
            raise CaptureError(REFUSED[func][0], line_here(), REFUSED[func][1])
        args, kwargs = self._found(args, kwargs or {})
        if kwargs.get("generator") is not None and not torch.compiler.is_dynamo_compiling():  # of torch.cond: traces this, too
            raise CaptureError("random numbers of a generator of one's own", line_here(), _DRAWS)
        if func == _DATA:
            return args[0].detach()
        if func is torch.Tensor.register_hook:
            self.marks.append(record_hook(*args, **kwargs))
            return _Handle()
        if func is torch.Tensor.random_ and len(args) == 3:  # an overload whose name Python does not take: "from"
            return args[0].random_(args[2] - args[1]).add_(args[1])
        made = func(*args, **kwargs)
        if func is torch.rand and made.dim() == 0:
            self.draws.append(made)
        fakes = [t for t in _tensors((made,)) if isinstance(t, compat.FakeTensor)]
        if fakes:
            line = _frame()
            self._made += [(weakref.ref(t), line) for t in fakes]
        return made

    def require_nothing_kept(self) -> None:
        """Raises: `CaptureError` if somebody still has a tensor that was made, now that the trace is over: it has no values."""
        self.draws.clear()
        self.marks.clear()
        for generation in (None, 0, 1, 2):  # a full collection takes as long as many captures
            if generation is not None:
                gc.collect(generation)
            kept = next((i for i, (ref, _) in enumerate(self._made) if self._is_kept(ref())), None)
            if kept is None:
                return
        assert kept is not None
        t, line = self._made[kept][0](), self._made[kept][1]
        raise CaptureError(f"a forward that keeps a tensor of shape {tuple(t.shape)} outside of the model's attributes"
                           f"{_where_kept(t)}", line, "keep it in an attribute of a module, or in a list or dict that an "
                           "attribute holds, or return it")

    def _is_kept(self, t: Any) -> bool:
        return t is not None and id(t) not in self.given and not isinstance(t, nn.Parameter)

    def _found(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments, with the module's own parameters for those that come from elsewhere."""
        if not any(map(_is_foreign, _tensors((*args, *kwargs.values())))):
            return args, kwargs
        return pytree.tree_map_only(torch.Tensor, self._own, (args, kwargs))

    def _own(self, t: torch.Tensor) -> torch.Tensor:
        if not _is_foreign(t):
            return t
        if id(t) in self.places:
            table, key = self.places[id(t)]
            return table[key]
        if _imports() > self._imports:  # modules that make models for themselves, as those do that explain an error of export
            return t
        what = "a parameter" if isinstance(t, nn.Parameter) else "a tensor with requires_grad"
        raise CaptureError(f"{what} of shape {tuple(t.shape)} that the model does not have among its parameters: it would be a "
                           "constant", line_here(), "register it: assign it to an attribute of a module (modules in an "
                           "nn.ModuleList, parameters in an nn.ParameterList), or pass it as an input, or detach it")


class _Handle:
    """What `register_hook` returns in a trace."""

    def remove(self) -> None:
        raise CaptureError("a tensor hook that is removed inside of the forward", line_here(), "do not register it")


def _asked_by_torch() -> bool:
    """Whether it is torch that made the call which a mode is asked about."""
    return is_library_file(asking_file())


def asking_file() -> str:
    """The file with the call which a mode is asked about."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_filename


def _frame() -> str:
    """The user's innermost line on the stack, as `line_here` has it, sooner."""
    frame = sys._getframe(2)
    while frame is not None and is_library_file(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _where_kept(t: torch.Tensor) -> str:
    for holder in gc.get_referrers(t):
        if type(holder) is dict:
            key = next((k for k, v in holder.items() if v is t), None)
            return f", in a dict under {key!r}"
        if type(holder) is list:
            return ", in a list"
    return ""


def _tensors(values: Iterable[Any]) -> list[Any]:
    """The leaves of trees that may be tensors; most values are no trees."""
    out: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            out.append(value)
        elif type(value) not in _NO_TREES:
            out += pytree.tree_leaves(value)
    return out


def _is_foreign(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and not isinstance(t, compat.FakeTensor) and t.requires_grad and t.is_leaf


def _imports() -> int:
    """How many modules are being imported."""
    frame: Any = sys._getframe()
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def require_no_seeds(function: str, caller: FrameType) -> None:
    """Raises: `CaptureError` if a forward asks for the seed or state of PyTorch's generators, or sets it: every random number of
    a program comes from one seed a call, and what a trace reads is a constant."""
    if not is_library_file(caller.f_code.co_filename):
        raise CaptureError(f"torch.{function} inside of the forward", line_here(), _DRAWS)


@contextlib.contextmanager
def inference_without_gradients() -> Iterator[None]:
    """Inside, `torch.inference_mode` is what a trace sees of it, no gradients, but where PyTorch itself enters it."""
    inference_mode: Any = torch.inference_mode
    begin, end = inference_mode.__enter__, inference_mode.__exit__

    def enter(mode: Any) -> None:
        mode.seen = None if _entered_by_torch() else torch.no_grad() if mode.mode else torch.enable_grad()
        begin(mode) if mode.seen is None else mode.seen.__enter__()

    def leave(mode: Any, *error: Any) -> None:
        end(mode, *error) if mode.seen is None else mode.seen.__exit__(*error)

    with mock.patch.multiple(inference_mode, __enter__=enter, __exit__=leave):
        yield


_DECORATORS = torch.inference_mode.__call__.__module__
"""Where modes are made decorators."""


def _entered_by_torch() -> bool:
    """Whether what enters a mode is code of PyTorch's, but for what makes a decorator of a mode."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == _DECORATORS:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch"


def host_draws() -> tuple:
    """Changes when Python's random or numpy's global generator is drawn from."""
    numpy: Any = sys.modules.get("numpy")
    return random.getstate(), numpy and [getattr(part, "tolist", lambda p=part: p)() for part in numpy.random.get_state()]


