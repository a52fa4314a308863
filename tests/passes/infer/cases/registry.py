"""The table operator -> random arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.harness import Gen

aten = torch.ops.aten
Call = tuple[tuple, dict[str, Any]]
CASES: dict[Any, Callable[[Gen], Call]] = {}
UNDEFINED: set[Any] = {
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
}
"""Operators whose elements are undefined."""


def case(*targets: Any, **fixed: Any):
    """Register a generator of arguments; it returns the positional ones, or (those, keyword ones)."""

    def register(function):
        def make(gen: Gen) -> Call:
            made = function(gen, **fixed)
            return made if len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict) else (made, {})

        for target in targets:
            assert target not in CASES, target
            CASES[target] = make
        return function

    return register
