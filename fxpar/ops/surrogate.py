"""Gradients that a program takes from elsewhere than from its values: those of custom autograd Functions and of tensor hooks.

`attach` and `fixed` run. `cotangent`, `function` and `hook` are marks that a trace leaves, which hold the operators of a
backward between them; `fxpar.passes.capture.functions` replaces them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, linear: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


def attach(value: Tensor, linear: Tensor) -> Tensor:
    """`value`, with the gradient of `linear`, which has its shape and dtype: what only `linear` needs is not computed forward in
    a compiled program."""
    return _Attach.apply(value, linear)


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ones_like(grad)


def fixed(x: Tensor) -> Tensor:
    """`x`, a scalar whose gradient is 1 whenever a backward passes it, whatever arrives."""
    return _Fixed.apply(x)


_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("cotangent(Tensor value) -> Tensor")
_library.define("function(Tensor[] values, Tensor[] inputs, Tensor[] cotangents, Tensor[] gradients, str name, str where)"
                " -> Tensor[]")
_library.define("hook(Tensor value, Tensor cotangent, Tensor gradient, str name, str where) -> Tensor")
cotangent = torch.ops.fxpar.cotangent.default
"""The gradient that will arrive at `value`: an unknown tensor like it."""
function = torch.ops.fxpar.function.default
"""`values`, each of which sends back `gradients` (one an input; made of `cotangents`, one a value) to `inputs`. `name`: of the
user's class; `where`: the line that called it."""
hook = torch.ops.fxpar.hook.default
"""From here on `gradient` (made of `cotangent`) is what arrives at `value`. The result is read by nobody."""


@torch.library.impl(_library, "cotangent", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::cotangent", lib=_library)
def _cotangent(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@torch.library.impl(_library, "function", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::function", lib=_library)
def _function(values: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(v) for v in values]


@torch.library.impl(_library, "hook", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::hook", lib=_library)
def _hook(value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(())
