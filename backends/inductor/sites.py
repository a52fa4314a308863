"""sites: which random operator of the model one is, as an input of its graph.

Every dropout has a number of its own, its *site*, from which its mask follows. As constants in the graph these numbers would make
equal layers differ: each would be traced, and compiled, by itself. As inputs they are what parameters are, one for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxpar.ops.dropout_attention import dropout_attention
from fxpar.ops.random import drawn
from fxpar.ops.rng import dropout_mask

SEED = {dropout_mask: 1, dropout_attention: 3, drawn: 1}
"""Random operators -> which of their arguments is the seed."""


def sites_as_inputs(plain: fx.GraphModule, given: Sequence[Tensor]) -> list[Tensor]:
    """Have a graph take the sites of its random operators as inputs, in place; and those inputs.

    Takes: a graph of `tensor_inputs_only` over inputs like `given`, one of which is the seed. Afterwards: it takes behind these
    an int64 scalar for each random operator, in their order, each with memory of its own on the seed's device. Numbers that are
    drawn are the same.
    """
    graph = plain.graph
    places = graph.find_nodes(op="placeholder")
    like = dict(zip(places, given, strict=True))
    found = [n for n in graph.nodes if n.target in SEED and n.args[SEED[n.target]] in like]
    sites = []
    for node in found:
        number: int = node.kwargs["site"]
        with graph.inserting_after(places[-1]):
            places.append(graph.placeholder(f"site_of_{node.name}"))
        node.kwargs = {**node.kwargs, "site": places[-1]}
        sites.append(like[node.args[SEED[node.target]]].new_full((), number))
    plain.recompile()
    return sites
