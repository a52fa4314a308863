"""writes: what is written to a DTensor through a view of it, and what DTensor computes of the rank's part alone.

Where a view is of memory that no rank has alone (the first row of a table that is split by rows), DTensor makes a copy, and a
write to that is lost without a word. It draws random numbers for a rank's part alone (on CPUs), and has a factory write to the
part what is as large as the whole (torch 2.13). And what it has no rule for, but can write with other operators, it computes of a
rank's part as if that were all: the gradient of a `mse_loss` is as many times too large as there are parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.distributed.tensor import DTensor, Replicate, _dtensor_spec, _redistribute
from torch.utils import _pytree as pytree

from fxpar.compat.numbers import in_full

aten = torch.ops.aten
DRAWS = (
    aten.normal_.default, aten.uniform_.default, aten.bernoulli_.float, aten.bernoulli_.Tensor, aten.exponential_.default,
    aten.log_normal_.default, aten.cauchy_.default, aten.geometric_.default, aten.random_.default, aten.random_.to,
    getattr(aten.random_, "from"), aten.rand_like.default, aten.randn_like.default, aten.randint_like.default,
    aten.randint_like.low_dtype, aten.bernoulli.default, aten.bernoulli.p, aten.native_dropout.default, aten.multinomial.default,
    aten.normal.Tensor_float, aten.normal.Tensor_Tensor,
)  # fmt: skip
"""Operators that draw as many random numbers as a tensor has elements."""
MADE = (aten.eye.out, aten.eye.m_out)
"""Operators that make a tensor of the shape they are told, in the memory they are given."""
WRITES = (
    aten.masked_fill_.Scalar, aten.masked_fill_.Tensor, aten.tril_.default, aten.triu_.default,
    aten.renorm_.default, aten.index_fill_.int_Scalar, aten.index_fill_.int_Tensor, aten.index_copy_.default,
    aten.index_put_.default, aten.scatter_.value, aten.scatter_.src,
)  # fmt: skip
"""Operators that write to a tensor, and that DTensor has a rule for in some layouts, or beside no plain tensors."""
FILLS = (aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default)
"""What PyTorch writes to the view of a tensor that is assigned to: ``weight[0] = 1``."""
MISSING = (
    aten.nonzero.default, aten.bincount.default, aten._cdist_forward.default, aten._cdist_backward.default,
    aten.avg_pool2d_backward.default, aten.max_pool2d_with_indices_backward.default, aten.renorm.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default, aten.masked_select.default, aten.histc.default,
    aten.masked_scatter.default, aten.kthvalue.default, aten.median.default, aten.median.dim, aten.mode.default,
    aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default,
)  # fmt: skip
"""Operators that DTensor cannot compute at all in some layouts."""
VIEWS = (
    aten.select.int, aten.slice.Tensor, aten.diagonal.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.view.default, aten.unfold.default,
)  # fmt: skip
"""Operators that return a view where no rank has to get anything from another one."""
_TENSOR = torch._C.TensorType.get()


class CopiedPart(DTensor):
    """A part of a DTensor that is a copy: what is written to it is written to the tensor that it is a part of, on all ranks."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return call_on_parts(func, args, kwargs or {})


def call_on_parts(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function returns that is called outside of `__torch_function__`; what it writes to a `CopiedPart` is written back.

    What it returns that lies in such a part's memory is a part, too.
    """
    before = {id(t): (t, None if t.is_inference() else t._version) for t in _tensors(args, kwargs) if isinstance(t, CopiedPart)}
    made = func(*args, **kwargs)
    written = [t for t, version in before.values() if version is None or t._version != version]
    for t in written:
        _write_back(t)
    if before and args and id(args[0]) in before and not written:
        return _parts(made, func, args, kwargs, lambda t: not isinstance(t, CopiedPart) and _shares_memory(t, args[0]))
    return made


@functools.cache
def write_whole(before_draws: Callable[[Any], None]) -> None:
    """Have writes to parts of a DTensor reach it, and what needs all of one computed of all of it, on each of its ranks.

    before_draws: is called with a DTensor before random numbers are drawn for it. Its ranks draw the same ones, each for all of
    it, as one device would.
    """
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers

    def draw(operator: Any, args: Any, kwargs: Any) -> Any:
        before_draws(next(_tensors(args, kwargs)))
        return in_whole(operator, args, kwargs)

    def write(operator: Any, args: Any, kwargs: Any) -> Any:
        try:
            return _by_itself(handlers, operator, args, kwargs)
        except (RuntimeError, NotImplementedError):  # it has no rule, or none that leaves the tensor where it is
            return in_whole(operator, args, kwargs)

    def fill(operator: Any, args: Any, kwargs: Any) -> Any:
        made = write(operator, args, kwargs)
        if isinstance(args[0], CopiedPart):
            _write_back(args[0])
        return made

    def view(operator: Any, args: Any, kwargs: Any) -> Any:
        made = _by_itself(handlers, operator, args, kwargs)
        of_copy = isinstance(args[0], CopiedPart)
        return _parts(made, operator, args, kwargs, lambda t: of_copy or not _shares_memory(t, args[0]))

    def whole(operator: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(t, Tensor) and not isinstance(t, DTensor) and t.dim() for t in pytree.tree_leaves((args, kwargs))):
            return _by_itself(handlers, operator, args, kwargs)  # which says that plain tensors are mixed with it
        return in_whole(operator, args, kwargs)

    def write_list(operator: Any, args: Any, kwargs: Any) -> Any:
        made = _by_itself(handlers, operator, args, kwargs)
        torch.autograd.graph.increment_version([t for t in args[0] if isinstance(t, DTensor)])
        return made

    for operators, handler in ((_without_rule(), whole), (DRAWS, draw), (MADE, in_whole), (WRITES, write), (FILLS, fill),
                               (VIEWS, view), (_of_lists(), write_list)):
        handlers.update(dict.fromkeys(operators, handler))


def version(tensor: Any) -> tuple[int, int]:
    """Changes with writes to a DTensor; with those of operators that write to lists once `write_whole` was called."""
    return tensor._version, tensor._local_tensor._version


def _of_lists() -> list[Any]:
    """Operators that write to each tensor of a list (``torch._foreach_mul_``), which autograd is told of for tensors, and not for
    DTensors."""
    names = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    packets = [getattr(aten, name) for name in sorted(names) if name.startswith(("_foreach_", "_fused_")) and name.endswith("_")]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def _without_rule() -> list[Any]:
    """Operators that DTensor has no rule for but those of the operators that they can be written with: it computes them of the
    part, as if that were all (a mean, the gradient of a mean)."""
    sharding: Any = DTensor._op_dispatcher.sharding_propagator
    tables = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")
    ruled = {operator for table in tables for operator in getattr(sharding, table, ())}
    handled = DTensor._op_dispatcher._custom_op_handlers
    return [o for o in (*decomposition_table, *MISSING) if o not in ruled and o not in handled and _makes_tensors(o)]


def _makes_tensors(operator: Any) -> bool:
    """Whether the operator computes new tensors of tensors, not element by element, and writes to none."""
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "aten" or operator._schema.is_mutable:
        return False
    if torch.Tag.pointwise in operator.tags:
        return False  # a part's elements are those of the whole
    taken, made = operator._schema.arguments, operator._schema.returns
    return any("Tensor" in str(a.type) for a in taken) and all(r.type.isSubtypeOf(_TENSOR) for r in made) and \
        not _is_view(operator)


def _by_itself(handlers: dict[Any, Any], operator: Any, args: Any, kwargs: Any) -> Any:
    """What DTensor makes of an operator that has a handler. (Another thread may be in the middle of the same.)"""
    handler = handlers.pop(operator, None)
    try:
        return operator(*args, **kwargs)
    finally:
        if handler is not None:
            handlers[operator] = handler


def _shares_memory(made: Any, base: Any) -> bool:
    mine, local = base._local_tensor, made._local_tensor
    return mine.is_meta or local.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()


def apply_by(instead: Callable[..., Any]) -> None:
    """Have ``instead(dtensor, function, ...)`` run for `apply_`, `map_` and `map2_` of a DTensor, which read memory that it does
    not have: PyTorch's end the process (torch 2.11 to 2.15)."""
    dtensor: Any = DTensor
    dtensor.apply_ = dtensor.map_ = dtensor.map2_ = instead


def in_whole(operator: Any, args: Any, kwargs: Any) -> Any:
    """What the operator makes of all of its DTensors, and of plain tensors, which are whole; each rank keeps its part."""
    whole = {id(t): in_full(t) for t in _tensors(args, kwargs)}
    given = pytree.tree_map_only(DTensor, lambda t: whole[id(t)], (args, kwargs))
    made = operator(*given[0], **given[1])
    written = [t for t in _written(operator, args, kwargs) if isinstance(t, DTensor)]
    for t in written:
        _put(t, whole[id(t)])
    likes = {t.shape: t for t in _tensors(args, kwargs)}
    like = next(_tensors(args, kwargs))
    return written[0] if written else pytree.tree_map_only(Tensor, lambda t: _split_as(likes.get(t.shape, like), t), made)


def _tensors(args: Any, kwargs: Any) -> Iterator[Any]:
    return (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, DTensor))


def _written(operator: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the operator writes to."""
    found = [(i, a.name) for i, a in enumerate(operator._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return [t for i, name in found for t in pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(name))]


@functools.cache
def _is_view(operator: Any) -> bool:
    """Whether the operator returns what lies in the memory of an argument, and writes nothing."""
    schema = operator._schema
    return any(r.alias_info is not None for r in schema.returns) and not schema.is_mutable


def _parts(made: Any, view: Any, args: Any, kwargs: Any, which: Callable[[Any], bool]) -> Any:
    """Have the DTensors that a view of ``args[0]`` is made of, or those of them, know what they are a part of."""
    for i, t in enumerate(made if isinstance(made, list | tuple) else [made]):
        if isinstance(t, DTensor) and which(t):
            t.__class__ = CopiedPart
            t.__dict__["part_of"] = (view, args, kwargs, i if isinstance(made, list | tuple) else None)
    return made


def _write_back(t: Any) -> None:
    """Write what is in a part to what it is a part of, and so on."""
    while isinstance(t, CopiedPart):
        view, (base, *args), kwargs, index = t.__dict__["part_of"]
        whole = in_full(base)
        views = view(whole, *args, **kwargs)
        (views if index is None else views[index]).copy_(in_full(t))
        _put(base, whole)
        t = base


def _put(t: Any, whole: Tensor) -> None:
    if any(p.is_partial() for p in t._spec.placements):
        t._local_tensor, t._spec = whole, _replicated(t._spec)
        return
    mine = _split(whole, t._spec)
    if mine.data_ptr() != t._local_tensor.data_ptr():
        t._local_tensor.copy_(mine)


def _split(whole: Tensor, spec: Any) -> Tensor:
    return _redistribute.redistribute_local_tensor(whole, _replicated(spec), spec)


def _replicated(spec: Any) -> Any:
    return _dtensor_spec.DTensorSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, tensor_meta=spec.tensor_meta)


def _split_as(like: Any, whole: Tensor) -> DTensor:
    """As a DTensor in the layout of another one of this shape; otherwise every rank keeps all of it."""
    spec = like._spec
    alike = whole.shape == like.shape
    placements = tuple(p if alike and not p.is_partial() else Replicate() for p in spec.placements)
    meta = _dtensor_spec.TensorMeta(whole.shape, whole.stride(), whole.dtype)
    made = _dtensor_spec.DTensorSpec(spec.mesh, placements, tensor_meta=meta)
    make: Any = DTensor
    return make(_split(whole, made), made, requires_grad=False)
