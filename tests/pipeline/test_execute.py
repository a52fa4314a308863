"""A schedule executed: every stage gets what its neighbours made, in any order that a schedule has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxpar.errors import FxparError
from fxpar.pipeline.execute import Execution, Mailbox, run_together
from fxpar.pipeline.schedules import SCHEDULES, Kind, Schedule, schedule


class Noting:
    """A stage of a chain that adds its number to what passes. What it was called with is noted."""

    def __init__(self, stage: int, last: int):
        self.stage, self.last = stage, last
        self.forwards: dict[int, int] = {}
        self.backwards: dict[int, int] = {}
        self.weights: list[int] = []
        self.once: list[str] = []

    def unshard(self) -> None:
        self.once.append("unshard")

    def reduce(self) -> None:
        self.once.append("reduce")

    def forward(self, microbatch: int, received: int | None) -> int:
        assert (received is None) == (self.stage == 0)
        self.forwards[microbatch] = (100 * microbatch if received is None else received) + self.stage
        return self.forwards[microbatch]

    def backward(self, microbatch: int, grads: int | None) -> int:
        self.weights.append(microbatch)
        return self.input_gradients(microbatch, grads)

    def input_gradients(self, microbatch: int, grads: int | None) -> int:
        assert microbatch in self.forwards and (grads is None) == (self.stage == self.last)
        self.backwards[microbatch] = (self.forwards[microbatch] if grads is None else grads) - self.stage
        return self.backwards[microbatch]

    def weight_gradients(self, microbatch: int) -> None:
        assert microbatch in self.backwards
        self.weights.append(microbatch)


def execute(made: Schedule, **options) -> list[Noting]:
    runners = [Noting(stage, made.stages - 1) for stage in range(made.stages)]
    post: Mailbox[int] = Mailbox()
    run_together([Execution(made, rank, {s: runners[s] for s in made.stages_of(rank)}, post, **options)
                  for rank in range(made.ranks)])
    return runners


@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9))
def test_every_stage_runs_every_microbatch_on_what_its_neighbours_made(name, ranks, virtual, microbatches):
    virtual = {"gpipe": 1, "1f1b": 1, "interleaved1f1b": max(virtual, 2), "zbv": 2}.get(name, virtual)
    runners = execute(schedule(name, ranks=ranks, virtual_stages=virtual, microbatches=microbatches, unshard=True))
    total = sum(range(len(runners)))
    for runner in runners:
        before = sum(range(runner.stage + 1))
        assert runner.forwards == {i: 100 * i + before for i in range(microbatches)}
        assert runner.backwards == {i: 100 * i + total - sum(range(runner.stage, len(runners))) for i in range(microbatches)}
        assert sorted(runner.weights) == list(range(microbatches)) and sorted(runner.once) == ["reduce", "unshard"]


def test_an_evaluation_runs_forwards_alone():
    made = schedule("1f1b", ranks=3, microbatches=4)
    runners = execute(made, kinds=(Kind.UNSHARD, Kind.F, Kind.SEND_F, Kind.RECV_F))
    assert [len(r.forwards) for r in runners] == [4, 4, 4] and not any(r.backwards or r.weights or r.once for r in runners)


def test_ranks_that_wait_for_each_other_are_an_error():
    made = schedule("gpipe", ranks=2, microbatches=1)
    lacking = replace(made, actions=(tuple(a for a in made.actions[0] if a.kind is not Kind.SEND_F), made.actions[1]))
    with pytest.raises(FxparError, match=r"wait for each other, under schedule gpipe: \{0: 'B\(0, 0\)', 1: 'F\(1, 0\)'\}"):
        execute(lacking)
