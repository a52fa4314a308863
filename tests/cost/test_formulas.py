"""The closed forms, beside the schedules and the cost model that they stand for."""

from __future__ import annotations

import pytest

from fxpar.cost import formulas
from fxpar.cost.stages import TERMS
from fxpar.pipeline.schedules import schedule
from fxpar.pipeline.timeline import StageTimes, timeline

SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 2), ("interleaved1f1b", 4), ("zb1p", 1), ("zbv", 2)]


def value(expression, **known: float) -> float:
    return float(expression.subs({formulas.SYMBOLS[name]: number for name, number in known.items()}))


@pytest.mark.parametrize("name, virtual", SHAPES)
@pytest.mark.parametrize("ranks, microbatches", [(2, 8), (4, 8)])
def test_bubbles_are_those_of_the_schedules(name, virtual, ranks, microbatches):
    order = schedule(name, ranks=ranks, virtual_stages=virtual, microbatches=microbatches)
    assert value(formulas.bubble(name), pp=ranks, m=microbatches, v=virtual) == pytest.approx(
        timeline(order, StageTimes(1.0, 1.0, 1.0)).bubble)


@pytest.mark.parametrize("name, virtual", SHAPES)
@pytest.mark.parametrize("microbatches", [2, 8])
def test_as_many_microbatches_are_alive_as_the_schedule_holds(name, virtual, microbatches):
    order = schedule(name, ranks=4, virtual_stages=virtual, microbatches=microbatches)
    held = max(order.memory([1 / virtual] * order.stages))
    assert value(formulas.alive(name), pp=4, m=microbatches, v=virtual) == pytest.approx(held, abs=1e-6)


def test_terms_are_those_of_a_step():
    for name in ("", *(name for name, _ in SHAPES)):
        assert list(formulas.seconds(name)) == list(TERMS)


def test_every_symbol_has_a_meaning_and_is_used():
    used = {symbol.name for name, _ in [("", 1), *SHAPES] for table in (formulas.seconds(name), formulas.memory(name))
            for expression in table.values() for symbol in expression.free_symbols}
    assert used == {*formulas.SYMBOLS}


def test_formulas_can_be_read():
    text = formulas.explained("1f1b")
    assert "seconds of bubble: " in text and "bytes of activations: " in text and "pp" in text
