"""What the canonicalising passes share: building nodes whose (fake) values are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.program import copy_provenance


class Rewriter:
    """Builds the replacement of one node, just before it."""

    def __init__(self, graph: fx.Graph, node: fx.Node):
        self.graph, self.node = graph, node

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Insert a call; its value is computed on fake tensors, its provenance is the replaced node's."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        copy_provenance(new, self.node)
        values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = compat.detect_fake_mode(pytree.tree_leaves((values, keywords))) or compat.detect_fake_mode(
            [n.meta.get("val") for n in self.graph.nodes]
        )
        with mode or compat.FakeTensorMode(), torch.no_grad():
            new.meta["val"] = target(*values, **keywords)
        return new

    def replace(self, value: Any) -> None:
        """`value` stands where the node stood."""
        self.node.replace_all_uses_with(value)
        self.graph.erase_node(self.node)


def remove_unread(graph: fx.Graph, has_effect: Callable[[fx.Node], bool] = fx.Node.is_impure) -> None:
    """Erase the operators of a flat graph that nobody reads and that have no effect."""
    for node in reversed(graph.nodes):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


def device_of(node: fx.Node) -> torch.device:
    return node.meta["val"].device
