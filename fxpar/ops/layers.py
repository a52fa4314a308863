"""Marks of layers in a trace: where one begins and ends, and that another one is as it was.

They do not run: `fxpar.passes.capture.layers` leaves them while a model is traced, and replaces them afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("layer_begins(Tensor[] given, int number) -> Tensor")
_library.define("layer_ends(Tensor[] made, int number) -> Tensor")
_library.define("layer_again(Tensor[] given, Tensor[] made, int like) -> Tensor[]")
begins = torch.ops.fxpar.layer_begins.default
"""From here on a layer computes, whose number this is; `given` are its inputs, parameters and buffers. The result is an output
of the trace, so that the mark stays."""
ends = torch.ops.fxpar.layer_ends.default
"""Up to here; `made` is what it returns."""
again = torch.ops.fxpar.layer_again.default
"""What the layer number `like` made of what it was given, made of `given`: tensors like those in `made`."""


@torch.library.impl(_library, "layer_begins", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::layer_begins", lib=_library)
def _begins(given: list[Tensor], number: int) -> Tensor:
    return given[0].new_empty(())


@torch.library.impl(_library, "layer_ends", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::layer_ends", lib=_library)
def _ends(made: list[Tensor], number: int) -> Tensor:
    return made[0].new_empty(())


@torch.library.impl(_library, "layer_again", "CompositeExplicitAutograd")
@torch.library.register_fake("fxpar::layer_again", lib=_library)
def _again(given: list[Tensor], made: list[Tensor], like: int) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in made]


def _no_gradient(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("a mark in a trace has no gradient")


torch.library.register_autograd("fxpar::layer_again", _no_gradient, lib=_library)
