"""numbers: Python floats among a call's arguments that change from step to step (a temperature, a coefficient of a loss).

A number is part of the program that it was captured in. When it comes with another value, the model is captured once more with a
tensor without dims in its place: in float64, so that what Python computes with it is as exact, and as with a number, tensors
with dims decide of the dtype. If the forward takes it (no branch depends on it, no operator insists on a number), that program
serves all values. Otherwise every value is a program, as integers, texts and switches are.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from fxpar.errors import CaptureError
from fxpar.model.inputs import Call, leaves
from fxpar.program import Program, user_line

aten = torch.ops.aten


class Numbers:
    """Of one module: which of its numbers are tensors to its programs. device: where they are."""

    def __init__(self, device: torch.device):
        self.device = device
        self._first: dict[str, float] = {}
        self._tensors: set[str] = set()
        self._parts: set[str] = set()
        self._tried: set[str] = set()

    def prepared(self, call: Call) -> Call:
        """The call with tensors for those numbers that are seen to change."""
        self._tried = set()
        args, kwargs = call
        if not args and all(isinstance(v, torch.Tensor) for v in kwargs.values()):
            return call
        named = leaves(call)
        numbers = {path: x for path, x in named.items() if type(x) is float and path not in self._parts}
        self._tried = {p for p, x in numbers.items() if p not in self._tensors and self._first.setdefault(p, x) != x}
        self._tensors |= self._tried
        if self._tensors.isdisjoint(numbers):
            return call
        made = iter([torch.tensor(x, dtype=torch.float64, device=self.device) if path in self._tensors else x
                     for path, x in named.items()])
        return pytree.tree_map(lambda _: next(made), call)

    def checked(self, program: Program) -> Program:
        """`program`, which was made for the call that was prepared last. Raises `CaptureError` if it reads a number back that was
        tried as a tensor: for an operator that takes numbers alone."""
        back = next((n for n in program.graph.nodes if n.target in (aten.item.default, aten._local_scalar_dense.default)), None)
        if back is not None and self._tried:
            raise CaptureError("a number that is read back from a tensor", user_line(back) or None, "pass it as a number")
        return program

    def refused(self) -> bool:
        """The call that was prepared last cannot be captured. Whether a number may be why: it will be part of programs from now
        on."""
        self._tensors -= self._tried
        self._parts |= self._tried
        return bool(self._tried)
