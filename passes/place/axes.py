"""axes: split a strategy's mesh axis where the model's factors call for finer ones."""

from __future__ import annotations

import math

from fxpar.ops.vocabulary import ATTENTION
from fxpar.program import Program
from fxpar.sharding.factors import leaves
from fxpar.sharding.facts import dims_of


def refine_axes(program: Program) -> Program:
    """Let tensor parallelism split heads that are (key/value heads, group) over both.

    Takes: an inferred program. Afterwards: if some attention has fewer key/value heads than tp, and tp divides its
    query heads, ``program.mesh`` has tp as the axes ``tp0 x tp1``: the first splits key/value heads, the second the
    queries of one group (whose keys and values are then replicated over it). Otherwise nothing changes.
    """
    mesh = program.mesh
    tp = mesh.size(*mesh.axes("tp"))
    for node in program.graph.nodes:
        if tp == 1 or len(mesh.strategies["tp"]) > 1 or node.target not in ATTENTION:
            continue
        heads = [f for f in leaves(dims_of(node.args[0])[-3]) if f.role == "heads"]
        if len(heads) > 1 and heads[0].size % tp:
            major = math.gcd(heads[0].size, tp)
            if major > 1 and heads[1].size % (tp // major) == 0:
                mesh = mesh.split("tp", (major, tp // major))
    program.mesh = mesh
    return program
