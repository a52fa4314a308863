"""The values of nodes that depend on no input and no parameter, computed without making a large tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.passes.canonical import bands
from fxpar.passes.canonical.bands import Band, MaskValue, Plain

aten = torch.ops.aten

# A buffer or constant of the model with more elements than this is not looked at.
LIMIT_GIVEN = 1 << 24

# ---- which operators are understood, and as what ----

_FILLS = {
    aten.ones: True, aten.new_ones: True, aten.ones_like: True,
    aten.zeros: False, aten.new_zeros: False, aten.zeros_like: False,
}  # fmt: skip
# The position of the number they fill with.
_FILLS_WITH = {aten.full: 1, aten.full_like: 1, aten.new_full: 2}
# The same elements, at most in another dtype.
_COPIES = {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh,
           aten.lift_fresh_copy}  # fmt: skip
_RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as,
             aten.unsqueeze, aten.squeeze}  # fmt: skip
_EXPANSIONS = {aten.expand, aten.expand_as, aten.broadcast_to}
_SWAPS = {aten.transpose, aten.permute, aten.t, aten.swapaxes, aten.mT, aten.numpy_T}
_CUTS = {aten.slice, aten.select, aten.narrow}
_COMPARISONS = {aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.less, aten.less_equal,
                aten.greater, aten.greater_equal, aten.not_equal}  # fmt: skip
_DIFFERENCES = {aten.sub, aten.subtract, aten.add}
# Elementwise operators, most of which PyTorch does not tag as such.
_POINTWISE = {aten.__and__, aten.__or__, aten.where, aten.masked_fill, aten.floor_divide,
              *_COMPARISONS, *_DIFFERENCES}  # fmt: skip
# Operators that work along one dim: the position of the argument that says which, and its default.
_ALONG = {aten.cumsum: (1, -1), aten.diff: (2, -1), aten.cat: (1, 0)}
# Results that depend on memory or strides rather than on values.
_OF_MEMORY = ("empty", "as_strided", "resize", "set")


def is_fill(target: Any) -> bool:
    """Whether the operator's result depends on tensors only through their shapes and dtypes."""
    packet = getattr(target, "overloadpacket", None)
    return packet in _FILLS or packet in _FILLS_WITH


def is_function(target: Any) -> bool:
    """Whether the operator is one of ATen's whose result follows from the values of its arguments."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if compat.is_random(target) or compat.mutates(target):
        return False
    name = target.overloadpacket.__name__.lstrip("_")
    return not any(name.startswith(word) or f"_{word}" in name for word in _OF_MEMORY)


def given(t: Tensor) -> Plain | None:
    """The value of a buffer or constant; None where it is too large, or its elements are unknown."""
    unknown = t.is_meta or isinstance(t, compat.FakeTensor) or t.layout != torch.strided
    return None if unknown or not 0 < t.numel() <= LIMIT_GIVEN else bands.plain(t.detach().cpu())


def evaluate(node: fx.Node, values: Mapping[fx.Node, MaskValue | None]) -> MaskValue | None:
    """The value of `node`, given those of its arguments.

    Takes: a call with its (fake) result in ``meta["val"]``; the value of what it reads, unless it `is_fill`.
    Returns None for everything that is not understood, or would take more than `bands.LIMIT` elements.
    """
    out, target = node.meta.get("val"), node.target
    if not isinstance(out, Tensor) or not is_function(target):
        return None
    if not all(isinstance(n, int) for n in out.shape) or out.numel() == 0:
        return None
    if is_fill(target):
        return _fill(node, out)
    if any(values.get(n) is None for n in node.all_input_nodes):
        return None
    args, kwargs = _prepared((node.args, node.kwargs), values)
    try:
        with torch.no_grad():
            value = _rule(target)(target, args, kwargs, out)
    except (RuntimeError, IndexError):  # has no kernel for the CPU; or would fail when the model runs, too
        return None
    if value is None or value.data.dtype != out.dtype or value.shape != tuple(out.shape):
        return None
    return value


_BandRule = Callable[[Any, tuple, dict, Tensor], "MaskValue | None"]


def _rule(target: Any) -> _BandRule:
    packet = target.overloadpacket
    for packets, rule in _RULES:
        if packet in packets:
            return rule
    return _pointwise if compat.is_pointwise(target) else _small


def _prepared(tree: Any, values: Mapping[fx.Node, MaskValue | None]) -> Any:
    """The arguments with values for nodes, as they are for a computation on the CPU."""
    if isinstance(tree, fx.Node):
        return values[tree]
    if isinstance(tree, torch.device):
        return torch.device("cpu")
    if isinstance(tree, (list, tuple)):
        items = [_prepared(x, values) for x in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, dict):
        return {k: _prepared(v, values) for k, v in tree.items() if k != "pin_memory"}
    return tree


def _values(tree: Any) -> list[MaskValue]:
    """All values among the arguments."""
    if isinstance(tree, MaskValue):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [v for x in items for v in _values(x)]


def _call(target: Any, args: tuple, kwargs: dict, tensor_of: Callable[[MaskValue], Tensor]) -> Tensor:
    """Run the operator, with `tensor_of(value)` for each value among the arguments."""

    def put(tree: Any) -> Any:
        if isinstance(tree, MaskValue):
            return tensor_of(tree)
        return [put(x) for x in tree] if isinstance(tree, (list, tuple)) else tree

    return target(*map(put, args), **{k: put(v) for k, v in kwargs.items()})


# ---- the rules ----


def _fill(node: fx.Node, out: Tensor) -> MaskValue | None:
    packet = node.target.overloadpacket
    number: Any = _FILLS.get(packet)
    if number is None:
        at = _FILLS_WITH[packet]
        number = node.args[at] if len(node.args) > at else node.kwargs.get("fill_value")
    if not isinstance(number, (bool, int, float)):
        return None
    return Plain(tuple(out.shape), torch.full((1,) * out.dim(), number, dtype=out.dtype))


def _uniform(value: MaskValue, out: Tensor) -> MaskValue | None:
    """The same number in another shape, if `value` is but one number."""
    if isinstance(value, Band) or value.data.numel() > 1:
        return None
    return Plain(tuple(out.shape), value.data.reshape((1,) * out.dim()))


def _small(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    """Any function of small tensors: run it."""
    values = _values((args, kwargs))
    large = any(isinstance(v, Band) or math.prod(v.shape) > bands.LIMIT for v in values)
    if large or out.numel() > bands.LIMIT:
        return None
    return bands.plain(_call(target, args, kwargs, lambda v: v.full))


def _copy(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    value = args[0]
    return type(value)(value.shape, value.data.to(out.dtype))


def _reshape(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    value, shape = args[0], tuple(out.shape)
    if isinstance(value, Band):
        return bands.reshaped(value, shape)
    # `view` raises a RuntimeError where `reshape` would copy
    return _uniform(value, out) or bands.plain(
        value.full.reshape(shape) if out.numel() <= bands.LIMIT else value.full.view(shape)
    )


def _expand(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    value, shape = args[0], tuple(out.shape)
    return bands.reshaped(value, shape) if isinstance(value, Band) else bands.plain(value.full.expand(shape))


def _repeat(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    """Along the dims in which the tensor is uniform, that is no more than expanding it."""
    value, times = args
    added = len(times) - len(value.shape)
    if isinstance(value, Band):
        return Band(tuple(out.shape), value.data) if times[-2:] == [1, 1] else None
    if any(n > 1 and m != 1 for n, m in zip(value.data.shape, times[added:], strict=True)):
        return _small(target, args, kwargs, out)
    return Plain(tuple(out.shape), value.data.reshape((1,) * added + tuple(value.data.shape)))


def _swap(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    value, dims = args[0], args[1:]
    if isinstance(value, Plain):
        return bands.plain(target(value.full, *dims, **kwargs))
    if kwargs:
        return None
    order = list(range(out.dim()))
    if target.overloadpacket is aten.permute:
        order = [d % out.dim() for d in dims[0]]
    elif target.overloadpacket is aten.numpy_T:
        order.reverse()
    else:
        a, b = dims or (-2, -1)
        order[a], order[b] = order[b], order[a]
    return bands.permuted(value, order, tuple(out.shape))


def _cut(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    value = args[0]
    dim, start, _, step = args[1:] + (0, None, None, 1)[len(args) - 1 :]
    if isinstance(value, Plain):
        return bands.plain(target(value.full, *args[1:], **kwargs))
    if kwargs:
        return None
    dim %= len(value.shape)
    if target.overloadpacket is not aten.slice:
        return Band(tuple(out.shape), value.data) if dim < len(value.shape) - 2 else None
    if step != 1:
        return None
    size, start = value.shape[dim], start or 0
    return bands.sliced(value, dim, min(max(start + size if start < 0 else start, 0), size), tuple(out.shape))


def _triangle(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    if isinstance(args[0], Plain) and out.numel() <= bands.LIMIT:
        return _small(target, args, kwargs, out)
    boundary = args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
    return bands.triangle(args[0], target.overloadpacket is aten.tril, boundary)


def _along(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    """Uniform dims stay uniform, except the one that the operator works along."""
    at, default = _ALONG[target.overloadpacket]
    dim = args[at] if len(args) > at else kwargs.get("dim", default)
    values, dims = _values((args, kwargs)), out.dim()
    if not dims or any(isinstance(v, Band) or len(v.shape) != dims for v in values):
        return None
    common = [max(v.data.shape[d] for v in values) for d in range(dims)]
    sizes = {id(v): [v.shape[d] if d == dim % dims else n for d, n in enumerate(common)] for v in values}
    if sum(map(math.prod, sizes.values())) > bands.LIMIT:
        return None
    result = _call(target, args, kwargs, lambda v: v.data.expand(sizes[id(v)]))
    return bands.plain(result.expand(out.shape))


def _index(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    """Whatever is picked from a uniform tensor is uniform (picks out of range are an error, and not ours)."""
    source, picks = args
    uniform = _uniform(source, out)
    if uniform is None or not all(isinstance(p, Plain) and p.data.dtype == torch.int64 for p in picks):
        return _small(target, args, kwargs, out)
    limits = zip(picks, source.shape, strict=False)
    return uniform if all(-n <= int(p.data.min()) and int(p.data.max()) < n for p, n in limits) else None


def _pointwise(target: Any, args: tuple, kwargs: dict, out: Tensor) -> MaskValue | None:
    """On the distinct elements; where those of the result would be too many, on one of each diagonal."""
    values = _values((args, kwargs))
    if not any(isinstance(v, Band) for v in values):
        if math.prod(torch.broadcast_shapes(*(v.data.shape for v in values))) <= bands.LIMIT:
            return bands.plain(_call(target, args, kwargs, lambda v: v.data).expand(out.shape))
    if out.dim() < 2:
        return None
    rows, columns = out.shape[-2:]
    data = None
    if target.overloadpacket in _COMPARISONS | _DIFFERENCES and len(values) == len(args) == 2 and not kwargs:
        data = bands.of_ranges(target, values[0], values[1], rows, columns)
    if data is None:
        lines: dict[int, Tensor] = {}
        for value in values:
            line = bands.diagonals(value, rows, columns)
            if line is None:
                return None
            lines[id(value)] = line
        data = _call(target, args, kwargs, lambda v: lines[id(v)])
    return bands.from_diagonals(tuple(out.shape), data)


_RULES: list[tuple[Any, _BandRule]] = [
    (_COPIES, _copy), (_RESHAPES, _reshape), (_EXPANSIONS, _expand), ({aten.repeat}, _repeat),
    (_SWAPS, _swap), (_CUTS, _cut), ({aten.tril, aten.triu}, _triangle), (_ALONG, _along),
    ({aten.index}, _index), (_POINTWISE, _pointwise),
]  # fmt: skip
