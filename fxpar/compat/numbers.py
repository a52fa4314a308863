"""numbers: what is read from a DTensor with one element, and what DTensor has to be told for sums to be right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, _dtensor_spec, _op_schema, _redistribute
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.nn.utils import clip_grad


def read_numbers_of(whole: Callable[[Any], Tensor]) -> None:
    """Have the numbers of DTensors (``item()``, ``float()``, ``bool()``, a format) be those of ``whole(dtensor)``.

    DTensor by itself reads them from the rank's part, and formats none (torch 2.11 to 2.15).
    """
    read = torch.ops.aten._local_scalar_dense.default
    dtensor: Any = DTensor
    dtensor._op_dispatcher._custom_op_handlers[read] = lambda _, args, kwargs: read(whole(args[0]))
    dtensor.__format__ = _format


def _format(t: DTensor, spec: str) -> str:
    return t.item().__format__(spec) if spec and t.dim() == 0 else object.__format__(t, spec)


@functools.cache
def mend_searches_for_nan() -> None:
    """Have `torch.autograd.detect_anomaly` look for NaN in DTensors, each rank in its part: DTensor by itself has no rule for the
    operators that it looks by (torch 2.11 to 2.15)."""
    dispatcher: Any = DTensor._op_dispatcher
    for operator in (torch.ops.aten._is_any_true.default, torch.ops.aten._is_all_true.default):
        dispatcher._custom_op_handlers[operator] = lambda called, args, kwargs: called(args[0]._local_tensor)


def in_full(t: Any) -> Tensor:
    """All of a DTensor, without gradients, from inside of an operator of DTensors, too."""
    spec = t._spec
    full = _dtensor_spec.DTensorSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, tensor_meta=spec.tensor_meta)
    return _redistribute.redistribute_local_tensor(t._local_tensor.detach(), spec, full)


@functools.cache
def mend_writes_to_plain_tensors() -> None:
    """Have operators that write a DTensor with one element to a plain tensor (``total += loss``) return that tensor: DTensor by
    itself writes the whole number to it, and then raises an AssertionError without a text (torch 2.11 to 2.15)."""
    dispatcher: Any = DTensor._op_dispatcher
    end = dispatcher._dispatch_fast_path_python_tail

    def ended(operator: Any, args: Any, kwargs: Any, mesh: Any, sharding: Any, local: Any, there: bool, in_place: bool,
              out: bool) -> Any:
        if in_place and sharding.output_spec is not None and not isinstance(args[0], DTensor):
            return args[0]
        return end(operator, args, kwargs, mesh, sharding, local, there, in_place, out)

    dispatcher._dispatch_fast_path_python_tail = ended


@functools.cache
def mend_sums_of_norms() -> None:
    """Have DTensor sum norms (of columns) once they are whole: it takes the sum of each rank's norms for a part of a norm,
    in silence (torch 2.11 to 2.15)."""
    strategies = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    for operator in (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList):
        strategies[operator] = _of_whole_norms(strategies[operator])


def _of_whole_norms(strategy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(strategy)
    def made(schema: Any) -> Any:
        summed, *others = schema.args_schema
        specs = [s.output_spec for s in summed.strategies]
        if any(isinstance(p, _NormPartial) for spec in specs for p in spec.placements):
            whole = [_dtensor_spec.DTensorSpec(
                spec.mesh, tuple(Replicate() if isinstance(p, _NormPartial) else p for p in spec.placements),
                tensor_meta=spec.tensor_meta) for spec in specs]
            summed = _op_schema.OpStrategy([_op_schema.OpSpec(spec) for spec in whole])
            schema = _op_schema.OpSchema(schema.op, (summed, *others), schema.kwargs_schema)
        return strategy(schema)

    return made


@functools.cache
def before_norms(check: Callable[[Any], None]) -> None:
    """Have `torch.nn.utils.clip_grad_norm_` and ``get_total_norm`` call ``check(gradients)`` before they take a norm."""
    norm = clip_grad._get_total_norm

    @functools.wraps(norm)
    def checked(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        check(tensors)
        return norm(tensors, *args, **kwargs)

    clip_grad._get_total_norm = nn.utils.get_total_norm = checked
