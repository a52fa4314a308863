"""microbatches: one training step of a module in microbatches, which together have the loss and gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxpar.backends.eager import run_flat
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.errors import InputError
from fxpar.ops.runtime import use_runtime
from fxpar.passes.capture.attributes import put_back
from fxpar.passes.strategies.prologue import joined
from fxpar.program import Microbatches, Program
from fxpar.run.feed import Feed, value_of
from fxpar.sharding.facts import local_value, sharding_at
from fxpar.sharding.layout import Piece, Sharding
from fxpar.sharding.mesh import MICROBATCH


def require_divides(named: Mapping[str, Any], dims: Mapping[str, int | None], count: int) -> None:
    """Raises `InputError` for a batch that cannot be cut into `count` microbatches. dims: input path -> its batch dim."""
    for path, dim in dims.items():
        if dim is not None and named[path].shape[dim] % count:
            rows = named[path].shape[dim]
            raise InputError(f"plan field `microbatches`={count}: must divide the replica's batch of {rows} (input {path!r}); "
                             f"try a batch of {-(-rows // count) * count}")


def parts(program: Program, feed: Feed, named: dict[str, Any], seed: int, runtime: GroupRuntime) -> list[dict[str, Any]]:
    """Path -> what the program of one microbatch takes, for each of them: its rows of this replica's batch, its number, and what
    the prologue computes from the whole batch."""
    step = program.microbatches
    assert step is not None
    dims = {s.name: local_value(n).batch_dim for n, s in program.source_of().items()
            if s.kind == "input" and (s.kind, s.name) in step.rows}
    rows = {path: named[path].chunk(step.count, dim) for path, dim in dims.items()}
    made = [{**named, **{path: mine[i] for path, mine in rows.items()}} for i in range(step.count)]
    passed: list[dict[str, Any]] = [{} for _ in made]
    if step.index is not None:
        for i, mine in enumerate(passed):
            mine[step.index] = torch.full((), i, dtype=torch.int64, device=feed.device)  # the host waits for no copy
    if step.prologue is not None:
        outs = _prologue(step, feed, made, seed, runtime)
        for name, places in step.passed.items():
            for mine, place in zip(passed, places, strict=True):
                mine[name] = outs[place]
    return [{**mine, **more} for mine, more in zip(made, passed, strict=True)]


@torch.no_grad()
def _prologue(step: Microbatches, feed: Feed, made: list[dict[str, Any]], seed: int, runtime: GroupRuntime) -> list[Tensor]:
    """What the prologue computes from all microbatches of this rank, together with the other ranks."""
    assert step.prologue is not None
    runtime.prepare(step.prologue)
    given = [value_of(source, feed.places, feed.device, made[i or 0], seed) for source, i in step.prologue_inputs]
    with use_runtime(runtime):
        return run_flat(step.prologue, given)


def train(program: Program, microbatches: list[dict[str, Any]], forward: Callable[[dict[str, Any], bool], list[Tensor]],
          loss_in: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Forward and backward of every microbatch; returns the loss of the whole batch.

    forward(microbatch, whether it is the last): the program's outputs. loss_in(outputs): which of them is the loss. What
    the forward stores in attributes is afterwards that of the whole batch.
    """
    step = program.microbatches
    assert step is not None
    stored = [k for k, sink in enumerate(program.tensor_sinks()) if sink.kind == "attribute"]
    losses: list[Tensor] = []
    attributes: list[list[Tensor]] = [[] for _ in stored]
    for i, mine in enumerate(microbatches):
        outs = forward(mine, i == step.count - 1)
        loss = loss_in(outs)
        at = next((k for k, out in enumerate(outs) if out is loss), None)
        if at is None:
            raise InputError("train_step over microbatches needs a loss that is one of the tensors the model returns; return it "
                             "as it is, or use microbatches=1")
        loss = loss * step.weight(at)
        loss.backward()
        losses.append(loss.detach())
        for values, k in zip(attributes, stored, strict=True):
            values.append(outs[k].detach())
    if stored:
        put_back(program.writes, [step_output(step, k, values) for k, values in zip(stored, attributes, strict=True)])
    return torch.stack(losses).sum()


def step_output(step: Microbatches, output: int, values: list[Tensor]) -> Tensor:
    """A rank's part of an output of the step, from those of its microbatches."""
    for dim, pieces in enumerate(step.output_rows.get(output, ())):
        outer = 1
        for piece in pieces:
            if MICROBATCH in piece.axes:
                return joined(values, dim, outer)
            outer *= piece.size // step.mesh.size(*piece.axes)
    return step.joined(output, values)


def step_output_sharding(program: Program, output: int) -> Sharding:
    """How what `step_output` returns lies over the ranks."""
    step = program.microbatches
    if step is None or output not in step.output_rows:
        return sharding_at(program.outputs()[output])
    rows = step.output_rows[output]
    return tuple(tuple(Piece(p.size, tuple(a for a in p.axes if a != MICROBATCH)) for p in dim) for dim in rows)
