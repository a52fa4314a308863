"""Timelines against closed forms, and against what no timeline may do."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpar.pipeline.schedules import Action, Kind, Schedule, schedule
from fxpar.pipeline.timeline import Span, StageTimes, Timeline, timeline
from tests.pipeline.tables import schedules

EVEN = StageTimes(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("name", "virtual_stages", "bubble"), [
    ("gpipe", 1, 0.273), ("1f1b", 1, 0.273), ("interleaved1f1b", 2, 0.158), ("zb1p", 1, 0.111), ("zb1p", 2, 0.059),
    ("zbv", 2, 0.059)])
def test_bubbles_of_four_ranks_and_eight_microbatches(name: str, virtual_stages: int, bubble: float):
    table = schedule(name, ranks=4, virtual_stages=virtual_stages, microbatches=8)
    assert timeline(table, EVEN).bubble == pytest.approx(bubble, abs=5e-4)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 32), st.floats(0.1, 10), st.floats(0.1, 10))
def test_bubbles_of_one_stage_a_rank(ranks: int, microbatches: int, forward: float, backward: float):
    """(ranks - 1) of (microbatches + ranks - 1), however long a forward and a backward take."""
    times = StageTimes(forward, backward / 2, backward / 2)
    for name in ("gpipe", "1f1b"):
        drawn = timeline(schedule(name, ranks=ranks, microbatches=microbatches), times)
        assert drawn.step == pytest.approx((microbatches + ranks - 1) * (forward + backward))
        assert drawn.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 4), st.floats(0.1, 10))
def test_bubbles_of_interleaved_stages(ranks: int, virtual_stages: int, rounds: int, backward: float):
    """Smaller by the number of stages on a rank, where microbatches are a multiple of the ranks."""
    table = schedule("interleaved1f1b", ranks=ranks, virtual_stages=virtual_stages, microbatches=rounds * ranks)
    drawn = timeline(table, StageTimes(1.0, backward / 2, backward / 2))
    assert drawn.bubble == pytest.approx((ranks - 1) / (virtual_stages * rounds * ranks + ranks - 1))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 12))
def test_bubbles_of_split_backwards(ranks: int, virtual_stages: int, more: int):
    """What is left of the bubble is a forward for each rank but one, where forward, I and W take the same time."""
    microbatches = 2 * ranks - 1 + more
    if virtual_stages == 1:
        drawn = timeline(schedule("zb1p", ranks=ranks, microbatches=microbatches), EVEN)
        assert drawn.step == pytest.approx(3 * microbatches + ranks - 1)
    drawn = timeline(schedule("zbv", ranks=ranks, virtual_stages=2, microbatches=microbatches), EVEN)
    assert drawn.step == pytest.approx(6 * microbatches + ranks - 1)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 16), st.floats(0, 3))
def test_transfers_of_gpipe(ranks: int, microbatches: int, transfer: float):
    """The first microbatch waits for every transfer; those of the others run under computation, if they are shorter."""
    table = schedule("gpipe", ranks=ranks, microbatches=microbatches)
    drawn = timeline(table, StageTimes(3.0, 2.0, 2.0), transfer)
    assert drawn.step == pytest.approx((microbatches + ranks - 1) * 7 + 2 * (ranks - 1) * transfer)


def test_messages_of_one_direction_follow_each_other():
    table = schedule("gpipe", ranks=2, microbatches=3)
    drawn = timeline(table, EVEN, 5.0)
    sends = [(span.start, span.end) for span in drawn.spans[0] if span.action.kind is Kind.SEND_F]
    assert sends == [(1, 6), (6, 11), (11, 16)]
    received = [(span.start, span.end) for span in drawn.spans[1] if span.action.kind is Kind.RECV_F]
    assert received == sends


def test_the_slowest_stage_sets_the_pace():
    times = [EVEN, StageTimes(2.0, 2.0, 2.0), EVEN]
    table = schedule("1f1b", ranks=3, microbatches=50)
    waits = 1 + 1 + 2  # for the first stage's first forward, for the last stage's, and, at the end, the first's backward
    assert timeline(table, times).step == pytest.approx(6 * 50 + waits)


def test_a_whole_backward_can_be_shorter_than_its_parts():
    table = schedule("1f1b", ranks=1, microbatches=2)
    assert timeline(table, StageTimes(1.0, 1.0, 1.0, backward=1.5)).step == 5


def test_gathers_delay_the_first_forward_and_reductions_run_beside():
    table = schedule("interleaved1f1b", ranks=2, virtual_stages=2, microbatches=2, unshard=True)
    bare = timeline(schedule("interleaved1f1b", ranks=2, virtual_stages=2, microbatches=2), EVEN)
    drawn = timeline(table, StageTimes(1.0, 1.0, 1.0, unshard=1.0, reduce=0.5))
    spans = {span.action: span for span in drawn.spans[0]}
    assert [span.start for span in drawn.spans[0][:2]] == [0, 1]
    assert spans[Action(0, Kind.F, 0)].start == 1
    assert spans[Action(2, Kind.REDUCE)].end < spans[Action(0, Kind.REDUCE)].start
    assert drawn.step == bare.step + 1 + 0.5


def times() -> st.SearchStrategy[StageTimes]:
    number = st.floats(0, 10)
    return st.builds(StageTimes, number, number, number, st.none() | number, number, number)


@settings(max_examples=60)
@given(schedules(most_microbatches=8), st.data())
def test_nothing_starts_before_what_it_needs(table: Schedule, data: st.DataObject):
    each = [data.draw(times()) for _ in range(table.stages)]
    hops = [data.draw(st.floats(0, 10)) for _ in range(table.stages - 1)]
    drawn = timeline(table, each, hops)
    ends: dict[Action, float] = {span.action: span.end for spans in drawn.spans for span in spans}
    for rank, spans in enumerate(drawn.spans):
        assert [span.action for span in spans] == list(table.actions[rank])
        for before, after in pairwise([span for span in spans if span.action.kind.computes]):
            assert after.start >= before.end
        for span in spans:
            assert span.start >= max([ends[action] for action in awaited(table, span) if action in ends], default=0.0)
            if not span.action.kind.is_message:
                assert span.seconds == pytest.approx(each[span.action.stage].of(span.action.kind), abs=1e-9)
    assert drawn.step == max(ends.values())
    assert 0 <= drawn.bubble <= 1


def awaited(table: Schedule, span: Span) -> list[Action]:
    """Actions that end before a span begins, if the table has them."""
    stage, microbatch = span.action.stage, span.action.microbatch
    match span.action.kind:
        case Kind.F:
            beside = stage > 0 and table.owner[stage - 1] == table.owner[stage]
            arrives = Action(stage - 1, Kind.F, microbatch) if beside else Action(stage, Kind.RECV_F, microbatch)
            return [Action(stage, Kind.UNSHARD), arrives]
        case Kind.B | Kind.I:
            later = [Action(stage, Kind.RECV_B, microbatch), Action(stage + 1, Kind.I, microbatch)]
            return [Action(stage, Kind.F, microbatch), *later]
        case Kind.W:
            return [Action(stage, Kind.I, microbatch)]
        case Kind.SEND_F:
            return [Action(stage, Kind.F, microbatch)]
        case Kind.SEND_B:
            return [Action(stage, Kind.B, microbatch), Action(stage, Kind.I, microbatch)]
        case Kind.REDUCE:
            return [Action(stage, kind, m) for kind in (Kind.B, Kind.W) for m in range(table.microbatches)]
    return []


def test_nothing_takes_time_where_no_stage_does():
    drawn: Timeline = timeline(schedule("zbv", ranks=2, virtual_stages=2, microbatches=2), StageTimes(0.0, 0.0, 0.0))
    assert (drawn.step, drawn.bubble) == (0, 0)


def test_times_fit_the_stages():
    table = schedule("1f1b", ranks=3, microbatches=2)
    with pytest.raises(ValueError, match="3 stages take as many times, and transfers between them; given were 2 and 2"):
        timeline(table, [EVEN, EVEN])
    with pytest.raises(ValueError, match="given were 3 and 3"):
        timeline(table, EVEN, [0.0] * 3)
    with pytest.raises(ValueError, match="negative"):
        timeline(table, StageTimes(1.0, -1.0, 1.0, backward=1.0))
