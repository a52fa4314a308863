"""containers: objects that hold a call's tensors, and that PyTorch does not know for containers until they are met.

A dataclass is its attributes, as an object of it has them; a `UserDict` (a `BatchEncoding` of Hugging Face is one) or another
mapping its items, and a list of a class of its own its members. Their classes are registered with PyTorch's trees, as
`torch.export.register_dataclass` would.
"""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, int, float, str, type(None))


def know(tree: Any) -> None:
    """Have the trees of PyTorch see into the dataclasses and mappings in `tree`."""
    if all(isinstance(leaf, _PLAIN) for leaf in (tree.values() if type(tree) is dict else [tree])):
        return
    while unknown := {type(leaf) for leaf in pytree.tree_leaves(tree) if _is_container(leaf)}:
        for kind in unknown:
            _register(kind)


def _is_container(leaf: Any) -> bool:
    return (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, Mapping | list)


def _register(kind: type) -> None:
    parts, made, key = _how(kind)

    def flatten(x: Any) -> tuple[list[Any], Any]:
        names, values, rest = parts(x)
        return values, (names, rest)

    def with_keys(x: Any) -> tuple[list[Any], Any]:
        names, values, rest = parts(x)
        return [(key(name), value) for name, value in zip(names, values, strict=True)], (names, rest)

    pytree.register_pytree_node(kind, flatten, lambda values, context: made(kind, context[0], values, context[1]),
                                serialized_type_name=f"{kind.__module__}.{kind.__qualname__}", flatten_with_keys_fn=with_keys)


def _how(kind: type) -> tuple[Callable[[Any], tuple[list[Any], list[Any], Any]], Callable[..., Any], Callable[[Any], Any]]:
    """What takes objects of a class apart, what puts them together again, and what names their parts."""
    if issubclass(kind, Mapping):
        return _items, _mapping, pytree.MappingKey
    return (_members, _list, pytree.SequenceKey) if issubclass(kind, list) else (_attributes, _object, pytree.GetAttrKey)


def _members(x: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    return list(range(len(x))), list(x), dict(vars(x)) if hasattr(x, "__dict__") else {}


def _list(kind: Any, names: list[Any], values: Any, rest: dict[str, Any]) -> Any:
    new: Any = kind.__new__(kind)
    list.extend(new, values)
    if rest:
        new.__dict__.update(rest)
    return new


def _attributes(x: Any) -> tuple[list[str], list[Any], None]:
    names = list(vars(x)) if hasattr(x, "__dict__") else [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
    return names, [getattr(x, name) for name in names], None


def _object(kind: type, names: list[str], values: Any, rest: None) -> Any:
    new: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)
    return new


def _items(x: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    rest = {k: v for k, v in vars(x).items() if k != "data"} if isinstance(x, UserDict) else {}
    return list(x.keys()), list(x.values()), rest


def _mapping(kind: Any, names: list[Any], values: Any, rest: dict[str, Any]) -> Any:
    data = dict(zip(names, values, strict=True))
    if not issubclass(kind, UserDict):
        return kind(data)
    new: Any = kind.__new__(kind)
    new.__dict__.update(rest, data=data)
    return new
