"""counted: which numbers a histogram is of, in the ways that people write one.

How often each of 0, ..., count - 1 is among some integers is asked of `torch.histc` or `torch.bincount`, of `one_hot` or of a
comparison with `arange` that is summed, or by adding ones into zeros. None of these depends on the order of the numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpar.ops.vocabulary import RESHAPES
from fxpar.passes.infer.rules.spec import bind

aten = torch.ops.aten
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.detach.default, aten.alias.default)
VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints)
SUMS = (aten.sum.dim_IntList, aten.sum.default)
ADDS = (aten.scatter_add.default, aten.index_add.default)
ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)


def counted_numbers(counts: fx.Node, count: int) -> fx.Node | None:
    """The integers of which a value tells how often each number below `count` is among them; None of any other value.

    counts: of shape (count,). Casts, views and the check of `fxpar.ops.within` between the integers and their count are left out.
    """
    counts = uncast(counts)
    if counts.target is aten.histc.default:
        a = bind(counts)
        whole = (a["bins"], a["min"], a["max"]) == (count, 0, count - 1)
        return _numbers(a["self"]) if whole else None
    if counts.target in SUMS:
        return _summed(counts, count)
    if counts.target in ADDS:
        a = bind(counts)
        source = a.get("src", a.get("source"))
        alike = a.get("alpha", 1) == 1 and _is_full(a["self"], 0, ZEROS) and _is_full(source, 1, ONES)
        return _numbers(a["index"]) if alike and tuple(counts.meta["val"].shape) == (count,) else None
    return None


def uncast(node: fx.Node) -> fx.Node:
    """What it is the same numbers as."""
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def same_numbers(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are views of one."""
    return _numbers(a) is _numbers(b)


def _numbers(node: Any) -> Any:
    """The value whose elements these are, each as often, in whatever shape and order."""
    while isinstance(node, fx.Node):
        if node.target in (*CASTS, *VIEWS) and node.meta["val"].dtype != torch.bool:
            node = node.all_input_nodes[0]
        elif node.target is aten.add.Tensor and _is_check(node.args[1]):
            node = node.args[0]
        else:
            break
    return node


def _is_check(node: Any) -> bool:
    """Whether it is the zeros of `fxpar.ops.within`, which are looked up where numbers are in range."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or node.target is not aten.gather.default:
        return False
    table: Any = node.args[0]
    return table.target is aten.expand.default and table.args[0].target in ZEROS


def _is_full(node: Any, value: int, makers: tuple) -> bool:
    node = uncast(node) if isinstance(node, fx.Node) else node
    while isinstance(node, fx.Node) and node.target in (*VIEWS, aten.expand.default):
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        return False
    full = (aten.full.default, aten.full_like.default, aten.new_full.default)
    return node.target in makers or (node.target in full and bind(node)["fill_value"] == value)


def _summed(counts: fx.Node, count: int) -> fx.Node | None:
    """Of a sum over all dims but one of what is 1 where a number is that of the place in that dim."""
    a = bind(counts)
    told = uncast(a["self"])
    rank = told.meta["val"].dim()
    if a.get("keepdim") or not a.get("dim"):
        return None
    left = [*{*range(rank)} - {d % rank for d in a["dim"]}]
    if len(left) != 1 or told.meta["val"].shape[left[0]] != count:
        return None
    if told.target is aten.one_hot.default:
        return _numbers(told.args[0]) if left == [rank - 1] and bind(told)["num_classes"] == count else None
    if told.target is not aten.eq.Tensor:
        return None
    for numbers, places in (told.args[:2], told.args[1::-1]):
        if _is_range(places, count, rank - left[0]) and _is_once(numbers, told.meta["val"].shape, rank - left[0]):
            return _numbers(numbers)
    return None


def _is_range(node: Any, count: int, behind: int) -> bool:
    """Whether it is 0, ..., count - 1 in the dim that has so many from it to the last, and broadcast in the others."""
    if not isinstance(node, fx.Node):
        return False
    shape, base = node.meta["val"].shape, _numbers(node)
    if len(shape) < behind or shape[len(shape) - behind] != count or shape.numel() != count:
        return False
    if not isinstance(base, fx.Node) or base.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return False
    a = bind(base)
    return a["end"] == count and not a.get("start") and a.get("step", 1) == 1


def _is_once(node: Any, shape: torch.Size, behind: int) -> bool:
    """Whether each of its elements is compared with all places, and with them alone."""
    if not isinstance(node, fx.Node):
        return False
    mine = [*[1] * (len(shape) - node.meta["val"].dim()), *node.meta["val"].shape]
    wanted = list(shape)
    wanted[len(shape) - behind] = 1
    return mine == wanted
