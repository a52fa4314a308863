"""calls: what ``module(...)`` does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

CALLED = "_compiled_call_impl"
"""The attribute of a module that is called in its place."""


def call_by(module: torch.nn.Module, function: Callable | None) -> None:
    """Have ``module(...)`` call `function`, or what it called before any was given; copies and pickles of it do not. A module
    whose user compiled it is left alone."""
    if isinstance(module.__dict__.get(CALLED), functools.partial):
        del module.__dict__[CALLED]
    if function is not None and module.__dict__.get(CALLED) is None:
        module.__dict__[CALLED] = function


def call_plainly(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``module(...)`` does where `call_by` was given nothing: its hooks and its forward."""
    return module._call_impl(*args, **kwargs)
