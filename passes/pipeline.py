"""pipeline: the list of passes, what happens between a user's model and a program that a backend can run."""

from __future__ import annotations

import time
from collections.abc import Callable

from fxpar.passes.canonical.buffers import keep_buffers
from fxpar.passes.canonical.dropout import counter_dropout
from fxpar.passes.canonical.experts import sort_by_expert
from fxpar.passes.canonical.gqa import fold_repeat_kv
from fxpar.passes.canonical.losses import expand_losses
from fxpar.passes.canonical.masks import fold_masks
from fxpar.passes.canonical.outputs import keep_loss
from fxpar.passes.canonical.precision import cast_parameters
from fxpar.passes.canonical.random import counter_random
from fxpar.passes.canonical.shift import label_all_tokens
from fxpar.passes.canonical.sights import name_sights
from fxpar.passes.canonical.simplify import simplify
from fxpar.passes.canonical.unmask import unmask_products
from fxpar.passes.infer.infer import infer
from fxpar.passes.partition.partition import partition
from fxpar.passes.place.axes import refine_axes
from fxpar.passes.place.place import place
from fxpar.passes.strategies.context import check_sequences
from fxpar.passes.strategies.experts import check_experts
from fxpar.passes.strategies.microbatches import take_out_time
from fxpar.passes.strategies.replicas import average_replicas
from fxpar.passes.strategies.zero import shard_storage
from fxpar.program import Program
from fxpar.progress import stage
from fxpar.sharding.layout import Sharding

TRACED_FIELDS = ("outputs", "param_dtype", "reduce_dtype", "roles", "batch_dims")
"""The fields of a plan that the passes up to `infer` read: plans that agree in them share an inferred program."""
Pass = Callable[[Program], Program]
Observer = Callable[[str, Program], None]


def front(pinned: dict[str, Sharding] | None = None) -> list[tuple[str, Pass]]:
    """The passes after capture whose result is taken through any plan that agrees in `TRACED_FIELDS`, in order."""
    return [
        ("simplify", simplify),
        ("buffers", keep_buffers),
        ("outputs", keep_loss),
        ("precision", cast_parameters),
        ("masks", fold_masks),
        ("sights", name_sights),
        ("gqa", fold_repeat_kv),
        ("shift", label_all_tokens),
        ("losses", expand_losses),
        ("experts", sort_by_expert),
        ("unmask", unmask_products),
        ("dropout", counter_dropout),
        ("random", counter_random),
        ("infer", lambda p: infer(p, pinned)),
    ]


def back(pinned: dict[str, Sharding] | None = None) -> list[tuple[str, Pass]]:
    """The passes that make the program of one rank under a plan, in order."""
    return [
        ("context", check_sequences),
        ("ep", check_experts),
        ("axes", refine_axes),
        ("place", lambda p: place(p, pinned)),
        ("zero", lambda p: shard_storage(p, pinned)),
        ("partition", partition),
        ("microbatches", take_out_time),
        ("replicas", average_replicas),
    ]


def passes(pinned: dict[str, Sharding] | None = None) -> list[tuple[str, Pass]]:
    """All passes after capture, in order. pinned: how parameters are stored already, by name."""
    return [*front(pinned), *back(pinned)]


def run(program: Program, steps: list[tuple[str, Pass]], observe: Observer | None) -> Program:
    """The program after these passes; ``observe(name, program)`` is called after each, `Program.timings` has its seconds."""
    with stage("partitioning"):
        for name, apply in steps:
            start = time.perf_counter()
            with stage(f"pass {name}"):
                program = apply(program)
            program.timings[name] = time.perf_counter() - start
            if observe is not None:
                observe(name, program)
    return program
