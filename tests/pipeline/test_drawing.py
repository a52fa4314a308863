"""Drawings of timelines."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fxpar.pipeline.drawing import svg, text
from fxpar.pipeline.schedules import schedule
from fxpar.pipeline.timeline import StageTimes, timeline

EVEN = StageTimes(1.0, 1.0, 1.0)
SVG = "{http://www.w3.org/2000/svg}"


def test_a_line_for_each_rank():
    drawn = text(timeline(schedule("1f1b", ranks=2, microbatches=3), EVEN), width=45)
    assert drawn == """\
rank 0 |F0-F1-      B0====F2-B1====   B2====|
rank 1 |   F0-B0====F1-B1====F2-B2====      |
F- forward, B= whole backward
1f1b: 2 ranks, 2 stages, 3 microbatches; step
12 s, bubble 25.0%
microbatches alive: stage 0: 2, stage 1: 1"""


def test_stages_of_a_rank_are_told_apart_and_memory_is_said():
    table = schedule("zbv", ranks=2, virtual_stages=2, microbatches=3)
    drawn = text(timeline(table, StageTimes(1e-3, 1e-3, 1e-3)), kept=[2**30] * 4, width=85).splitlines()
    assert drawn[:2] == [
        "rank 0 |F0--F1--F2--f0--i0~~w0..f1--i1~~w1..B0======f2--i2~~w2..B1======B2======    |",
        "rank 1 |    F0--f0--F1--f1--i0~~w0..F2--I0~~W0..f2--i1~~w1..I1~~i2~~I2~~W1..w2..W2..|",
    ]
    assert drawn[2:4] == ["F- forward, B= whole backward, I~ gradients of inputs, W. gradients of weights; small",
                          "letters: every other stage of a rank"]
    assert drawn[4] == "zbv: 2 ranks, 4 stages, 3 microbatches; step 19 ms, bubble 5.3%"
    assert drawn[-1] == "activations: ranks 0 to 1: 4.00 GiB"


def test_wide_tables_stay_within_the_width():
    table = schedule("interleaved1f1b", ranks=8, virtual_stages=2, microbatches=32)
    lines = text(timeline(table, EVEN)).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(len(line) == 120 for line in lines[:8])
    assert lines[0].startswith("rank 0 |FFFF")


def test_a_width_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 19"):
        text(timeline(schedule("1f1b", ranks=2, microbatches=3), EVEN), width=18)


def test_a_step_that_takes_no_time_is_drawn():
    assert text(timeline(schedule("1f1b", ranks=2, microbatches=3), StageTimes(0.0, 0.0, 0.0)), width=60).startswith("rank 0 |F ")


def titled(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The bars of actions, by the actions' names."""
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    return {bar.find(f"{SVG}title").text.partition(":")[0]: bar for bar in bars}


def test_bars_lie_where_actions_do():
    table = schedule("zb1p", ranks=2, microbatches=3, unshard=True)
    line = timeline(table, StageTimes(1.0, 1.0, 1.0, unshard=0.5, reduce=1.0), 0.25)
    root = ElementTree.fromstring(svg(line, width=1074))  # 1000 of them for the step
    bars = titled(root)
    spans = {str(span.action): span for spans in line.spans for span in spans if not span.action.kind.is_message}
    assert bars.keys() == spans.keys()
    for name, bar in bars.items():
        assert float(bar.get("x")) == pytest.approx(64 + 1000 * spans[name].start / line.step, abs=0.01)
        assert float(bar.get("width")) == pytest.approx(1000 * spans[name].seconds / line.step, abs=0.01)
    kinds = ("F(0, 0)", "B(0, 0)", "I(1, 0)", "W(1, 0)", "UNSHARD(0)", "REDUCE(0)")
    assert len({bars[name].get("fill") for name in kinds}) == 6
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert words[-8:-2] == ["forward", "whole backward", "gradients of inputs", "gradients of weights",
                            "gather parameters", "sum gradients"]
    assert words[-2] == f"zb1p: 2 ranks, 2 stages, 3 microbatches; step {line.step:.4g} s, bubble {line.bubble:.1%}"
    assert words.count("2") == 5  # the third microbatch's F and B, and F, I and W


def test_stages_of_a_rank_have_their_shade():
    table = schedule("zbv", ranks=2, virtual_stages=2, microbatches=3)
    root = ElementTree.fromstring(svg(timeline(table, EVEN)))
    fills = {name: bar.get("fill") for name, bar in titled(root).items()}
    assert fills["F(0, 0)"] == fills["F(1, 0)"] != fills["F(2, 0)"] == fills["F(3, 0)"]
    assert "lighter: every other stage of a rank" in [node.text for node in root.iter(f"{SVG}text")]
