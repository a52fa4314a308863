"""caches: how graphs without a Dynamo trace come to be kept in AOTAutograd's and Inductor's caches on disk, and found there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._higher_order_ops import invoke_subgraph


def cache_settings(key: str | None, functions: Sequence[str]) -> dict[str, Any]:
    """Inductor's settings by which what is compiled of a graph is kept under `key`, which says all that calls of these Python
    functions (by full name) do in it; None: nothing of it is kept, or looked up."""
    from torch._inductor import config

    if key is None:
        return {"fx_graph_cache": False}  # AOTAutograd's cache is built on it
    return {"fx_graph_cache": config.fx_graph_cache,
            "unsafe_marked_cacheable_functions": dict.fromkeys(sorted(functions), key)}


def is_subgraph_call(target: Any) -> bool:
    """Whether an operator runs a graph that it is given, and does nothing else."""
    return target is invoke_subgraph


def attention_priority() -> list[int]:
    """In which order PyTorch tries its kernels for attention."""
    order: Any = torch._C
    return list(order._get_sdp_priority_order())


def cache_counts() -> dict[str, int]:
    """How often this process found a graph's forward and backward in AOTAutograd's cache, or as a bundle ("hit"), did not
    ("miss"), kept what it compiled ("saved"), or passed the cache by ("bypass"); the first three of Inductor's, of single graphs,
    as "graph hit" and so on."""
    from torch._dynamo.utils import counters

    whole, single = counters["aot_autograd"], counters["inductor"]
    counts = {word: whole[f"autograd_cache_{name}"] for word, name in
              (("hit", "hit"), ("miss", "miss"), ("saved", "saved"), ("bypass", "bypass"))}
    return counts | {f"graph {word}": single[f"fxgraph_cache_{word}"] for word in ("hit", "miss", "bypass")}
