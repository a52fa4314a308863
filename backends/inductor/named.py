"""named: operators of the last graph get the names of the user's modules, by which profiles of compiled code call them."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence

from torch import fx

from fxpar import compat
from fxpar.backends.inductor.pieces import is_fused
from fxpar.ops.vocabulary import WAIT, is_view
from fxpar.program import module_path

MODEL = "the model"
"""What is in no module but the outermost."""


def name_operators(graph: fx.Graph, groups: Mapping[str, str]) -> None:
    """Name every operator of a graph for the comments of generated code (see `fxpar.compat.name_in_code`).

    Takes: a forward or backward graph behind all other passes, whose nodes know the modules that they come from, as AOTAutograd
    notes them; groups: the name of a process group -> the axes that it is over. Afterwards: what computes is called after its
    module, as "layers.0.up: mm" or "layers.0.up: mm backward"; what communicates, or waits for that, as "all_gather over dp for
    layers.0.up", with how many others it serves. Nothing else of the graph is changed, and no number: what generates code reads
    these names for comments alone. Views have none.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and not is_view(node):
            compat.name_in_code(node, _name(node, groups), not is_fused(node))


def _name(node: fx.Node, groups: Mapping[str, str]) -> str:
    if node.target is WAIT:
        started = _started(node)
        return f"wait for {_name(started, groups)}" if started is not None else "wait"
    what = str(getattr(node.target, "_opname", "") or getattr(node.target, "__name__", node.target))
    axes = next((groups[a] for a in node.args if isinstance(a, str) and a in groups), "")
    if axes:
        return f"{_kind(what)} over {axes} for {_served(node)}"
    where, back = _module(node)
    return f"{where}: {what}{' backward' if back else ''}"


def _kind(what: str) -> str:
    """ "all_gather" for "all_gather_into_tensor_coalesced", and for "gather_casts"."""
    return "all_gather" if what == "gather_casts" else re.sub(r"(_into_tensor|_tensor|_coalesced|_single|_out)+_?$", "", what)


def _started(wait: fx.Node) -> fx.Node | None:
    """The collective that an operator waits for."""
    node = wait.args[0]
    while isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "call_function" else None


def _served(node: fx.Node) -> str:
    """The module that a collective serves, and how many others."""
    several = node.args[0] if node.args and isinstance(node.args[0], Sequence) else [node]
    modules = list(dict.fromkeys(_module(n)[0] for n in several if isinstance(n, fx.Node) and _knows(n))) or [_module(node)[0]]
    return modules[0] + (f" and {len(modules) - 1} more" if len(modules) > 1 else "")


def _knows(node: fx.Node) -> bool:
    return bool(node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack"))


def _module(node: fx.Node) -> tuple[str, bool]:
    """The module that an operator comes from, and whether it is a part of its backward."""
    back = not node.meta.get("nn_module_stack") and bool(node.meta.get("fwd_nn_module_stack"))
    return module_path(node, "fwd_nn_module_stack" if back else "nn_module_stack") or MODEL, back
