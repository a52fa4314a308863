"""Reports of pipelines: the numbers of a small model by hand, what tied parameters add, and reports of real ranks."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.errors import PlanError
from fxpar.report.text import ranges
from tests import zoo
from tests.processes import launch

N, ROWS, COUNT = 256, 4096, 4
LAYER = N * N * 4
"""Bytes of a layer's parameters."""
ACTIVATION = ROWS // COUNT * N * 4
"""Bytes of what a layer makes of a microbatch."""


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(N, N, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().sum()


@functools.cache
def report(plan: str, cut: str = "stage_boundaries=layers.1") -> fxpar.Report:
    """Of three layers behind one, if not cut otherwise."""
    return fxpar.inspect(Tower(), f"pp=2,microbatches={COUNT},{cut},{plan}", (torch.empty(ROWS, N),))


def tied(plan: str) -> fxpar.Report:
    return fxpar.inspect(zoo.NanoGPT(), plan, (zoo.ids(), zoo.labels()))


# ---- stages and cuts ----


def test_the_stages_of_a_tower():
    made = report("dp=1").pipeline
    assert made is not None
    first, second = made.stages
    product = 2 * ROWS * N * N
    assert (first.stage, first.rank, first.first, first.last) == (0, 0, "layers.0", "")  # the model itself calls relu
    assert (second.stage, second.rank, second.first, second.last) == (1, 1, "layers.1", "")
    assert (first.parameters, first.bytes, second.parameters, second.bytes) == (N * N, LAYER, 3 * N * N, 3 * LAYER)
    assert (first.flops, second.flops) == (2 * product, 9 * product)  # the model's input has no gradient
    assert (first.share, second.share) == pytest.approx((2 / 11, 9 / 11))
    assert (first.sent, first.returned, first.crossing) == (ACTIVATION, ACTIVATION, 2 * COUNT * ACTIVATION)
    assert (second.sent, second.returned, second.crossing) == (0, 0, 0)


def test_bytes_are_those_of_one_rank():
    made = report("dp=2,zero=1").pipeline
    assert made is not None
    assert (made.stages[0].parameters, made.stages[0].bytes, made.stages[0].sent) == (N * N, LAYER // 2, ACTIVATION // 2)


def test_evaluation_returns_no_gradients():
    made = fxpar.inspect(Tower().eval(), f"pp=2,microbatches={COUNT}", (torch.empty(ROWS, N),))
    assert made.pipeline is not None and [s.returned for s in made.pipeline.stages] == [0, 0]
    assert made.pipeline.stages[0].crossing == COUNT * made.pipeline.stages[0].sent > 0
    assert made.peak.phase == "forward" and made.peak.kept == made.peak.parts["activations"] == 0


def test_numbers_that_follow_one_another_are_ranges():
    assert [ranges(n) for n in ((), (3,), (0, 1, 2, 5, 7, 8))] == ["", "3", "0 to 2, 5, 7 to 8"]


# ---- what a rank holds ----


def test_memory_is_that_of_the_rank_that_holds_most():
    made = report("dp=1")
    assert [p.stages for p in made.parameters] == [(0,), (1,), (1,), (1,)]
    assert made.pipeline is not None
    assert [r.memory["parameters"] for r in made.pipeline.ranks] == [LAYER, 3 * LAYER]
    assert made.memory == {"parameters": 3 * LAYER, "gradients": 3 * LAYER, "optimizer": 6 * LAYER}
    assert made.flops == made.pipeline.stages[1].flops


def test_frozen_parameters_take_neither_gradients_nor_optimizer_state():
    model = Tower()
    model.layers[0].requires_grad_(False)
    made = fxpar.inspect(model, "pp=2,stage_boundaries=layers.1", (torch.empty(ROWS, N),)).pipeline
    assert made is not None
    assert made.ranks[0].memory == {"parameters": LAYER, "gradients": 0, "optimizer": 0}


@pytest.mark.parametrize("schedule, held", [("1f1b", (2, 1)), ("gpipe", (COUNT, COUNT)), ("zb1p", (2, 2))])
def test_peaks_of_the_ranks(schedule, held):
    made = report(f"schedule={schedule}").pipeline
    assert made is not None
    # The first stage keeps where relu's result is not zero; the second what it receives and what its layers make.
    one = (ACTIVATION // 4, 4 * ACTIVATION)
    assert made.kept == [held[0] * one[0], held[1] * one[1]]
    for rank, peak in enumerate(made.peaks):
        layers = (1, 3)[rank]
        assert (peak.parts["parameters"], peak.parts["optimizer"]) == (layers * LAYER, 2 * layers * LAYER)
        assert layers * LAYER <= peak.parts["gradients"] <= 2 * layers * LAYER  # accumulated, and those of a microbatch
        others = (held[rank] - 1) * one[rank]
        assert others <= peak.parts["activations"] <= made.kept[rank]
        assert peak.bytes == sum(peak.parts.values())
    whole = report(f"schedule={schedule}")
    assert whole.peak == max(made.peaks, key=lambda peak: peak.bytes) and whole.peak_memory == whole.peak.bytes


def test_a_rank_holds_all_of_its_stages():
    made = report("schedule=zbv,virtual_stages=2", cut="stage_boundaries=layers.1;layers.2;layers.3").pipeline
    assert made is not None
    assert [r.stages for r in made.ranks] == [(0, 3), (1, 2)] and [s.rank for s in made.stages] == [0, 1, 1, 0]
    assert [peak.parts["parameters"] for peak in made.peaks] == [2 * LAYER, 2 * LAYER]
    assert [peak.parts["optimizer"] for peak in made.peaks] == [4 * LAYER, 4 * LAYER]


def test_outputs_that_are_returned_stay_until_the_step_ends():
    model, inputs = zoo.NanoGPT(vocab=4096, layers=1), (torch.zeros(16, 32, dtype=torch.long),) * 2
    loss, both = (fxpar.inspect(model, f"pp=2,microbatches=4,outputs={outputs}", inputs) for outputs in ("loss", "all"))
    assert loss.pipeline is not None and both.pipeline is not None
    assert both.pipeline.peaks[1].bytes - loss.pipeline.peaks[1].bytes >= 3 * 4 * 32 * 4096 * 4
    assert both.pipeline.peaks[0].bytes == loss.pipeline.peaks[0].bytes


# ---- collectives ----


@pytest.mark.parametrize("zero, gathers, sums", [(0, 0, 1), (1, 1, 1), (2, 1, COUNT), (3, COUNT, COUNT)])
def test_collectives_of_a_step_are_counted_for_each_stage(zero, gathers, sums):
    rows = report(f"dp=2,zero={zero}").collectives
    kind = "reduce_scatter" if zero else "all_reduce"
    layers = [(r.kind, r.phase, r.stage, r.count) for r in rows if r.where == "layers.*"]
    again = [0, gathers if zero == 3 else 0]  # the first layer's weight is of no use in the backward: the input has no gradient
    assert layers == [(made, phase, stage, layers * count) for stage, layers in ((0, 1), (1, 3)) for made, phase, count in (
        ("all_gather", "forward", gathers), ("all_gather", "backward", again[stage]), (kind, "backward", sums)) if count]


def test_microbatches_without_a_pipeline_are_all_counted():
    one, four = (fxpar.inspect(Tower(), f"dp=2,zero=2,microbatches={n}", (torch.empty(ROWS, N),)) for n in (1, 4))
    assert [r.count("all_gather", "forward") for r in (one, four)] == [4, 4]
    assert [r.count("reduce_scatter", "backward") for r in (one, four)] == [4, 16]
    assert one.flops == four.flops


def test_gradients_of_a_tied_parameter_are_summed_over_its_ranks():
    made = tied("dp=2,pp=2,microbatches=2")
    table = next(p for p in made.parameters if p.name == "wte.weight")
    assert table.stages == (0, 1)
    assert [dataclasses.astuple(r) for r in made.collectives if r.axes == ("pp",)] == [
        ("all_reduce", ("pp",), "backward", "wte", 1, table.local_bytes, stage, "pp") for stage in (0, 1)]
    assert made.pipeline is not None
    assert sum(r.memory["parameters"] for r in made.pipeline.ranks) == table.local_bytes + sum(
        p.local_bytes for p in made.parameters)


def test_a_rank_holds_a_tied_parameter_once():
    made = tied("pp=2,schedule=zbv,virtual_stages=2,microbatches=4")
    table = next(p for p in made.parameters if p.name == "wte.weight")
    assert table.stages == (0, 3) and not [r for r in made.collectives if r.axes == ("pp",)]
    assert made.pipeline is not None
    mine, peak = made.pipeline.ranks[0].memory, made.pipeline.peaks[0]
    assert sum(r.memory["parameters"] for r in made.pipeline.ranks) == sum(p.local_bytes for p in made.parameters)
    padding = 512 * len(made.parameters)  # the allocator's
    assert 0 <= peak.parts["parameters"] - mine["parameters"] < padding
    assert 0 <= peak.parts["optimizer"] - mine["optimizer"] < 2 * padding


# ---- as text ----


def test_the_text_of_a_pipeline():
    made = report("dp=2,zero=1")
    text = str(made)
    assert text.startswith(f"plan {made.plan}   mesh pp=2 x dp=2   world size 4\n")
    assert re.search(r"layers\.\*\.weight  \(x2\)  \[256, 256\] .* \[128, 256\] +0\.25 +1\n", text)  # of the same layout
    assert re.search(r"reduce_scatter  dp    backward  layers\.\*  3 +0\.38 +1\n", text)
    assert made.pipeline is not None
    assert "1f1b: 2 ranks, 2 stages, 4 microbatches; step " in text
    assert f"bubble {made.pipeline.timeline().bubble:.1%}\nmicrobatches alive: stage 0: 2, stage 1: 1\n" in text
    assert "on dgx-h100: NVIDIA H100 SXM5 80GB" in text
    assert "0      0        layers.0  (the model)  0.07" in text
    assert f"{made.pipeline.peaks[1].bytes / 2**30:.3f}\n\nmemory a rank: parameters " in text


def test_a_model_that_cannot_be_compiled_is_still_reported():
    def fail():
        raise NotImplementedError("no such operator")

    made = dataclasses.replace(report("dp=1"), predicted=fail)
    text = str(made)
    assert "  -            -\n\nmemory a rank" in text and "not predicted (NotImplementedError: no such operator)" in text


def test_times_are_those_of_the_cluster():
    made = fxpar.inspect(Tower(), "pp=2,microbatches=4", (torch.empty(ROWS, N),)).pipeline
    assert made is not None
    new = made.timeline()
    made.cluster = "dgx-a100"
    assert made.timeline().step > new.step > 0 and "NVIDIA A100" in "\n".join(made.lines(None))
    made.cluster = "abacus"
    with pytest.raises(PlanError, match="`cluster`='abacus'"):
        made.timeline()
    assert made.lines(None)[0].startswith("1f1b: not timed (plan field `cluster`='abacus': must be one of dgx-a100, ")


def test_a_thousand_ranks_without_processes():
    with torch.device("meta"):
        model = Tower()
    plan, x = "dp=128,tp=2,pp=4,microbatches=8,schedule=zb1p", torch.empty(ROWS, N, device="meta")
    made = fxpar.inspect(model, plan, (x,))
    assert made.pipeline is not None
    assert made.plan.world_size == 1024 and "world size 1024" in str(made) and len(made.pipeline.timeline().spans) == 4


# ---- on real ranks ----


def on_ranks(rank: int) -> list[tuple]:
    x = torch.ones(ROWS, N)
    module = fxpar.parallelize(Tower(), f"pp=2,microbatches={COUNT},stage_boundaries=layers.1", (x,), backend="eager")
    mine = []
    for call in (x, torch.ones(ROWS // 2, N)):
        module.eval_step(call)
        made = module.report()
        assert made.pipeline is not None
        mine.append((made.memory, made.pipeline.stages, made.collectives))
    return mine


@pytest.mark.multiproc
def test_the_report_of_a_module():
    one, other = launch(2, on_ranks)
    assert one == other
    made = report("dp=1")
    assert made.pipeline is not None
    assert one[0] == (made.memory, made.pipeline.stages, made.collectives)
    assert one[1][1][0].sent == made.pipeline.stages[0].sent // 2  # of the newest call
