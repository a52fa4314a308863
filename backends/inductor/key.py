"""key: by what a compiled graph is found again, in this process or by the next one that starts the same program.

AOTAutograd and Inductor keep what they compiled on disk, by what they know of: the graph's code, the inputs, their own settings.
A trace of a partitioned program reads more: this rank's place in the mesh and the names of its groups, the marks of nodes, how
PyTorch is set. All of that makes one key, and without one nothing is looked up or kept: a false hit would be a wrong number in
silence.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.ops.dropout_attention import uses_kernels
from fxpar.plan import Plan

OPERATORS = ("aten", "prims", "_c10d_functional", "fxpar")
"""Libraries of operators that change with PyTorch or fxpar alone. What others do when they are traced, no key tells."""
PLAIN = (type(None), bool, int, float, complex, str, type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What stands for itself, as text, among a node's arguments."""


class _Unkeyed(Exception):
    """A part of a graph, of which no text says all that a trace of it depends on."""


def key_of(graph: fx.Graph, inputs: Sequence[Tensor], facts: object, plan: Plan) -> str | None:
    """A digest of what decides how a graph is compiled, besides sources and settings of Inductor; None if nobody can say.

    graph: of `tensor_inputs_only`. inputs: like those that it is compiled for. facts: those of the runtime that is active while
    it is traced (see `fxpar.backends.transport.runtime`). plan: that of the program.
    """
    try:
        text = [f"plan {plan}", f"runtime {facts}", *_state(), *_inputs(inputs), *_nodes(graph)]
    except _Unkeyed:
        return None
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def python_functions(graph: fx.Graph) -> list[str]:
    """The functions that a graph calls and that are no operators, by name, each once and in order of names."""
    return sorted({_named(n.target) for g in _graphs(graph) for n in g.nodes if n.op == "call_function"
                   and not isinstance(n.target, torch._ops.OpOverload) and not compat.is_subgraph_call(n.target)})


def _state() -> Iterator[str]:
    """How PyTorch is set, as far as it has a part in what a trace does."""
    cuda, devices = torch.backends.cuda, ("cpu", "cuda")
    yield f"versions {torch.__version__} {torch.version.git_version} {sys.version}"
    yield f"modes {torch.is_grad_enabled()} {torch.is_inference_mode_enabled()} {torch.are_deterministic_algorithms_enabled()}"
    yield f"autocast {[(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]}"
    yield f"defaults {torch.get_default_dtype()} {torch.get_default_device()} {torch.get_num_threads()}"
    yield f"products {torch.get_float32_matmul_precision()}"
    yield f"attention {cuda.flash_sdp_enabled()} {cuda.mem_efficient_sdp_enabled()} {cuda.math_sdp_enabled()} " \
          f"{cuda.cudnn_sdp_enabled()} {compat.attention_priority()} {uses_kernels()}"
    yield f"libraries {torch.backends.cudnn.enabled} {torch.backends.mkldnn.enabled}"


def _inputs(inputs: Sequence[Tensor]) -> Iterator[str]:
    first: dict[int, int] = {}
    for i, x in enumerate(inputs):
        shares = first.setdefault(compat.storage_of(x), i)
        yield f"input {type(x).__name__} {x.dtype} {tuple(x.shape)} {x.stride()} {x.storage_offset()} {x.device} {x.layout} " \
              f"{x.requires_grad} {x.is_leaf} {x.is_conj()} {x.is_neg()} {shares}"


def _nodes(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        custom = _plain(node.meta.get("custom", {}))
        yield f"{node.op} {node.name} {_target(node)} {_plain(node.args)} {_plain(node.kwargs)} {custom}"
        if node.op == "get_attr":
            yield from _nodes(_subgraph(node))


def _graphs(graph: fx.Graph) -> Iterator[fx.Graph]:
    yield graph
    for node in graph.find_nodes(op="get_attr"):
        yield from _graphs(_subgraph(node))


def _subgraph(node: fx.Node) -> fx.Graph:
    """The graph that an operator is given as an attribute. A tensor that is one is part of no key of AOTAutograd's."""
    module: Any = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(module, fx.GraphModule):
        raise _Unkeyed
    return module.graph


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op in ("placeholder", "output", "get_attr"):
        return str(target)
    if node.op != "call_function":
        raise _Unkeyed
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in OPERATORS:
            raise _Unkeyed
        return str(target)
    if compat.is_subgraph_call(target):
        return str(target)
    name = _named(target)
    if name.partition(".")[0] not in ("fxpar", "_operator", "math") or "<" in name:
        raise _Unkeyed
    return name


def _named(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '<unnamed>')}"


def _plain(value: Any) -> str:
    """A node's argument as text, from which it could be made again."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(k)}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, slice):
        return f"slice{_plain((value.start, value.stop, value.step))}"
    if type(value) in PLAIN:
        return repr(value)
    raise _Unkeyed
