"""simulate: every rank of a plan in one process, in lock step, with gradients and no process group.

One node of the program is run for all ranks before the next, so a collective sees the tensors of all of them. Each
rank keeps an autograd graph of its own; the ranks' graphs meet only in the collectives, whose backward is the
conjugate that a real run would issue. What it computes is what real ranks compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxpar.ops.collectives import Collective, Direction, PlaceInDim, typed
from fxpar.ops.exchange import EXCHANGES, exchange_plan
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.ring.together import attend_together
from fxpar.ops.rows_together import exchange_together, plan_together
from fxpar.ops.runtime import axis_index
from fxpar.sharding.mesh import Axes, Mesh


class _LockstepCollective(torch.autograd.Function):
    """A typed collective on the tensors of all ranks."""

    @staticmethod
    def forward(ctx, made: Collective, mesh: Mesh, *xs: Tensor):
        ctx.made, ctx.mesh, ctx.dtype = made, mesh, xs[0].dtype
        xs = tuple(x.to(made.dtype or x.dtype) for x in xs)
        return tuple(run_all(made.forward, mesh, made.axes, made.place, made.to, list(xs)))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        made = ctx.made
        ys = [g.to(ctx.dtype).to(made.reduce or ctx.dtype) for g in grads]
        ys = run_all(made.backward, ctx.mesh, made.axes, made.place, made.to, ys)
        return (None, None, *(y.to(ctx.dtype) for y in ys))


def run_all(step: Direction, mesh: Mesh, axes: Axes, place: PlaceInDim, to: PlaceInDim, xs: list[Tensor]) -> list[Tensor]:
    """One direction of a collective for all ranks; xs[r] is rank r's tensor."""
    n = mesh.size(*axes)
    ys = [step.before(x, place, to, n, mesh.index(r, axes)) for r, x in enumerate(xs)]
    if step.comm is not None:
        for group in mesh.groups(axes):
            for rank, y in zip(group, _COMM[step.op or step.comm]([ys[r] for r in group]), strict=True):
                ys[rank] = y
    return [step.after(y, place, to, n).clone() for y in ys]


_COMM = {
    "all_reduce": lambda ys: [sum(ys[1:], ys[0])] * len(ys),
    "max": lambda ys: [torch.stack(ys).amax(0)] * len(ys),
    "all_gather": lambda ys: [torch.cat(ys)] * len(ys),
    "reduce_scatter": lambda ys: list(sum(ys[1:], ys[0]).split(ys[0].shape[0] // len(ys))),
    "all_to_all": lambda ys: [torch.cat([y.chunk(len(ys))[r] for y in ys]) for r in range(len(ys))],
}


Watch = Callable[[fx.Node, list[Any]], None]


def run(module: fx.GraphModule, mesh: Mesh, inputs: list[list[Any]], watch: Watch | None = None) -> list[list[Any]]:
    """Run a partitioned program for every rank of `mesh`.

    inputs[r]: rank r's local tensors, one per placeholder. Returns rank r's flat outputs at [r]; those that depend on
    an input with ``requires_grad`` can be differentiated, all ranks together. ``watch(node, values)`` sees every value.
    """
    ranks = range(mesh.world_size)
    env: dict[fx.Node, list[Any]] = {}
    feeds = iter(zip(*inputs, strict=True)) if inputs[0] else iter(())
    remaining = {n: len(n.users) for n in module.graph.nodes}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = list(next(feeds))
        elif node.op == "get_attr":
            env[node] = [getattr(module, node.target)] * mesh.world_size
        elif node.op == "output":
            return [[env[n][r] for n in node.args[0]] for r in ranks]
        elif node.target is exchange_plan:
            env[node] = plan_together(mesh, [env[node.args[0]][r] for r in ranks], *node.args[1:])
        elif node.target in EXCHANGES:
            env[node] = exchange_together(node.target, mesh, [_arguments(node, env, r)[0] for r in ranks])
        elif (made := typed(node)) is not None:
            env[node] = _collective(made, mesh, env[made.value])
        elif node.target is axis_index:
            env[node] = [mesh.index(r, node.args[0]) for r in ranks]
        elif node.target is ring_attention:
            env[node] = attend_together(mesh, [_arguments(node, env, r) for r in ranks])
        else:
            env[node] = [_call(node, env, r) for r in ranks]
        if watch is not None:
            watch(node, env[node])
        for used in node.all_input_nodes:
            remaining[used] -= 1
            if not remaining[used]:
                del env[used]
    raise AssertionError("a program without an output")


class Lockstep:
    """All ranks of a mesh, one node of a program after the other; as `backends.lowered.Lowered`."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def forward(self, module: fx.GraphModule, feeds: list[list[Any]], watch: Watch | None = None) -> list[list[Any]]:
        return run(module, self.mesh, feeds, watch)

    def backward(self, roots: list[list[Tensor]], seeds: list[list[Tensor]],
                 inputs: list[list[Tensor]]) -> list[list[Tensor | None]]:
        """The gradients of rank r's `inputs` from its outputs `roots` and their cotangents `seeds`."""
        flat = [x for mine in inputs for x in mine]
        found = torch.autograd.grad([x for mine in roots for x in mine], flat, [x for mine in seeds for x in mine],
                                    allow_unused=True)
        count = len(inputs[0])
        return [list(found[r * count : (r + 1) * count]) for r in range(len(inputs))]


def _arguments(node: fx.Node, env: dict[fx.Node, list[Any]], rank: int) -> tuple[Any, Any]:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n][rank])
    return args, kwargs


def _call(node: fx.Node, env: dict[fx.Node, list[Any]], rank: int) -> Any:
    args, kwargs = _arguments(node, env, rank)
    target: Any = node.target
    return target(*args, **kwargs)


def _collective(made: Collective, mesh: Mesh, xs: list[Tensor]) -> list[Tensor]:
    if made.backward is None:
        return run_all(made.forward, mesh, made.axes, made.place, made.to, [x.detach() for x in xs])
    return list(_LockstepCollective.apply(made, mesh, *xs))
