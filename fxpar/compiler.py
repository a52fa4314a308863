"""The list of passes: what happens between a user's model and a program that a backend can run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxpar import mesh as meshes
from fxpar.passes.axes import refine_axes
from fxpar.passes.capture import capture
from fxpar.passes.dropout import counter_dropout
from fxpar.passes.gqa import fold_repeat_kv
from fxpar.passes.infer import infer
from fxpar.passes.layout import Tiling
from fxpar.passes.losses import expand_losses
from fxpar.passes.masks import fold_masks
from fxpar.passes.partition import partition
from fxpar.passes.place import place
from fxpar.passes.simplify import simplify
from fxpar.plan import Plan
from fxpar.program import Program

Pass = Callable[[Program], Program]
Observer = Callable[[str, Program], None]


def passes(pinned: dict[str, Tiling] | None = None) -> list[tuple[str, Pass]]:
    """The passes after capture, in order."""
    return [
        ("simplify", simplify),
        ("masks", fold_masks),
        ("gqa", fold_repeat_kv),
        ("losses", expand_losses),
        ("dropout", counter_dropout),
        ("infer", lambda p: infer(p, pinned)),
        ("axes", refine_axes),
        ("place", lambda p: place(p, pinned)),
        ("partition", partition),
    ]


def compile_program(model: nn.Module, plan: Plan, args: tuple, kwargs: dict[str, Any], device: torch.device,
                    pinned: dict[str, Tiling] | None = None, observe: Observer | None = None) -> Program:
    """Capture `model` on global inputs and run the passes: the program of one rank.

    `observe(name, program)` is called after capture and after every pass. `program.timings` has the seconds of each.
    """
    timings: dict[str, float] = {}
    start = time.perf_counter()
    program = capture(model, plan, meshes.from_plan(plan), args, kwargs, device)
    for name, apply in [("capture", lambda p: p), *passes(pinned)]:
        program = apply(program)
        timings[name] = time.perf_counter() - start
        if observe is not None:
            observe(name, program)
        start = time.perf_counter()
    program.timings = timings
    return program
