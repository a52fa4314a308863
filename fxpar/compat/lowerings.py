"""lowerings: what Inductor makes of operators of fxpar that are more to it than calls."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def lower_as_concatenation(operator: Any) -> None:
    """Have Inductor compute the operands of ``operator(tensors, dim)`` in their places of the result."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    @register_lowering(operator, type_promotion_kind=None)
    def lower(tensors: Any, dim: int) -> Any:
        return ir.TensorBox(ir.ConcatKernel.create(tensors, dim))


@functools.cache
def lower_as_collective(operator: Any) -> None:
    """Have Inductor keep the first operand of an operator, which starts a collective, until its result is waited for, and make
    that operand contiguous where it is computed."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    @register_lowering(operator, type_promotion_kind=None)
    def lower(first: Any, *args: Any) -> Any:
        first = ir.ExternKernel.require_contiguous(first)
        started: Any = ir._CollectiveKernel.create_out_of_place(operator, first, *args)
        return ir.TensorBox.create(started)


@functools.cache
def lower_as_wait(operator: Any, called: Any) -> None:
    """Have Inductor take an operator of one operand, which returns it, for a wait: the operand is another value from then on, and
    what the collective that made it reads is kept until then. called: what code calls in its place; it returns nothing."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    @register_lowering(operator, type_promotion_kind=None)
    def lower(started: Any) -> Any:
        ir._WaitKernel.create_wait(called, started)
        return started
