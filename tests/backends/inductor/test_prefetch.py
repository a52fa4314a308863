"""Parameters gathered ahead and gradients scattered in buckets, on graphs made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx

import fxpar
from fxpar import compat
from fxpar.backends.inductor import buckets, casts, overlap, prefetch
from fxpar.backends.remat import UNSHARD
from fxpar.backends.transport.base import Transport
from fxpar.backends.transport.copies import CopyGroup
from tests.graphs import WAIT, Made, keeps_values, schedule
from tests.harness import RANDOM
from tests.slots import Alone

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GATHERS = (c10d.all_gather_into_tensor.default, c10d.all_gather_into_tensor_coalesced.default)
SCATTERS = (c10d.reduce_scatter_tensor.default, c10d.reduce_scatter_tensor_coalesced.default)
SUMS = (c10d.all_reduce.default, c10d.all_reduce_coalesced.default)
BYTES = 64
"""Of one of the tensors that are communicated."""
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def by_copies(one_thread: str) -> Iterator[Transport]:
    """What moves the bytes of `one_thread` by copies."""
    group = CopyGroup(Alone())
    compat.register_group(group, "copies")
    yield Transport({one_thread: "copies"})
    compat.unregister_group("copies")


def unshard(made: Made, name: str, value: fx.Node, group: str, narrow: bool = False) -> fx.Node:
    """A parameter gathered where it is used, in bfloat16 if `narrow`."""
    if narrow:
        value = made.call(f"narrow_{name}", aten.to.dtype, value, torch.bfloat16)
    wait = made.gathered(name, value, group)
    wait.args[0].meta["custom"] = {UNSHARD: True}
    return made.call(f"wide_{name}", aten.to.dtype, wait, torch.float32) if narrow else wait


def forward(group: str, narrow: tuple[int, ...] = ()) -> Made:
    """x @ p0 @ p1 @ ... @ p4, each parameter gathered right before its use."""
    made = Made()
    x, *parameters = (made.input(name) for name in ("x", "p0", "p1", "p2", "p3", "p4"))
    for i, p in enumerate(parameters):
        x = made.call(f"use_{i}", aten.mm.default, x, unshard(made, f"p{i}", p, group, i in narrow))
    made.graph.output((x,))
    return made


def backward(group: str, hybrid: bool = False) -> Made:
    """Gradients g @ g, (g @ g) @ g, ... that are scattered and returned; if `hybrid`, summed over replicas first."""
    made = Made()
    g = made.input("g")
    grad, out = g, []
    for i in range(5):
        grad = made.call(f"grad_{i}", aten.mm.default, grad, g)
        part = made.scattered(f"g{i}", grad, group)
        out.append(made.reduced(f"r{i}", part, group) if hybrid else part)
    made.graph.output(tuple(out))
    return made


def joined(made: Made, kinds: tuple) -> list[int]:
    """How many tensors each operator of these kinds communicates."""
    return [len(n.args[0]) if isinstance(n.args[0], list) else 1 for n in made.graph.nodes if n.target in kinds]


def in_flight(made: Made, kinds: tuple, which: Callable[[fx.Node], bool] = lambda n: True) -> int:
    """The largest number of such operators that are started and of which nothing is waited for yet."""
    waited, started, most = set(), set(), 0
    for node in made.graph.nodes:
        if node.target in kinds and which(node):
            started.add(node)
        if node.target is WAIT:
            of = node.args[0]
            waited.add(of if of.target in kinds else of.args[0])
        most = max(most, len(started - waited))
    return most


# ---- parameters ----


def test_two_buckets_are_under_way_while_one_is_in_use(one_thread):
    made = keeps_values(forward(one_thread), lambda g: prefetch.prefetch_parameters(g, BYTES))
    assert made.names() == ["start_p0", "wait_p0", "start_p1", "use_0", "start_p2", "start_p3", "wait_p1", "use_1", "start_p4",
                            "wait_p2", "use_2", "wait_p3", "use_3", "wait_p4", "use_4"]  # fmt: skip


@pytest.mark.parametrize("limit, sizes", [
    (1, [1] * 5), (2 * BYTES - 1, [1] * 5), (2 * BYTES, [2, 2, 1]), (4 * BYTES, [4, 1]), (5 * BYTES, [5])])
def test_buckets_are_of_at_most_the_limit_in_the_order_of_use(one_thread, limit, sizes):
    made = keeps_values(forward(one_thread), lambda g: prefetch.prefetch_parameters(g, limit))
    assert joined(made, GATHERS) == sizes and in_flight(made, GATHERS) <= prefetch.LEAD + 1
    starts = [n for n in made.graph.nodes if n.target in GATHERS]
    operands = [p for n in starts for p in (n.args[0] if isinstance(n.args[0], list) else [n.args[0]])]
    assert [p.name for p in operands] == ["p0", "p1", "p2", "p3", "p4"]


def test_the_first_bucket_is_small(one_thread, monkeypatch):
    monkeypatch.setattr(prefetch, "FIRST_BYTES", BYTES)
    made = keeps_values(forward(one_thread), lambda g: prefetch.prefetch_parameters(g, 2 * BYTES))
    assert joined(made, GATHERS) == [1, 2, 2]


def test_parameters_of_another_dtype_are_in_other_buckets_and_cast_before(one_thread):
    made = keeps_values(forward(one_thread, narrow=(1, 2)), prefetch.prefetch_parameters)
    assert joined(made, GATHERS) == [1, 2, 2]
    names = made.names()
    assert names.index("wait_p0") < min(names.index("narrow_p1"), names.index("narrow_p2"))
    assert max(names.index("narrow_p1"), names.index("narrow_p2")) < names.index("use_0") < names.index("wide_p1")


def test_buckets_start_before_gradients_that_would_keep_them_waiting(one_thread):
    """As in a backward pass: a large gradient is there before any parameter is used."""
    made = Made()
    x, *parameters = (made.input(name) for name in ("x", "p0", "p1", "p2", "p3"))
    grad = made.scattered("grad", made.call("grad", aten.mm.default, x, x), one_thread)
    for i, p in enumerate(parameters):
        x = made.call(f"use_{i}", aten.mm.default, x, unshard(made, f"p{i}", p, one_thread))
    made.graph.output((x, grad))
    keeps_values(made, lambda g: (overlap.overlap_communication(g), prefetch.prefetch_parameters(g, BYTES)))
    assert made.names() == ["start_p0", "grad", "start_p1", "start_p2", "start_grad", "wait_p0", "use_0", "start_p3", "wait_p1",
                            "use_1", "wait_p2", "use_2", "wait_p3", "use_3", "wait_grad"]  # fmt: skip


# ---- casts ----


def narrowed(group: str, kinds: str) -> Made:
    """Parameters cast and gathered: "n" as they are, "i" through a permutation that changes nothing, "t" transposed, "d" from
    float64, "s" with their cast used once more, "w" without a cast."""
    made = Made()
    out = []
    parameters = [made.input(f"p{k}", torch.float64 if kind == "d" else torch.float32, turned=kind == "t")
                  for k, kind in enumerate(kinds)]
    for k, (kind, p) in enumerate(zip(kinds, parameters, strict=True)):
        value = p if kind == "w" else made.call(f"narrow_{k}", casts.CAST, p, torch.bfloat16)
        if kind in "it":
            value = made.call(f"turned_{k}", aten.permute.default, value, [0, 1] if kind == "i" else [1, 0])
        gathered = made.gathered(f"p{k}", value, group)
        gathered.args[0].meta["custom"] = {UNSHARD: True}
        out.append(made.call(f"use_{k}", aten.mul.Tensor, gathered, 3))
        if kind == "s":
            out.append(value)
    made.graph.output(tuple(out))
    return made


@pytest.mark.parametrize("kinds, together", [
    ("nn", [2]), ("nin", [3]), ("ntn", [2]), ("ndnd", [2, 2]), ("nsn", [3]), ("n", []), ("ts", []), ("wwnw", []), ("nwn", [])])
def test_casts_of_a_bucket_are_one_operator(one_thread, kinds, together):
    made = keeps_values(narrowed(one_thread, kinds), prefetch.prefetch_parameters)
    assert [len(n.args[0]) for n in made.graph.nodes if n.target is casts.CAST_TOGETHER] == together
    left = sum(n.target is casts.CAST for n in made.graph.nodes)
    assert left + sum(together) == len(kinds) - kinds.count("w") + kinds.count("s")


@pytest.mark.parametrize("kinds, gathers, together", [
    ("nin", [3], []), ("n", [1], []), ("ndnd", [], [2, 2]), ("ntn", [], [2]), ("nsn", [3], []), ("ww", [], [])])
def test_what_copies_casts_too_if_all_of_a_bucket_is_cast(one_thread, by_copies, kinds, gathers, together):
    made = keeps_values(narrowed(one_thread, kinds), lambda g: prefetch.prefetch_parameters(g, transport=by_copies))
    assert [len(n.args[0]) for n in made.graph.nodes if n.target is casts.GATHER_CASTS] == gathers
    assert [len(n.args[0]) for n in made.graph.nodes if n.target is casts.CAST_TOGETHER] == together
    if gathers:
        assert sum(n.target is casts.CAST for n in made.graph.nodes) == kinds.count("s")


def concatenated(group: str, uses: str) -> Made:
    """Six parameters cast and gathered; `uses` says which are concatenated ("20" in that order) and which used alone ("1"): with
    "t" transposed, with "c" by columns, with "+" and once more."""
    made = Made()
    waits = []
    for k in range(6):
        value = made.call(f"narrow_{k}", casts.CAST, made.input(f"p{k}"), torch.bfloat16)
        waits.append(made.gathered(f"p{k}", value, group))
        waits[-1].args[0].meta["custom"] = {UNSHARD: True}
    out = []
    for i, use in enumerate(uses.split()):
        values = []
        for j, k in enumerate(int(c) for c in use if c.isdigit()):
            turned = [made.call(f"turned_{i}_{j}", aten.permute.default, waits[k], [1, 0])]
            turned += [made.call(f"back_{i}_{j}", aten.permute.default, turned[0], [1, 0])] * ("t" not in use)
            values.append(turned[-1])
        value = made.call(f"cat_{i}", aten.cat.default, values, int("c" in use)) if len(values) > 1 else values[0]
        out.append(made.call(f"use_{i}", aten.mul.Tensor, value, 3))
        if "+" in use:
            out.append(made.call(f"more_{i}", aten.mul.Tensor, values[0], 2))
    made.graph.output(tuple(out))
    return made


@pytest.mark.parametrize("uses, limit, counts", [
    ("20 1 345", 512, [[2, 3, 1]]), ("012 345", 512, [[3, 3]]), ("0 1 2 3 4 5", 512, [[1] * 6]), ("00 12 345", 512, [[2, 3, 1]]),
    ("201t 345", 512, [[3, 1, 1, 1]]), ("201c 345", 512, [[3, 1, 1, 1]]), ("201+ 345", 512, [[3, 1, 1, 1]]),
    ("01 23 45", 64, [[2], [2], [2]]), ("0 12 345", 64, [[1], [2], [3]]),
    ("0 12 345", 96, [[2, 1], [3]])])
def test_what_is_only_concatenated_is_gathered_so(one_thread, by_copies, uses, limit, counts):
    made = concatenated(one_thread, uses)
    cats = sum(n.target is casts.CAT for n in made.graph.nodes)
    overlap.overlap_communication(made.graph)
    keeps_values(made, lambda g: prefetch.prefetch_parameters(g, limit, by_copies))
    gathers = [n for n in made.graph.nodes if n.target is casts.GATHER_CASTS]
    assert [n.args[-1] for n in gathers] == counts
    assert sum(n.target is casts.CAT for n in made.graph.nodes) == cats - sum(c > 1 for each in counts for c in each)
    for node in gathers:
        assert [v.shape[0] for v in node.meta["val"]] == [4 * c for c in node.args[-1]]
        assert [u.meta["val"].shape for u in sorted(node.users)] == [v.shape for v in node.meta["val"]]


def looked_up(group: str, lookup: bool) -> Made:
    """A parameter used after an activation that is gathered and, if `lookup`, a small input that is."""
    made = Made()
    x, p = made.input("x"), made.input("p")
    y = unshard(made, "y", made.call("y", aten.mm.default, x, p), group)
    if lookup:
        y = made.call("both", aten.add.Tensor, y, made.gathered("x", x, group))
    made.graph.output((made.call("out", aten.mm.default, y, unshard(made, "p", p, group)),))
    return made


def test_what_is_computed_before_it_is_gathered_stays(one_thread):
    made = keeps_values(looked_up(one_thread, lookup=False), prefetch.prefetch_parameters)
    assert made.names() == ["start_p", "y", "start_y", "wait_y", "wait_p", "out"]


@pytest.mark.parametrize("late", [0, 4])
def test_a_cast_that_something_else_uses_first_is_made_once_more_for_the_gather(one_thread, late):
    """A tied table: the lookup goes to the cast part, the head to the gathered table."""
    made = forward(one_thread, narrow=(late,))
    cast = next(n for n in made.graph.nodes if n.name == f"narrow_p{late}")
    first = next(n for n in made.graph.nodes if n.op != "placeholder")
    with made.graph.inserting_before(first):
        early = made.graph.node_copy(cast)
        seen = made.call("seen", aten.sum.default, early)
    cast.replace_all_uses_with(early)
    made.graph.erase_node(cast)
    made.graph.output_node().args = ((*made.graph.output_node().args[0], seen),)
    keeps_values(made, lambda g: prefetch.prefetch_parameters(g, BYTES))
    assert len(early.users) == 1 and len([n for n in made.graph.nodes if n.target is aten.to.dtype]) == 3


def test_small_inputs_are_gathered_before_parameters(one_thread):
    made = keeps_values(looked_up(one_thread, lookup=True), prefetch.prefetch_parameters)
    assert made.names() == ["start_x", "y", "start_y", "start_p", "wait_y", "wait_x", "both", "wait_p", "out"]


def test_small_inputs_alone_are_gathered_at_the_start(one_thread):
    made = Made()
    x = made.input("x")
    y = made.call("y", aten.mm.default, x, x)
    made.graph.output((made.call("total", aten.add.Tensor, y, made.gathered("x", x, one_thread)),))
    keeps_values(made, prefetch.prefetch_parameters)
    assert made.names() == ["start_x", "y", "wait_x", "total"]


def test_a_graph_without_parameters_is_left_alone(one_thread):
    made = backward(one_thread)
    names = made.names()
    assert keeps_values(made, prefetch.prefetch_parameters).names() == names


# ---- gradients ----


def test_a_bucket_of_scatters_is_waited_for_when_the_second_after_it_starts(one_thread):
    made = keeps_values(backward(one_thread), lambda g: buckets.bucket_reductions(g, BYTES))
    names = made.names()
    for i in range(3):
        assert names.index(f"wait_g{i}") == names.index(f"start_g{i + 2}") - 1
    assert names[-2:] == ["wait_g3", "wait_g4"] and in_flight(made, SCATTERS) == 2
    made = keeps_values(backward(one_thread), lambda g: buckets.bucket_reductions(g, 2 * BYTES))
    assert joined(made, SCATTERS) == [2, 2, 1] and in_flight(made, SCATTERS) == 2


def test_a_bucket_starts_where_its_last_gradient_is_made(one_thread):
    made = keeps_values(backward(one_thread), lambda g: buckets.bucket_reductions(g, 2 * BYTES))
    names = made.names()
    starts = [n.name for n in made.graph.nodes if n.target in SCATTERS]
    assert names.index("grad_1") < names.index(starts[0]) < names.index("grad_2")
    assert names.index("grad_3") < names.index(starts[1]) < names.index("grad_4")


def test_scattered_gradients_are_summed_over_replicas_in_buckets_too(one_thread):
    made = keeps_values(backward(one_thread, hybrid=True), lambda g: buckets.bucket_reductions(g, 2 * BYTES))
    assert joined(made, SCATTERS) == joined(made, SUMS) == [2, 2, 1]
    assert in_flight(made, SCATTERS) == 2
    assert all(name.startswith("wait_r") for name in made.names()[-5:])  # what is summed in place


def test_all_of_a_bucket_are_waited_for_before_anything_is_made_of_one(one_thread):
    """gloo writes all results of the bucket again when the last is waited for: over a sum made in place of the first."""
    made = Made()
    x = made.input("x")
    a, b, c = (made.scattered(n, x, one_thread) for n in "abc")
    made.graph.output((made.reduced("again", a, one_thread), b, c))
    made = keeps_values(made, buckets.bucket_reductions)
    assert joined(made, SCATTERS) == [3]
    assert max(made.names().index(f"wait_{n}") for n in "abc") < made.names().index("start_again")


def test_scatters_that_are_computed_with_are_left_alone(one_thread):
    made = Made()
    x = made.input("x")
    a, b = made.scattered("a", x, one_thread), made.scattered("b", x, one_thread)
    made.graph.output((a, b, made.call("use", aten.mm.default, a, x)))
    assert joined(keeps_values(made, buckets.bucket_reductions), SCATTERS) == [1, 1]


def test_a_sum_of_a_sum_starts_after_it(one_thread):
    made = Made()
    x = made.input("x")
    inner = [made.reduced(n, x, one_thread) for n in ("a", "b")]
    made.graph.output((*(made.reduced(f"{n}2", made.call(f"half_{n}", aten.div.Tensor, t, 2), one_thread) for n, t in zip(
        "ab", inner, strict=True)), made.reduced("c", x, one_thread)))
    assert sorted(joined(keeps_values(made, buckets.bucket_reductions), SUMS)) == [1, 1, 3]


# ---- any graph ----


def some_step(r: Random, group: str, products: bool = False) -> Made:
    """Parameters, some used twice, gathered in any order; gradients (if `products`, of weights) scattered, summed, both, or
    computed with."""
    made = Made()
    x = made.input("x")
    parameters = [made.input(f"p{i}") for i in range(r.randint(1, 6))]
    value, out = x, []
    gathered: dict[int, fx.Node] = {}
    for step in range(r.randint(1, 10)):
        i = r.randrange(len(parameters))
        if i not in gathered or r.random() < 0.2:
            gathered[i] = unshard(made, f"{i}_{step}", parameters[i], group, r.random() < 0.3)
        value = made.call(f"use_{step}", aten.mm.default, value, gathered[i])
        grad = made.call(f"grad_{step}", *(aten.mm.default, value, x) if products else (aten.mul.Tensor, value, 0.5))
        if r.random() < 0.3:
            value = made.gathered(f"x_{step}", value, group)
        if r.random() < 0.8:
            grad = made.scattered(f"s_{step}", grad, group)
        if r.random() < 0.4:
            grad = made.reduced(f"r_{step}", grad, group)
        if r.random() < 0.1:
            value = made.call(f"with_{step}", aten.add.Tensor, value, grad)
        if r.random() < 0.3:
            grad = made.call(f"cast_{step}", aten.to.dtype, grad, torch.float64)
        out.append(grad)
    made.graph.output((value, *out))
    return made


def any_step(r: Random, group: str) -> None:
    limit = r.choice([1, BYTES, 2 * BYTES, 3 * BYTES, 1 << 20])
    made = some_step(r, group)
    names = sorted(made.names())
    assert sorted(keeps_values(made, overlap.overlap_communication).names()) == names
    keeps_values(made, lambda g: prefetch.prefetch_parameters(g, limit))
    assert in_flight(made, GATHERS, lambda n: bool(n.meta.get("custom"))) <= prefetch.LEAD + 1
    keeps_values(made, lambda g: buckets.bucket_reductions(g, limit))
    assert in_flight(made, SCATTERS, lambda n: n.target is SCATTERS[1] or buckets.leaves_graph(n)) <= 2


@settings(FIXTURE, max_examples=60)
@given(RANDOM)
def test_any_step_keeps_its_values_and_holds_few_buckets(one_thread, r):
    any_step(r, one_thread)


@pytest.mark.slow
@settings(FIXTURE, max_examples=500)
@given(RANDOM)
def test_any_step_keeps_its_values_and_holds_few_buckets_slow(one_thread, r):
    any_step(r, one_thread)


def test_the_schedule_follows_the_plan(one_thread):
    def scheduled(plan: fxpar.Plan) -> list[list[int]]:
        made = forward(one_thread), backward(one_thread)
        for part in made:
            keeps_values(part, lambda g: schedule(g, plan))
        return [joined(made[0], GATHERS), joined(made[1], SCATTERS)]

    assert scheduled(fxpar.Plan()) == [[5], [5]]
    assert scheduled(fxpar.Plan(overlap_param_gather=False)) == [[1] * 5, [5]]
    assert scheduled(fxpar.Plan(overlap_grad_reduce=False)) == [[5], [1] * 5]
