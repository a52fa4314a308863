"""Tables of schedules: what they promise, and how they are refused."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings

from fxpar.errors import PlanError
from fxpar.pipeline.check import check
from fxpar.pipeline.schedules import SCHEDULES, Action, Kind, Schedule, schedule
from tests.pipeline.tables import VIRTUAL, every_schedule, schedules


@given(schedules())
def test_tables_are_complete_possible_and_cannot_hang(table: Schedule):
    check(table)


@pytest.mark.slow
def test_every_table_of_eight_ranks_and_less():
    for table in every_schedule(range(1, 9), range(1, 33)):
        check(table)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_of_production(name: str):
    for microbatches in (16, 31, 100, 128):
        check(schedule(name, ranks=16, virtual_stages=VIRTUAL[name][-1], microbatches=microbatches))


def written(table: Schedule, rank: int) -> str:
    """What a rank computes, as in "F0 B0", or "F0.0 F1.0" where it holds several stages."""
    own = table.stages_of(rank)
    return " ".join(a.kind.value + (f"{own.index(a.stage)}." if len(own) > 1 else "") + str(a.microbatch)
                    for a in table.actions[rank] if a.kind.computes)


def test_gpipe_runs_all_forwards_first():
    table = schedule("gpipe", ranks=3, microbatches=2)
    assert [written(table, rank) for rank in range(3)] == ["F0 F1 B0 B1"] * 3


def test_1f1b_alternates_from_the_last_rank_on():
    table = schedule("1f1b", ranks=3, microbatches=4)
    assert [written(table, rank) for rank in range(3)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


def test_interleaved_ranks_turn_to_their_next_stage_after_a_round():
    table = schedule("interleaved1f1b", ranks=2, virtual_stages=2, microbatches=4)
    assert table.owner == (0, 1, 0, 1)
    assert written(table, 0) == "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3"
    assert written(table, 1) == "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"


def test_zb1p_delays_gradients_of_weights_by_the_rank():
    table = schedule("zb1p", ranks=3, microbatches=4)
    assert written(table, 1) == "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3"
    assert written(table, 2) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"


def test_backwards_of_the_first_stage_are_whole():
    for name, virtual_stages in (("zb1p", 1), ("zb1p", 2), ("zbv", 2)):
        table = schedule(name, ranks=3, virtual_stages=virtual_stages, microbatches=7)
        kinds = {a.stage: set() for a in table.actions[0]}
        for action in table.actions[0]:
            kinds[action.stage].add(action.kind)
        assert Kind.B in kinds[0] and not {Kind.I, Kind.W} & kinds[0]
        assert all({Kind.I, Kind.W} <= found for stage, found in kinds.items() if stage > 0)


@pytest.mark.parametrize("name, virtual_stages, split", [
    ("gpipe", 1, []), ("1f1b", 1, []), ("interleaved1f1b", 2, []), ("zb1p", 1, [1, 2]), ("zbv", 2, [1, 2, 3, 4, 5]),
])
def test_stages_whose_backward_is_in_halves(name: str, virtual_stages: int, split: list[int]):
    table = schedule(name, ranks=3, virtual_stages=virtual_stages, microbatches=6)
    assert [s for s in range(table.stages) if table.splits(s)] == split


def test_zbv_has_the_last_stage_on_the_first_rank():
    table = schedule("zbv", ranks=3, virtual_stages=2, microbatches=5)
    assert table.owner == (0, 1, 2, 2, 1, 0)
    assert table.stages_of(0) == (0, 5)
    assert not any(a.kind.is_message and a.stage == 2 and table.peer(a) != 1 for a in table.actions[2])


def test_gradients_are_summed_before_the_rank_is_through():
    """All of a rank's stages but the one that ends last are reduced while it computes."""
    table = schedule("interleaved1f1b", ranks=4, virtual_stages=2, microbatches=8)
    for actions in table.actions:
        computes = [i for i, a in enumerate(actions) if a.kind.computes]
        assert [i < computes[-1] for i, a in enumerate(actions) if a.kind is Kind.REDUCE] == [True, False]


def test_parameters_are_gathered_first_where_they_are_to_be():
    table = schedule("zbv", ranks=2, virtual_stages=2, microbatches=3, unshard=True)
    assert table.actions[0][:2] == (Action(0, Kind.UNSHARD), Action(3, Kind.UNSHARD))
    assert not any(a.kind is Kind.UNSHARD for a in schedule("gpipe", ranks=2, microbatches=1).actions[0])


@pytest.mark.parametrize(("name", "virtual_stages", "alive"), [
    ("gpipe", 1, (8, 8, 8, 8)),
    ("1f1b", 1, (4, 3, 2, 1)),
    ("interleaved1f1b", 2, (8, 8, 7, 5, 4, 4, 3, 1)),
    ("zb1p", 1, (4, 4, 4, 4)),
    ("zbv", 2, (8, 7, 6, 5, 4, 3, 2, 1)),
])
def test_microbatches_alive(name: str, virtual_stages: int, alive: tuple[int, ...]):
    table = schedule(name, ranks=4, virtual_stages=virtual_stages, microbatches=8)
    assert table.alive() == alive


@settings(max_examples=50)
@given(schedules())
def test_no_promise_is_larger_than_what_a_rank_comes_to_hold(table: Schedule):
    """Zbv's are, where microbatches do not fill the pipeline."""
    if table.name == "zbv":
        assume(table.microbatches >= 2 * table.ranks)
    assert table.memory([1] * table.stages) == table.in_flight


def test_memory_is_that_of_all_stages_of_a_rank_at_one_time():
    table = schedule("zbv", ranks=2, virtual_stages=2, microbatches=6)
    assert table.stages_of(0) == (0, 3) and table.alive() == (4, 3, 2, 1)
    assert table.memory([1, 1, 1, 1]) == (4, 4)


def test_what_is_made_for_the_weights_counts_as_well():
    table = schedule("zb1p", ranks=3, microbatches=4)  # on the last rank two wait for their W when a third's F, or I, has run
    assert table.memory([4, 4, 4], [4, 4, 1])[2] == 1 + 1 + 4
    assert table.memory([4, 4, 4], [4, 4, 10])[2] == 10 + 10 + 10


def test_memory_takes_a_size_for_each_stage():
    with pytest.raises(ValueError, match="needs as many sizes"):
        schedule("1f1b", ranks=2, microbatches=2).memory([1])


def test_an_action_without_a_message_has_no_peer():
    table = schedule("1f1b", ranks=2, microbatches=1)
    assert [table.peer(a) for a in table.actions[0] if a.kind.is_message] == [1, 1]
    with pytest.raises(ValueError, match="F\\(0, 0\\) communicates with no rank"):
        table.peer(Action(0, Kind.F, 0))


ONE = "virtual_stages=1, or schedule=interleaved1f1b"


@pytest.mark.parametrize(("given_", "field", "works"), [
    (dict(name="dualpipe", ranks=2, microbatches=2), "schedule", "1f1b"),
    (dict(name="1f1b", ranks=2, virtual_stages=2, microbatches=2), "virtual_stages", ONE),
    (dict(name="gpipe", ranks=2, virtual_stages=2, microbatches=2), "virtual_stages", ONE),
    (dict(name="interleaved1f1b", ranks=2, microbatches=2), "virtual_stages", "virtual_stages=2, or schedule=1f1b"),
    (dict(name="zbv", ranks=2, virtual_stages=3, microbatches=2), "virtual_stages", "virtual_stages=2, or schedule=zb1p"),
    (dict(name="zb1p", ranks=2, virtual_stages=0, microbatches=2), "virtual_stages", "virtual_stages=1"),
    (dict(name="1f1b", ranks=2, microbatches=0), "microbatches", "microbatches=1"),
    (dict(name="1f1b", ranks=0, microbatches=1), "pp", "pp=1"),
])
def test_what_cannot_be_is_refused_with_what_can(given_: dict, field: str, works: str):
    with pytest.raises(PlanError) as error:
        schedule(**given_)
    assert (error.value.field, error.value.suggestion) == (field, works)
