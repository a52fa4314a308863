"""context: what context parallelism asks of a model. That the sequence is split is a preference of `place`."""

from __future__ import annotations

import torch

from fxpar.errors import PlanError
from fxpar.program import Program, user_line
from fxpar.sharding.factors import Dim, Factor, extent, leaves
from fxpar.sharding.facts import global_value


def check_sequences(program: Program) -> Program:
    """Refuse sequences that the ranks of cp cannot share.

    Takes: an inferred program, which stays as it is. Raises: `PlanError` for a sequence whose length cp does not divide, or,
    where causal attention goes along it, so that it is dealt in chunks, 2 cp; and for a model without any.
    """
    cp = program.plan.cp
    if cp == 1:
        return program
    found = False
    for node in program.graph.nodes:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        for dim in global_value(node).dims or ():
            if any(f.role == "seq" for f in leaves(dim)):
                found = True
                _check(cp, dim, user_line(node))
    if not found:
        raise PlanError("cp", cp, "splits the sequence that attention goes along, and this model has none that was found",
                        "cp=1, with more replicas (dp)")
    return program


def _check(cp: int, dim: Dim, where: str) -> None:
    """Of the factors of a sequence that a view has cut, one is enough."""
    parts: list[Factor] = [f for f in leaves(dim) if f.role == "seq"]
    chunks = 2 * cp if any(f.causal for f in parts) else cp
    if all(f.size % chunks for f in parts):
        length = extent(parts)
        why = "2 cp, for causal attention gives every rank two chunks" if chunks > cp else "cp"
        raise PlanError("cp", cp, f"must divide every sequence by {why}: {chunks} does not divide the length {length}"
                        + (f" ({where})" if where else ""), f"padding to {-(-length // chunks) * chunks}")
