"""What passes find out about values, kept on the nodes that make them: one object for each of the two programs.

A node of the global program, that of one device, has a `GlobalValue`; `partition` gives each node of the local program, that
of one rank, a `LocalValue`. Both are read and written by the functions here alone: nothing else in fxpar has keys of its own
in ``node.meta``. A fact that nobody found out has its default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxpar.sharding.factors import Dims
from fxpar.sharding.layout import Layout, Sharding

if TYPE_CHECKING:
    from fxpar.passes.infer.rules.spec import Spec

_GLOBAL, _LOCAL = "fxpar_global", "fxpar_local"


@dataclass(frozen=True, eq=False)
class GlobalValue:
    """Of a node of the global program, by `infer` except where it says otherwise.

    dims: the factors of the tensor that it makes; None where it makes several (see `Spec.outs`), or none. spec: what the rule of
    its operator said. position: of an operator's outputs, which tensor it takes. is_param: whether it is a parameter as it is
    passed in. needs_grad: whether a gradient flows to it. batch_dim: of an input, the dim that is the batch.
    reduce_dtype: of a parameter's cast, in which dtype its gradient is summed over ranks (by `cast_parameters`).
    by_expert: whether its rows are in an order that each rank has of its own (by `sort_by_expert`).
    """

    dims: Dims | None = None
    spec: Spec | None = None
    position: int = 0
    is_param: bool = False
    needs_grad: bool = False
    batch_dim: int | None = None
    reduce_dtype: torch.dtype | None = None
    by_expert: bool = False


@dataclass(frozen=True, eq=False)
class LocalValue:
    """Of a node of a local program.

    What it is part of: full: the global tensor (without data), as `sharding` lays it out, which `layout_text` shows.
    global_name: the node of the global program that makes it. source: of a placeholder, the name of what is passed in.
    batch_dim, reduce_dtype: those of that node. stored: of a parameter, and of the cast that follows it, the layout that it is
    stored in, where it is used in another.

    What it is itself: dtype. result: of a collective, the shape and dtype of what one rank has of its result. needs_grad:
    whether a gradient flows to it.

    What it is for: made_for: of a collective, the operator that it was inserted for. resharded: whether it was inserted to bring
    a value from one layout to another. unshard: whether it gathers the parts in which a parameter is stored. varied: axes
    along which what it was made from is used differently already.
    """

    full: Tensor | None = None
    sharding: Sharding | None = None
    layout_text: str = ""
    global_name: str | None = None
    source: str = ""
    batch_dim: int | None = None
    reduce_dtype: torch.dtype | None = None
    stored: Layout | None = None
    dtype: torch.dtype | None = None
    result: tuple[tuple[int, ...], torch.dtype] | None = None
    needs_grad: bool = False
    made_for: str = ""
    resharded: bool = False
    unshard: bool = False
    varied: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of what one rank has of a collective's result; 0 where that is not known."""
        return 0 if self.result is None else math.prod(self.result[0]) * self.result[1].itemsize


_UNKNOWN = GlobalValue()
UNKNOWN = LocalValue()


def global_value(node: fx.Node) -> GlobalValue:
    """What is known of a node of the global program."""
    return node.meta.get(_GLOBAL, _UNKNOWN)


def dims_of(node: fx.Node) -> Dims:
    """The factors of the tensor that a node of an inferred program makes."""
    dims = global_value(node).dims
    assert dims is not None, f"{node.name} makes no tensor, or several"
    return dims


def describe_global(node: fx.Node, **facts: Any) -> None:
    """Record facts (fields of `GlobalValue`) about a node; what is known besides stays."""
    node.meta[_GLOBAL] = replace(global_value(node), **facts)


def local_value(node: fx.Node) -> LocalValue:
    """What is known of a node of a local program; a node of a global one is a mistake of the caller's."""
    assert _LOCAL in node.meta or _GLOBAL not in node.meta, f"{node.name} is of a global program"
    return node.meta.get(_LOCAL, UNKNOWN)


def if_local(node: fx.Node) -> LocalValue:
    """The same of a node of either program: of a global one, nothing."""
    return node.meta.get(_LOCAL, UNKNOWN)


def sharding_at(node: fx.Node) -> Sharding:
    """How the global tensor lies over ranks that a node of a local program makes this rank's part of."""
    sharding = local_value(node).sharding
    assert sharding is not None, f"{node.name} is part of no global tensor"
    return sharding


def full_value(node: fx.Node) -> Tensor:
    """The global tensor (without data) that a node of a local program makes this rank's part of."""
    full = local_value(node).full
    assert full is not None, f"{node.name} is part of no global tensor"
    return full


def describe_local(node: fx.Node, **facts: Any) -> None:
    """Record facts (fields of `LocalValue`) about a node; what is known besides stays."""
    node.meta[_LOCAL] = replace(local_value(node), **facts)
