"""A table that is wrong in one place is refused, and the refusal says where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fxpar.errors import PlanError
from fxpar.pipeline.check import check
from fxpar.pipeline.schedules import Action, Kind, Schedule, schedule
from tests.pipeline.tables import schedules


def with_list(table: Schedule, rank: int, actions: list[Action]) -> Schedule:
    return replace(table, actions=tuple(tuple(actions) if r == rank else old for r, old in enumerate(table.actions)))


def refused(table: Schedule, match: str | None = None) -> None:
    with pytest.raises(PlanError, match=match) as error:
        check(table)
    assert error.value.field == "schedule"


@given(schedules(most_microbatches=8), st.data())
def test_no_action_can_be_left_out(table: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, table.ranks - 1))
    actions = list(table.actions[rank])
    at = data.draw(st.sampled_from([i for i, action in enumerate(actions) if action.kind is not Kind.UNSHARD]))
    del actions[at]
    refused(with_list(table, rank, actions))


@given(schedules(most_microbatches=8), st.data())
def test_no_action_can_be_there_twice(table: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, table.ranks - 1))
    actions = list(table.actions[rank])
    actions.insert(data.draw(st.integers(0, len(actions))), data.draw(st.sampled_from(actions)))
    refused(with_list(table, rank, actions), "once, and has it 2 times")


@given(schedules(most_microbatches=8), st.data())
def test_computation_of_a_microbatch_has_one_order(table: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, table.ranks - 1))
    actions = list(table.actions[rank])
    one, other = data.draw(st.sampled_from([
        (i, j) for i, a in enumerate(actions) for j, b in enumerate(actions[:i])
        if a.kind.computes and b.kind.computes and (a.stage, a.microbatch) == (b.stage, b.microbatch)]))
    actions[one], actions[other] = actions[other], actions[one]
    refused(with_list(table, rank, actions), "must compute F, B or F, I, W of microbatch")


@given(schedules(least_ranks=2, most_microbatches=8), st.data())
def test_two_ranks_have_one_order_of_messages(table: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, table.ranks - 1))
    actions = list(table.actions[rank])
    pairs = [(i, j) for i, a in enumerate(actions) for j, b in enumerate(actions[:i])
             if a.kind.is_message and b.kind.is_message and table.peer(a) == table.peer(b)]
    assume(pairs)
    one, other = data.draw(st.sampled_from(pairs))
    actions[one], actions[other] = actions[other], actions[one]
    refused(with_list(table, rank, actions), "in one order on both")


@given(schedules(most_microbatches=8), st.data())
def test_gradients_are_reduced_at_one_place(table: Schedule, data: st.DataObject):
    stage = data.draw(st.integers(0, table.stages - 1))
    rank, reduce = table.owner[stage], Action(stage, Kind.REDUCE)
    actions = [action for action in table.actions[rank] if action != reduce]
    right = table.actions[rank].index(reduce)
    at = data.draw(st.integers(0, len(actions)))
    between = actions[min(at, right): max(at, right)]
    actions.insert(at, reduce)
    if any(action.kind.computes for action in between):
        refused(with_list(table, rank, actions), "must reduce the gradients")
    else:
        check(with_list(table, rank, actions))


def test_ranks_that_wait_for_each_other_are_named():
    """Both send first what they can make only of what they receive."""
    table = schedule("1f1b", ranks=2, microbatches=1)
    first, second = table.actions
    table = with_list(table, 0, [first[i] for i in (0, 2, 1, 3, 4)])
    table = with_list(table, 1, [second[i] for i in (1, 2, 3, 0, 4)])
    assert [a.kind for a in table.actions[0]] == [Kind.F, Kind.RECV_B, Kind.SEND_F, Kind.B, Kind.REDUCE]
    refused(table, r"hangs with rank 0 at RECV_B\(0, 0\), rank 1 at F\(1, 0\)")


def test_sends_that_wait_can_hang_though_every_pair_agrees():
    """Rank 0 waits for what rank 2 makes, rank 2 for rank 1, and rank 1 for what rank 0 sends after it has received."""
    table = schedule("interleaved1f1b", ranks=3, virtual_stages=2, microbatches=3)
    actions = list(table.actions[0])
    early, late = actions.index(Action(3, Kind.RECV_F, 0)), actions.index(Action(0, Kind.SEND_F, 0))
    actions.insert(late, actions.pop(early))
    refused(with_list(table, 0, actions), "hangs with rank 0 at RECV_F")


def test_a_rank_that_holds_more_than_promised():
    table = schedule("gpipe", ranks=2, microbatches=3)
    refused(replace(table, in_flight=(2, 1)), "must hold 2 forwards at most on rank 0, and holds 3")


def test_what_is_not_of_the_table():
    table = schedule("1f1b", ranks=2, microbatches=2)
    refused(replace(table, owner=(0, 0)), "must have 1 stages on each of 2 ranks")
    refused(replace(table, in_flight=(2,)), "a list of actions, and a promise")
    refused(with_list(table, 0, [*table.actions[0], Action(1, Kind.F, 0)]), "holds its stage, and has it on rank 0")
    refused(with_list(table, 0, [*table.actions[0], Action(2, Kind.F, 0)]), "on the rank that holds its stage")
    refused(with_list(table, 0, [*table.actions[0], Action(0, Kind.F, 2)]), "must have 2 microbatches")
    refused(with_list(table, 0, [*table.actions[0], Action(0, Kind.SEND_B, 0)]), "must send nothing that no other rank needs")
    refused(with_list(table, 0, [*table.actions[0], Action(0, Kind.RECV_F, 0)]), "must receive nothing that no other rank needs")
    refused(with_list(table, 0, [*table.actions[0], Action(0, Kind.REDUCE, 0)]), "gather and reduce once for all microbatches")
    refused(with_list(table, 0, [*table.actions[0], Action(0, Kind.UNSHARD)]), "must gather the parameters of stage 0 first")
    refused(with_list(table, 0, [a for a in table.actions[0] if a != Action(0, Kind.SEND_F, 1)]),
            "must send on rank 0 what stage 0 makes of microbatch 1 for stage 1")
    refused(with_list(table, 1, [a for a in table.actions[1] if a != Action(1, Kind.RECV_F, 1)]),
            "must receive on rank 1 what stage 0 makes of microbatch 1 for stage 1")
