"""replicas: what several ranks hold of a parameter stays the same on all of them, bit by bit.

Where ranks compute a gradient alike, each on its own, rounding may differ: a GPU adds up in any order in the backward of a
lookup, and each rank's compiler chooses block sizes of its own by timing them. The optimizer turns a difference of
rounding into one of weights, which nothing brings together again; Adam makes a whole step of a gradient that is zero but for
rounding. A gradient that is summed over ranks last is the same on all of them.
"""

from __future__ import annotations

import torch
from torch import fx

from fxpar.ops.collectives import Collective, make, typed
from fxpar.program import Program, copy_provenance
from fxpar.sharding.facts import describe_local, full_value, local_value, sharding_at
from fxpar.sharding.layout import shard_shape
from fxpar.sharding.mesh import Axes


def average_replicas(program: Program) -> Program:
    """Average gradients over the ranks that would each compute all of them, in place.

    Takes: a partitioned program. Afterwards: along every axis that a trained parameter is replicated over in storage, its
    gradients are communicated last: summed, scattered or gathered, or else averaged by `collectives.average`.
    """
    mesh, changed = program.mesh, False
    for node, source in program.source_of().items():
        if source.kind != "param" or not source.requires_grad or not program.training:
            continue
        split = {a for dim in sharding_at(node) for part in dim for a in part.axes}
        replicated = tuple(a for a in mesh.names if mesh.size(a) > 1 and a not in split)
        alike: dict[Axes, list[fx.Node]] = {}
        for user in node.users:
            axes = tuple(a for a in replicated if not _communicated(user, a))
            if axes and user.op == "call_function":
                alike.setdefault(axes, []).append(user)
        for axes, users in alike.items():
            _average(program.graph, node, axes, users, (shard_shape(sharding_at(node), mesh), full_value(node).dtype))
            changed = True
    if changed:
        program.module.recompile()
    return program


def _communicated(user: fx.Node, axis: str) -> bool:
    """Whether what comes back through a use of a parameter was communicated over an axis."""
    made = typed(user)
    if made is not None and made.returns_alike:
        if axis in made.axes:
            return True
    elif user.op != "call_function" or len(user.all_input_nodes) != 1 or not local_value(user).resharded:
        return False
    return bool(user.users) and all(_communicated(u, axis) for u in user.users)


def _average(graph: fx.Graph, node: fx.Node, axes: Axes, users: list[fx.Node],
             result: tuple[tuple[int, ...], torch.dtype]) -> None:
    with graph.inserting_before(min(users)):
        new = make(graph, Collective("average", node, axes))
    copy_provenance(new, users[0])
    known = local_value(node)
    describe_local(new, full=known.full, sharding=known.sharding, layout_text=known.layout_text, needs_grad=known.needs_grad,
                   dtype=known.dtype, made_for=users[0].name, result=result)
    for user in users:
        user.replace_input_with(node, new)
