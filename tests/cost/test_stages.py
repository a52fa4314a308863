"""What a pipeline's step takes on a cluster, by hand."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxpar.compiler import compile_program
from fxpar.cost.clusters import Cluster, Link
from fxpar.cost.operators import measure
from fxpar.cost.stages import OperatorTimes, StageLoad, added_bytes, stage_times, step_on, step_time
from fxpar.errors import PlanError
from fxpar.ops.ring.operator import axes_of
from fxpar.passes.partition.phases import beside_computation, once_a_step
from fxpar.passes.strategies.stages import Stage, cut_stages
from fxpar.pipeline.schedules import Kind, schedule
from fxpar.plan import Plan

N, ROWS, COUNT = 64, 32, 4
PRODUCT = 2 * (ROWS // COUNT) * N * N
"""Floating-point operations of one microbatch's product with a layer's matrix."""
CUT = (ROWS // COUNT) * N * 4
"""Bytes of what a layer makes of a microbatch."""
LOSS = 4
"""Bytes of the loss, which two ranks sum: all of it over a link."""
NEVER = 1e-30
"""Seconds of what is to take none."""


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(N, N, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().sum()


def machine(flops: float = 1 / NEVER, bandwidth: float = 1 / NEVER, alpha: float = NEVER, beta: float = 1 / NEVER, host: int = 8
            ) -> Cluster:
    """Its network takes ten times as long as its links within a host."""
    links = (Link("host", host, alpha, beta, beta, ""), Link("network", None, 10 * alpha, beta / 10, beta / 10, ""))
    return Cluster("made up", "a device", 2**30, bandwidth, (("float32", flops),), (("float32", 1.0),), links, ())


@functools.cache
def stages(plan: str) -> list[Stage]:
    """Of two layers each."""
    text = f"pp=2,microbatches={COUNT},stage_boundaries=layers.2,{plan}"
    return cut_stages(compile_program(Tower(), text, (torch.empty(ROWS, N),)), Plan.parse(text).pp)


def loads(plan: str) -> list[StageLoad]:
    return [StageLoad(s.program, s.bytes_sent, *once_a_step(s.program)) for s in stages(plan)]


def test_products_take_the_time_of_their_operations():
    first, second = (stage_times(machine(flops=PRODUCT), load) for load in loads("dp=1"))
    assert (first.forward, first.input_gradients, first.weight_gradients) == pytest.approx((2, 0, 3))  # its input has no gradient
    assert (second.forward, second.input_gradients, second.weight_gradients) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("recompute, again", [("none", 0), ("selective", 0), ("full", 2), ("0.75", 0.5)])
def test_what_is_made_again_delays_gradients_of_inputs(recompute, again):
    second = stage_times(machine(flops=PRODUCT), loads(f"recompute={recompute}")[1])
    assert (second.forward, second.input_gradients, second.weight_gradients) == pytest.approx((2, 2 + again, 2))


def test_without_training_nothing_comes_back():
    text = f"pp=2,microbatches={COUNT},stage_boundaries=layers.2"
    made = cut_stages(compile_program(Tower().eval().requires_grad_(False), text, (torch.empty(ROWS, N),)), 2)
    times = [stage_times(machine(flops=PRODUCT), StageLoad(s.program, s.bytes_sent)) for s in made]
    assert [(t.forward, t.input_gradients, t.weight_gradients) for t in times] == [pytest.approx((2, 0, 0))] * 2


def test_small_products_and_other_operators_take_the_time_of_their_bytes():
    first = stage_times(machine(bandwidth=1.0), loads("dp=1")[0])
    product, relu = 2 * CUT + N * N * 4, 2 * CUT
    assert first.forward == 2 * (product + relu)
    assert first.input_gradients + first.weight_gradients == 3 * product + 2 * 2 * relu


def test_gradients_are_summed_once_where_they_may_wait():
    size = 2 * N * N * 4
    ring = {zero: 2 * size / 2 if zero == 0 else size / 2 for zero in range(4)}  # of an all-reduce, and of half of one
    for zero, (unshard, reduce, each) in {0: (0, 1, 0), 1: (1, 1, 0), 2: (1, 0, 1), 3: (0, 0, 1)}.items():
        first = stage_times(machine(beta=1.0), loads(f"dp=2,zero={zero}")[0])
        assert (first.unshard, first.reduce) == pytest.approx((unshard * ring[zero], reduce * ring[zero]), abs=1e-6), zero
        assert first.weight_gradients == pytest.approx(each * ring[zero], abs=1e-6), zero
        assert first.forward == pytest.approx(ring[3] if zero == 3 else 0, abs=1e-6), zero


@pytest.mark.parametrize("plan, numbers, size", [
    ("dp=1", 2 * N * N, 12), ("dp=2", 2 * N * N, 12), ("dp=2,zero=1", 2 * N * N, 12), ("dp=2,zero=2", N * N, 12),
    ("dp=2,zero=3", N * N, 12), ("dp=2,zero=1,param_dtype=bf16", 2 * N * N, 2 + 4 + 12),
])
def test_gradients_of_later_microbatches_are_added(plan, numbers, size):
    """Two layers: three times float32 is read and written for each number, and bfloat16 is cast first."""
    load = loads(plan)[0]
    assert added_bytes(load, measure(load.program).values) == numbers * size
    on = machine(flops=1 / NEVER, bandwidth=1.0) if "bf16" not in plan else replace(
        machine(bandwidth=1.0), flops=(("bfloat16", 1 / NEVER),), efficiency=(("bfloat16", 1.0),))
    one, four = (stage_times(on, replace(load, microbatches=count)) for count in (1, 4))
    assert four.weight_gradients - one.weight_gradients == pytest.approx(0.75 * numbers * size)
    assert (four.forward, four.input_gradients) == (one.forward, one.input_gradients)


@pytest.mark.parametrize("host, slower", [(2, 1), (1, 10)])
def test_collectives_take_the_slowest_link_of_their_group(host, slower):
    times = [stage_times(machine(beta=1.0, host=host), load) for load in loads("dp=2")]
    assert times[0].reduce == pytest.approx(slower * 2 * N * N * 4)


def test_half_the_step_of_two_ranks_is_bubble_where_microbatches_are_few():
    order = schedule("1f1b", ranks=2, microbatches=COUNT)
    made = step_on(machine(flops=PRODUCT), order, loads("dp=1"))
    busy = (2 + 3) * COUNT, (2 + 4) * COUNT
    assert made.busy == pytest.approx(busy)
    assert made.step == pytest.approx(2 + busy[1] + 3)  # the last stage waits for a forward, and its last backward is waited for
    assert made.bubble == pytest.approx(1 - sum(busy) / 2 / made.step)


@pytest.mark.parametrize("plan, host, slower", [
    ("dp=1", 2, 1), ("dp=1", 1, 10),
    ("dp=2", 4, 1), ("dp=2", 2, 10),  # partners are two ranks apart
    ("dp=2", 3, 10),  # ranks 0 and 2 are on one host, 1 and 3 are not
])  # fmt: skip
def test_messages_take_the_link_between_partners(plan, host, slower):
    order = schedule("gpipe", ranks=2, microbatches=1)
    made = step_on(machine(alpha=1.0, beta=CUT / 2, host=host), order, loads(plan))
    sent = next(span for span in made.spans[0] if span.action.kind.name == "SEND_F")
    bytes_of_rank = CUT // (2 if plan == "dp=2" else 1)
    assert sent.seconds == pytest.approx(slower * (1 + bytes_of_rank / (CUT / 2)))


def test_what_stays_on_a_rank_takes_no_message():
    made = compile_program(Tower(), "pp=2,virtual_stages=2,schedule=zbv,microbatches=4", (torch.empty(ROWS, N),))
    cut = [StageLoad(s.program, s.bytes_sent) for s in cut_stages(made, 4)]
    slow = step_on(machine(flops=PRODUCT, alpha=100.0), schedule("zbv", ranks=2, virtual_stages=2, microbatches=1), cut)
    # Two messages there, two back, and none between stages 1 and 2; four forwards, I(3), I(2), W(2), I(1), B(0).
    assert slow.step == pytest.approx(4 * 100 + 9)


def test_gathers_and_reductions_beside_computation_take_what_is_longer():
    ring = N * N * 4  # seconds, over a link of one byte a second: of half of each of a stage's two layers
    load = loads("dp=2,zero=3")[1]
    gathers, sums = beside_computation(load.program)
    hidden = replace(load, beside_forward=gathers, beside_backward=sums)
    work = PRODUCT / 2  # of a rank
    for slow in (0.01, 100.0):  # computation takes less, or more
        on = machine(flops=work / (slow * ring), beta=1.0)
        forward, backward = 2 * slow * ring + LOSS, 4 * slow * ring
        times = stage_times(on, hidden)
        assert times.forward == pytest.approx(max(ring, forward))
        assert times.of(Kind.B) == pytest.approx(max(2 * ring, backward))  # parameters are gathered again
        assert stage_times(on, load).forward == pytest.approx(ring + forward)
    alone = compile_program(Tower(), "dp=2,zero=3,overlap_grad_reduce=false,overlap_param_gather=false", (torch.empty(ROWS, N),))
    assert beside_computation(alone) == (set(), set())


def test_without_a_pipeline_the_last_backward_hides_reductions():
    for text, hides in (("", True), (",overlap_grad_reduce=false", False)):
        program = compile_program(Tower(), f"dp=2,microbatches=2{text}", (torch.empty(ROWS, N),))
        order, load = schedule("1f1b", ranks=1, microbatches=2), StageLoad(program, 0, *once_a_step(program))
        fast, slow = (step_on(machine(flops=1 / NEVER, beta=beta), order, [load]).step for beta in (1 / NEVER, 1.0))
        assert slow - fast == pytest.approx(4 * N * N * 4 + 2 * LOSS)
        made = step_on(machine(flops=PRODUCT / 1e6, beta=1.0), order, [load])  # a backward takes longer than the sums
        assert made.step == pytest.approx(made.busy[0] + (0 if hides else 4 * N * N * 4), rel=1e-6)


def test_what_a_step_is_of_the_peak():
    order = schedule("1f1b", ranks=2, microbatches=COUNT)
    made = step_time(machine(flops=PRODUCT, bandwidth=1e6), order, loads("recompute=full"), stored=2 * N * N * 4)
    products = COUNT * (2 + 3 + 2 + 4)  # what is made again is none of the model's
    assert made.flops == products * PRODUCT and made.peak == 2 * PRODUCT
    assert made.optimizer == pytest.approx(7 * 2 * N * N * 4 / 1e6)
    assert made.seconds == pytest.approx(made.timeline.step + made.optimizer)
    assert made.utilization == pytest.approx(products / 2 / made.seconds)
    whole = step_time(machine(flops=PRODUCT), order, loads("dp=2"), stored=0)
    assert whole.flops == products * PRODUCT and whole.peak == 4 * PRODUCT  # of all ranks


class Attention(nn.Module):
    """Of two heads of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()


@pytest.mark.parametrize("slow", [1e-3, 1e6])
def test_keys_and_values_go_round_while_attention_is_computed(slow):
    length, ranks = 32, 4
    program = compile_program(Attention(), f"cp={ranks}", (torch.empty(1, length, 16),))
    [ring] = [n for n in program.graph.nodes if axes_of(n) is not None]
    cost, part = measure(program).costs[ring], 2 * length // ranks * 16 * 4  # bytes of a rank's keys and values
    seconds = functools.partial(OperatorTimes, program=program)
    ahead, back = seconds(machine(flops=cost.forward / slow, beta=1.0)).seconds(ring)
    behind = slow * cost.backward / cost.forward
    # Where nothing takes time to travel:
    assert seconds(machine(flops=cost.forward / slow)).seconds(ring) == pytest.approx((slow, behind))
    assert ahead == pytest.approx(max(slow, slow / ranks + (ranks - 1) * part))
    # The gradients of keys and values travel behind them:
    assert back == pytest.approx(max(behind, behind / ranks + (ranks - 1) * part + ranks * part))


def test_a_dtype_that_the_cluster_does_not_compute_in_is_refused():
    with pytest.raises(PlanError, match="must be one that a device computes in: float32"):
        stage_times(machine(), loads("param_dtype=bf16")[0])
