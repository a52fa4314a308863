"""calls: what ``module(...)`` does, and what is called in it."""

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


def is_grouped_product(function: Any) -> bool:
    """Whether a function that is being called, as a ``TorchFunctionMode`` sees it, is PyTorch's grouped matrix product."""
    packet = torch.ops.aten._grouped_mm
    return function in (torch._grouped_mm, packet, packet.default)


pack_rows: Any = torch._VF._pack_padded_sequence
"""What `torch.nn.utils.rnn.pack_padded_sequence` calls."""
