"""feed: the local inputs of one rank's program: parts of parameters, buffers, constants, a seed, and what the user passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fxpar import compat
from fxpar.errors import InputError
from fxpar.program import Program, Source
from fxpar.run.gradients import Receipt, UnreducedGradients
from fxpar.run.reached import Reached
from fxpar.run.steps import Microbatch

ModuleSlot = tuple[dict[str, Any], str]
"""The table of a module, and the name in it, of a parameter or buffer."""


def value_of(source: Source, places: Mapping[str, ModuleSlot], device: torch.device, named: Mapping[str, Any], seed: int) -> Any:
    """What a program takes for one source, of a parameter this rank's part; see `Feed`."""
    if source.kind in ("param", "buffer"):
        table, key = places[source.name]
        return table[key] if source.kind == "buffer" else compat.local_part(table[key])
    if source.kind == "constant":
        return _constant(source, device)
    if source.kind == "seed":
        return torch.full((), seed, dtype=torch.int64, device=device)  # the host waits for no copy
    leaf = named[source.name]
    return leaf.to(device).contiguous() if isinstance(leaf, Tensor) else leaf


def _constant(source: Source, device: torch.device) -> Any:
    if source.place is None:
        source.value = source.value.to(device)
        return source.value
    table, key = source.place
    value = table[key]
    if not isinstance(value, Tensor) or value.shape != source.value.shape or value.dtype != source.value.dtype:
        raise InputError(f"the attribute {key!r} that the forward reads is no longer a tensor of shape "
                         f"{tuple(source.value.shape)} and dtype {source.value.dtype}; register it as a buffer")
    return value.detach().to(device).contiguous()


class _ToLocal(torch.autograd.Function):
    """DTensor parameters -> this rank's tensors; gradients come back as DTensors of the same placements.

    `receipt` is told of the gradients of plain tensors that pass through after them. What the backward pass did not come to, as
    `reached` knows, has no gradient.
    """

    @staticmethod
    def forward(ctx, receipt: Receipt, reached: Reached, count: int, *tensors: Tensor):
        ctx.receipt, ctx.reached, ctx.parameters = receipt, reached, tensors[:count]
        ctx.set_materialize_grads(False)
        return (*map(compat.local_part, ctx.parameters), *(t.detach() for t in tensors[count:]))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads):
            raise InputError("a second derivative with respect to parameters (create_graph=True): none is computed of what ranks "
                             "hold parts of; derive with respect to inputs, or on the plain model, inside of "
                             "`with module.gathered()`")
        n = len(ctx.parameters)
        with compat.ranged("fxpar: gradients"):
            ctx.receipt(grads[n:], ctx.reached)
            pairs = zip(ctx.parameters, ctx.reached.of_parameters(grads[:n]), strict=True)
            like = [None if g is None else compat.like_dtensor(g, p) for p, g in pairs]
        return (None, None, None, *like, *[None] * (len(grads) - n))


@dataclass
class _Linked:
    """Parameters, their memory, and tensors that share it, through which gradients come back to them."""

    parameters: list[Tensor]
    memory: list[Tensor]
    state: tuple[list[bool], list[int]]
    local: tuple[Tensor, ...]
    node: Any


class Feed:
    """The local inputs of `program`, call by call.

    places: where its parameters and buffers are found, by name; they are looked up at every call. traced: see `Reached`; that of
    the last call is `reached`. Tensors that share memory with
    the parameters are made once, and again when a parameter was replaced, moved or frozen: a step's first kernel need
    not wait for hundreds of them.
    """

    def __init__(self, program: Program, places: dict[str, ModuleSlot], gradients: UnreducedGradients, device: torch.device,
                 traced: bool = False):
        self.program, self.places, self.device = program, places, device
        self._receipt = Receipt(gradients)
        self._linked_reached = self.reached = Reached(program, traced)
        self._parameters = [places[s.name] for s in program.sources if s.kind == "param"]
        self._linked: _Linked | None = None

    def __call__(self, named: dict[str, Any], microbatch: Microbatch | None = None, seed: int = 0) -> list[Any]:
        """The program's inputs, and at the end those that `microbatch` takes besides.

        named: path -> what the user passed; programs take it contiguous, as they were captured. seed: what dropout draws from.
        """
        parameters = [table[key] for table, key in self._parameters]
        self.reached = self._linked_reached if microbatch is None else self._linked_reached.of_another_call()
        if microbatch is not None:
            locals_ = iter(_ToLocal.apply(microbatch.receipt, self.reached, len(parameters), *parameters, *microbatch.detached))
        elif parameters and torch.is_grad_enabled():
            locals_ = iter(self._link(parameters))
        else:
            locals_ = (None if p is None else compat.local_part(p) for p in parameters)  # None: on ranks of another kind
        feed: list[Any] = []
        for source in self.program.sources:
            if source.kind == "param":
                feed.append(next(locals_))
            else:
                feed.append(value_of(source, self.places, self.device, named, seed))
        return [*feed, *locals_, *(microbatch.inputs if microbatch is not None else ())]

    def _link(self, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        """The parameters' parts on this rank, from which gradients come back to them."""
        memory = [compat.memory(p) for p in parameters]
        state = compat.want_gradients(parameters), [m.data_ptr() for m in memory]
        made = self._linked
        if made is not None and all(map(is_, parameters, made.parameters)) and all(map(is_, memory, made.memory)) \
                and state == made.state and all(t.grad_fn is made.node for t in made.local):
            return made.local
        compat.attach_hooks(parameters)
        local = _ToLocal.apply(self._receipt, self._linked_reached, len(parameters), *parameters)
        self._linked = _Linked(parameters, memory, state, local, local[0].grad_fn)
        return local
