"""operators: what every operator of a program takes on one rank: floating-point operations and bytes, from shapes alone.

Shapes are found by walking the graph on meta tensors, which have no elements. Operators of equal operands are looked at once, so
that a model of many equal layers takes little longer than one of a few. Floating-point operations are those of
PyTorch's own counter (`torch.utils.flop_counter`), forward and, of what autograd makes of it, backward; operators that it does
not see into have a formula here, which `formula` registers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from fxpar.ops.attention import windowed_attention
from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.experts import product_of_mine
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.ops.ring import chunks
from fxpar.ops.ring import costs as ring
from fxpar.ops.ring.chunks import attention_of_chunks
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.runtime import LoneRuntime, group_of, use_runtime
from fxpar.ops.vocabulary import RESHAPES, SDPA, is_view
from fxpar.program import Program
from fxpar.sharding.facts import local_value
from fxpar.sharding.layout import shard_shape
from fxpar.sharding.mesh import Axes

aten = torch.ops.aten
META = torch.device("meta")
CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
                aten.conv3d.padding, aten.convolution.default)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of one rank, but for its elements. requires_grad: whether a gradient may flow back through it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """A meta tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META, requires_grad=self.requires_grad)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operator takes when it runs by itself.

    forward, backward: floating-point operations of matrix products, convolutions and attention (a multiply-add counts two);
    of the backward pass those of all gradients that are wanted. read, written: bytes of the forward pass; none of a view.
    """

    forward: int = 0
    backward: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Costs:
    """Of the nodes of a program: values (a `TensorSpec`; a tuple of them for an operator of several results; a number or None as
    it is) and, of the operators, costs."""

    values: dict[fx.Node, Any]
    costs: dict[fx.Node, Cost]


Formula = Callable[..., tuple[int, int]]
_FORMULAS: dict[Any, Formula] = {}


def formula(*targets: Any) -> Callable[[Formula], Formula]:
    """Register what counts an operator: a function of its arguments (with meta tensors), which returns the floating-point
    operations forward and backward."""

    def register(count: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(targets, count))
        return count

    return register


def measure(program: Program) -> Costs:
    """The values and costs of every node of a program; of one that is partitioned, as one rank holds and computes them.

    Of the layouts this takes what `partition` recorded of placeholders; of a collective that its result on every rank has one
    shape. The program is left as it is. Raises: what an operator raises on meta tensors.
    """
    values: dict[fx.Node, Any] = {}
    costs: dict[fx.Node, Cost] = {}
    known: dict[Any, tuple[Any, Cost]] = {}
    mesh, sources = program.mesh, program.source_of()
    with use_runtime(LoneRuntime(dict(zip(mesh.names, mesh.sizes, strict=True)))), torch.enable_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                source = sources[node]
                if not isinstance(source.value, Tensor):
                    values[node] = source.value
                    continue
                local = local_value(node)
                full = source.value if local.full is None else local.full
                shape = full.shape if local.sharding is None else shard_shape(local.sharding, mesh)
                values[node] = TensorSpec.of(
                    torch.empty(shape, dtype=full.dtype, device=META, requires_grad=source.requires_grad))
            elif node.op == "get_attr":
                values[node] = _described(getattr(program.module, node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                key = (node.target, _key(args), _key(kwargs))
                if key not in known:
                    known[key] = _look(node, args, kwargs)
                values[node], costs[node] = known[key]
    return Costs(values, costs)


def _look(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Cost]:
    """Call an operator on meta tensors."""
    if node.target is operator.getitem and isinstance(args[0], tuple):
        return args[0][args[1]], Cost()
    target: Any = node.target
    args, kwargs = _replaced((args, kwargs), _made)
    counter = FlopCounterMode(display=False)
    with counter:
        out = target(*args, **kwargs)
    if target in _FORMULAS:
        forward, backward = _FORMULAS[target](*args, **kwargs)
    else:
        forward = counter.get_total_flops()
        backward = _count_backward(target, out, (args, kwargs), forward) if forward else 0
    value = _described(out)
    in_place = is_view(node) or (target in RESHAPES and args[0].is_contiguous())
    moved = [0, 0] if in_place else [sum(t.nbytes for t in _tensors(tree)) for tree in ((args, kwargs), out)]
    return value, Cost(forward, backward, *moved)


def _count_backward(target: Any, out: Any, operands: Any, forward: int) -> int:
    """The floating-point operations of all gradients of an operator that was called on `operands`."""
    roots = [t for t in _tensors(out) if t.requires_grad]
    wanted = [t for t in _tensors(operands) if t.requires_grad]
    if not roots:
        return 0
    if target in CONVOLUTIONS:  # PyTorch's counter takes the gradients of one in groups for those of a dense one
        return forward * sum(t.dim() > 1 for t in wanted)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(roots, wanted, [torch.empty_like(t) for t in roots], allow_unused=True)
    return counter.get_total_flops()


# ---- formulas ----


@formula(SDPA)
def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, **_: Any) -> tuple[int, int]:
    pairs = q.shape[-2] * k.shape[-2]
    return _two_products(q, v, pairs // 2 if is_causal else pairs)


@formula(windowed_attention)
def _windowed(q: Tensor, k: Tensor, v: Tensor, *, window: int, **_: Any) -> tuple[int, int]:
    return _two_products(q, v, q.shape[-2] * min(window, k.shape[-2]))


@formula(dropout_attention)
def _dropping(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, window: int | None = None,
              **options: Any) -> tuple[int, int]:
    return _windowed(q, k, v, window=window) if window is not None else _attention(q, k, v, is_causal=is_causal)


@formula(ring_attention)
def _ring(q: Tensor, k: Tensor, v: Tensor, axes: Axes, *, causal: bool = False, zigzag: bool = False, window: int | None = None,
          **_: Any) -> tuple[int, int]:
    schedule = RingSchedule(group_of(axes)[1], q.shape[2], k.shape[2], causal, zigzag, window)
    forward, backward = ring.flops(schedule, q.shape, v.shape)
    return forward, backward if q.requires_grad or v.requires_grad else 0


@formula(attention_of_chunks)
def _of_chunks(q: Tensor, k: Tensor, v: Tensor, starts: Any, *, causal: bool = False, window: int | None = None,
               **_: Any) -> tuple[int, int]:
    forward, backward = chunks.flops(q.shape, k.shape, v.shape, causal, window)
    return forward, backward if q.requires_grad or v.requires_grad else 0


def _two_products(q: Tensor, v: Tensor, pairs: int) -> tuple[int, int]:
    """Scores and their sum of values, over the pairs of positions that are looked at; the backward pass makes the scores again,
    and two products for each of these two."""
    scores, sums = (2 * math.prod(q.shape[:-2]) * pairs * width for width in (q.shape[-1], v.shape[-1]))
    return scores + sums, (3 * scores + 2 * sums) if q.requires_grad or v.requires_grad else 0


@formula(grouped_mm, aten._grouped_mm.default)
def _grouped(x: Tensor, weights: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """Each row meets the matrix of its own group."""
    product = 2 * x.numel() * weights.shape[-1]
    return product, product * (x.requires_grad + weights.requires_grad)


@formula(product_of_mine)
def _of_mine(x: Tensor, weights: Tensor, ends: Tensor, ranks: int) -> tuple[int, int]:
    forward, backward = _grouped(x, weights)
    return forward // ranks, backward // ranks


# ---- arguments: nested lists and tuples ----


def _replaced(tree: Any, change: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(tree, change)


def _made(leaf: Any) -> Any:
    """What an operator is called on."""
    if isinstance(leaf, TensorSpec):
        return leaf.empty()
    return META if isinstance(leaf, torch.device) else leaf


def _described(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return tuple(_described(t) for t in tree)
    return TensorSpec.of(tree) if isinstance(tree, Tensor) else tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, list | tuple):
        for inner in tree:
            yield from _tensors(inner)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, Tensor):
        yield tree


def _key(tree: Any) -> Any:
    """Equal for arguments that are equal; 1, 1.0 and True are not."""
    if isinstance(tree, TensorSpec):
        return tree
    if isinstance(tree, list | tuple):
        return type(tree), tuple(_key(t) for t in tree)
    if isinstance(tree, dict):
        return tuple((name, _key(t)) for name, t in tree.items())
    if isinstance(tree, slice):
        return slice, _key((tree.start, tree.stop, tree.step))
    return type(tree), tree
