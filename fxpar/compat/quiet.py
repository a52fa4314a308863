"""What PyTorch does beside what it is asked to do, left out for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch


def no_torch_function() -> contextlib.AbstractContextManager:
    """Inside, classes derived from Tensor do not see the functions that are called on them."""
    return torch._C.DisableTorchFunctionSubclass()


@contextlib.contextmanager
def quiet_traces() -> Iterator[None]:
    """Inside, operators that fail on fake tensors raise, and write no traceback to the log besides."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
