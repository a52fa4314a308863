"""The way to a program's first step is timed, part by part, and said once for every new kind of call."""

from __future__ import annotations

import gc
import logging
import re
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fxpar
from fxpar.backends import eager
from fxpar.passes.pipeline import passes
from fxpar.report import report
from fxpar.report.timings import ORDER, Timings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


def test_passes_are_in_groups():
    seconds = {"capture": 1.0} | {name: 2.0 for name, _ in passes()} | {"first forward": 3.0, "lowering": 4.0}
    made = Timings.of(seconds)
    assert [*made.parts] == [name for name in ORDER if name in made.parts]
    assert made.passes == {name: 2.0 for name, _ in passes()} and made.total == sum(seconds.values())
    assert made.parts["canonical"] + made.parts["infer"] + made.parts["partition"] == sum(made.passes.values())
    assert str(made).startswith(f"{made.total:.2f} s: capture 1.00, canonical ") and made.ran and not Timings.of({}).ran


@pytest.mark.parametrize("meta", [False, True])
def test_every_new_kind_of_call_is_one_line_with_its_cost(caplog, monkeypatch, meta):
    caplog.set_level(logging.INFO, "fxpar")
    lower = eager.lower

    def slow(*args: Any, later: Any, **options: Any) -> Any:
        time.sleep(0.02)
        later(0.5)
        return lower(*args, **options)

    monkeypatch.setattr(eager, "lower", slow)
    monkeypatch.setattr(report, "known_peak", lambda made: "not asked for")
    with torch.device("meta" if meta else "cpu"):
        model = Net()
    module = fxpar.parallelize(model, "dp=1", {"x": torch.ones(2, 4)}, backend="eager")
    if meta:
        module.init_weights(0)
    assert "lowering" not in module.report().timings.parts and "to the first step" not in str(module.report())
    for rows in (2, 3, 2):
        module(torch.ones(rows, 4)).backward()
    lines = [text for record in caplog.records if (text := record.getMessage()).startswith(("a program", "its first backward"))]
    assert len(lines) == 4
    for line, rows, count in ((lines[0], 2, 1), (lines[2], 3, 2)):
        assert re.match(rf"a program for x float32 \[{rows}, 4\] is ready after \d+\.\d\d s: capture .*; {count} of this model "
                        r"are kept, of at most 32$", line), line
    assert re.match(r"its first backward took \d+\.\d\d s, and 0\.00 s to be compiled$", lines[1])
    first, newest = (Timings.of(p.timings) for p in module._engine.programs.values())
    assert {"capture", "canonical", "infer", "partition", "lowering", "first forward", "first backward"} <= {*newest.parts}
    assert {"parameters", *(["initialising"] if meta else [])} == {*first.parts} & {"parameters", "initialising"}
    assert newest.parts["lowering"] >= 0.02 and newest.parts["lowering the backward"] == 0.5
    assert module.report().timings == newest and f"to the first step: {newest}" in str(module.report())


def test_programs_that_are_kept_can_be_counted_and_hide_nothing_of_the_model():
    class Own(Net):
        _programs = "its own"

    counts = []
    module = fxpar.parallelize(Net(), "dp=1", {"x": torch.ones(2, 4)}, backend="eager")
    for rows in (2, 3, 4, 3):
        module(torch.ones(rows, 4))
        counts.append(len(module._programs))
    assert counts == [1, 2, 3, 3]
    assert fxpar.parallelize(Own(), "dp=1", {"x": torch.ones(2, 4)}, backend="eager")._programs == "its own"


def test_a_program_that_is_kept_keeps_one_graph_and_its_lines_once(monkeypatch):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().amax()
            return x + torch.relu(self.linear(x)) / scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(Block(), Block())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).square().mean()

    module = fxpar.parallelize(Model(), "dp=1", {"x": torch.ones(2, 4)}, backend="eager")
    module(torch.ones(3, 4)).backward()
    alive: weakref.WeakSet[torch.fx.Graph] = weakref.WeakSet()
    made = torch.fx.Graph.__init__
    monkeypatch.setattr(torch.fx.Graph, "__init__", lambda self, *args, **more: alive.add(self) or made(self, *args, **more))
    for rows in range(4, 8):
        module(torch.ones(rows, 4)).backward()
    gc.collect()
    assert 4 <= len(alive) <= 5  # the last trace's is PyTorch's still
    called = list(module._programs.values())[1:]
    lines = [[n.meta["stack_trace"] for n in p.graph.nodes if n.op == "call_function"] for p in called]
    assert len(lines) == 5 and all(a is b for other in lines for a, b in zip(lines[0], other, strict=True))
