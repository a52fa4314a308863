"""axes: split a strategy's mesh axis where the model's factors call for finer ones."""

from __future__ import annotations

import math

from fxpar.ops.vocabulary import ATTENTION
from fxpar.program import Program
from fxpar.sharding.factors import Factor, leaves
from fxpar.sharding.facts import dims_of
from fxpar.sharding.mesh import Mesh


def refine_axes(program: Program) -> Program:
    """Let what splits heads split those that are (key/value heads, group) over both.

    Takes: an inferred program. Afterwards: if some attention has fewer key/value heads than tp, and tp divides its
    query heads, ``program.mesh`` has tp as the axes ``tp0 x tp1``: the first splits key/value heads, the second the
    queries of one group (whose keys and values are then replicated over it). So it is with the axis of a2a, for what tp leaves of
    the heads. Otherwise nothing changes.
    """
    for node in program.graph.nodes:
        if node.target in ATTENTION:
            heads = [f for f in leaves(dims_of(node.args[0])[-3]) if f.role == "heads"]
            for strategy in ("tp", "a2a"):
                program.mesh = _refined(program.mesh, strategy, heads)
    return program


def _refined(mesh: Mesh, strategy: str, heads: list[Factor]) -> Mesh:
    ranks = mesh.size(*mesh.axes(strategy))
    if ranks == 1 or len(mesh.axes(strategy)) > 1 or len(heads) < 2:
        return mesh
    kv, group = (f.size for f in heads[:2])
    if strategy == "a2a":
        kv, group = _rest(mesh, kv, group)
    if kv % ranks == 0:
        return mesh
    major = math.gcd(kv, ranks)
    return mesh.split(strategy, (major, ranks // major)) if major > 1 and group % (ranks // major) == 0 else mesh


def _rest(mesh: Mesh, kv: int, group: int) -> tuple[int, int]:
    """What the axes of tp leave of key/value heads and of each group."""
    for axis in mesh.axes("tp"):
        n = mesh.size(axis)
        kv, group = (kv // n, group) if kv % n == 0 else (kv, group // n if group % n == 0 else group)
    return kv, group
