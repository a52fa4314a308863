"""differentiable: a function whose forward and backward are code of two graphs, for autograd."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxpar import compat
from fxpar.backends.like import Like


def differentiable(forward: compat.Code, backward: compat.Code, outputs: int, seeds: Sequence[int], like: Sequence[Like],
                   donated: Collection[int]) -> Callable[..., tuple[Tensor, ...]]:
    """A function over flat inputs that autograd sees as one operator.

    forward: takes a list of the inputs, which it empties; gives the outputs, so many tensors, and behind them what the backward
    takes. backward: takes a list of that and of the gradients of the outputs `seeds`, in their order, laid out `like` these;
    gives a gradient, or None, for each input. donated: what of the backward's inputs it may overwrite; where a backward may come
    again (``retain_graph``), it is handed copies of these. A gradient has no gradient.
    """

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            with compat.as_traced():
                made = list(forward([*inputs]))
            ctx.save_for_backward(*made[outputs:])
            ctx.mark_non_differentiable(*(made[i] for i in range(outputs) if i not in seeds))
            return tuple(made[:outputs])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            given = [*ctx.saved_tensors, *(shape.of(grads[i], i) for i, shape in zip(seeds, like, strict=True))]
            del grads
            if compat.keeps_graph():
                given = [x.clone() if i in donated else x for i, x in enumerate(given)]
            ctx.maybe_clear_saved_tensors()
            with compat.as_traced():
                return tuple(backward(given))

    return Compiled.apply
