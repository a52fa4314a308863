"""generators: who asks PyTorch's own random generators for their state or seed, or sets one, and who draws from them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import fx, random

_FILES = tuple(os.path.join(os.path.dirname(torch.__file__), *path.split("/")) for path in (
    "random.py", "cuda/random.py", "cuda/__init__.py", "_compile.py", "_dynamo/eval_frame.py"))  # fmt: skip
"""Of the functions that only pass on what they are asked (`torch.get_rng_state`, `torch.cuda.manual_seed`)."""


@contextlib.contextmanager
def generators_watched(asked: Callable[[str, FrameType], None]) -> Iterator[None]:
    """Inside, whoever asks for the state or seed of a default generator, or sets one, is told of first: ``asked(name, frame)``,
    the name of the function that was called, and the frame that called it. Drawing random numbers is no question."""
    cuda = torch.cuda.default_generators
    torch.default_generator = random.default_generator = _Watched(random.default_generator, asked)  # type: ignore[assignment]
    if cuda:  # CUDA is initialised
        torch.cuda.default_generators = tuple(_Watched(each, asked) for each in cuda)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.default_generator = random.default_generator = torch._C.default_generator
        if cuda:
            torch.cuda.default_generators = cuda


class _Watched:
    """A generator, which tells of what is looked at of it."""

    def __init__(self, generator: torch.Generator, asked: Callable[[str, FrameType], None]):
        self._generator, self._asked = generator, asked

    def __getattr__(self, name: str) -> Any:
        frame: Any = sys._getframe(1)
        called = name
        while frame.f_code.co_filename in _FILES and frame.f_back is not None:
            called, frame = frame.f_code.co_name if hasattr(random, frame.f_code.co_name) else called, frame.f_back
        self._asked(called, frame)
        return getattr(self._generator, name)


def _draws_nothing(node: fx.Node) -> bool:
    """Whether an operator that may draw random numbers does not: attention without dropout."""
    target: Any = node.target
    arguments = target._schema.arguments
    place = next((i for i, a in enumerate(arguments) if a.name == "dropout_p"), None)
    if place is None:
        return False
    given: Any = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", arguments[place].default_value)
    return bool(given == 0)


def mend_states() -> None:
    """Have AOTAutograd keep no state of PyTorch's generator for attention that draws nothing and is computed again (torch 2.11 to
    2.13): it hands states of generators to the compiled code for it, which then cannot be recorded, and sets them layer by layer.
    """
    partitioners: Any = importlib.import_module("torch._functorch.partitioners")
    asked = partitioners.has_recomputable_rng_ops
    if hasattr(asked, "__wrapped__"):
        return

    @functools.wraps(asked)
    def draws_again(module: fx.GraphModule) -> bool:
        return asked(module) and not all(_draws_nothing(n) for n in module.graph.nodes
                                         if is_random(n.target) and partitioners.must_recompute(n))

    partitioners.has_recomputable_rng_ops = draws_again


def is_random(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
