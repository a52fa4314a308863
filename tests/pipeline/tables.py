"""Schedules that tests draw from."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st

from fxpar.pipeline.schedules import Schedule, schedule

VIRTUAL = {"gpipe": (1,), "1f1b": (1,), "interleaved1f1b": (2, 3, 4), "zb1p": (1, 2, 3), "zbv": (2,)}
"""Numbers of stages on a rank that tests run each schedule with."""


@st.composite
def schedules(draw: st.DrawFn, least_ranks: int = 1, most_microbatches: int = 32) -> Schedule:
    name = draw(st.sampled_from(sorted(VIRTUAL)))
    return schedule(name, ranks=draw(st.integers(least_ranks, 8)), virtual_stages=draw(st.sampled_from(VIRTUAL[name])),
                    microbatches=draw(st.integers(1, most_microbatches)), unshard=draw(st.booleans()))


def every_schedule(ranks: range, microbatches: range) -> Iterator[Schedule]:
    for name, numbers in VIRTUAL.items():
        for virtual_stages in numbers:
            for size in ranks:
                for number in microbatches:
                    yield schedule(name, ranks=size, virtual_stages=virtual_stages, microbatches=number)
