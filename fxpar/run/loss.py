"""loss: which part of a model's output is its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxpar.errors import InputError
from fxpar.program import Program
from fxpar.sharding.facts import full_value


def loss_of(outputs: Any) -> Tensor:
    """The loss in a model's output: `.loss`, or its only floating scalar. Raises `InputError` if there is none."""
    loss = getattr(outputs, "loss", None)
    scalars = [loss] if isinstance(loss, Tensor) else [
        t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()]
    if not scalars:
        raise InputError("train_step needs a loss: the model's output has no `.loss` and no floating-point scalar "
                         "(for Hugging Face models pass labels)")
    return scalars[0]


def loss_among(program: Program) -> int | None:
    """Which of the program's tensor outputs (see `Program.tensor_sinks`) is the loss; None if none is."""
    marks = [torch.zeros(full_value(n).shape, dtype=full_value(n).dtype, device="meta") for n in program.outputs()]
    values = iter([m for m, s in zip(marks, program.tensor_sinks(), strict=True) if s.kind == "output"])
    flat = [s.constant if s.kind == "literal" else next(values) for s in program.sinks if s.kind in ("output", "literal")]
    try:
        loss = loss_of(pytree.tree_unflatten(flat, program.out_spec))
    except InputError:
        return None
    return next(i for i, mark in enumerate(marks) if mark is loss)
