"""compat: what it asks of PyTorch about graphs and their operators, and of those that trace, split and lower them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils.checkpoint import CheckpointPolicy

from fxpar import compat
from fxpar.compat import stages
from fxpar.ops.exchange import ROWS
from fxpar.ops.runtime import LONE
from fxpar.ops.vocabulary import WAIT

aten = torch.ops.aten


def regions() -> fx.Graph:
    """A graph with a no-grad region and an autocast region, as export makes them."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().max() + 1
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ x
            return y / scale

    return torch.export.export(Net(), (torch.ones(2, 2),)).graph



def test_is_pointwise():
    assert compat.is_pointwise(aten.add.Tensor) and compat.is_pointwise(aten.gelu.default)
    assert compat.is_pointwise(aten.leaky_relu.default)
    assert not any(map(compat.is_pointwise, (aten.sum.default, aten.mm.default, torch.add, len)))



def test_is_random():
    assert all(map(compat.is_random, (aten.rand.default, aten.normal_.default, aten.bernoulli.default, aten.dropout.default)))
    assert not any(map(compat.is_random, (aten.add.Tensor, torch.rand)))



def test_is_grouped_product():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(compat.is_grouped_product(func))
            return func(*args, **(kwargs or {}))

    seen: list[bool] = []
    x, weights, ends = torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([2, 4], dtype=torch.int32)
    with Seen():
        F.grouped_mm(x, weights, offs=ends)
        aten._grouped_mm(x, weights, ends)
        aten._grouped_mm.default(x, weights, ends)
        torch.mm(x, x.T)
    assert seen[:3] == [True, True, True] and not any(seen[3:])



def test_an_export_says_where_vmap_is():
    class Maps(torch.nn.Module):
        def forward(self, x):
            return torch.vmap(torch.sin)(x)

    exported = torch.export.export(Maps(), (torch.ones(2, 3),), strict=False)
    assert any(compat.is_of_vmap(n.target) for n in exported.graph.nodes)
    assert not any(compat.is_of_vmap(n.target) for n in exported.run_decompositions({}).graph.nodes)


def test_mutates():
    assert all(map(compat.mutates, (aten.add_.Tensor, aten.copy_.default)))
    assert not any(map(compat.mutates, (aten.add.Tensor, aten.view.default, torch.add)))



@pytest.mark.parametrize("found", [compat.no_grad_region, compat.autocast_region])
def test_regions_are_recognised(found):
    assert [found(n) for n in regions().nodes].count(True) == 1



def test_compile_graph_has_autograd():
    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    (y,) = compat.compile_graph(graph, [x, w], {"reorder_for_peak_memory": False})(x, w)
    torch.testing.assert_close(y, torch.tanh(x @ w))
    (mine,), (theirs,) = torch.autograd.grad(y.sum(), w), torch.autograd.grad(torch.tanh(x @ w).sum(), w)
    torch.testing.assert_close(mine, theirs)



def test_graph_pass_sees_the_graph_and_is_identified_by_its_files():
    seen = []
    made = compat.graph_pass(seen.append, __file__)
    graph = fx.Graph()
    made(graph)
    assert seen == [graph]
    assert made.uuid() == compat.graph_pass(len, __file__).uuid() != compat.graph_pass(len, compat.__file__).uuid()
    keyed = [compat.graph_pass(len, __file__, key=key).uuid() for key in ("", "a", "b", "a")]
    assert keyed[0] == made.uuid() and keyed[1] == keyed[3] and len(set(keyed)) == 3



def test_joint_graphs_are_edited_and_then_split():
    graph = fx.symbolic_trace(lambda x, w: ((x @ w).exp().sin(),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    seen: dict[str, list] = {}

    def joint(graph: fx.Graph) -> None:
        calls = [n for n in graph.nodes if n.op == "call_function"]
        seen["forward"] = [n.target for n in calls if not compat.in_backward(n)]
        seen["backward"] = [n.target for n in calls if compat.in_backward(n)]

    (y,) = compat.partition_eagerly(graph, [x, w], joint)(x, w)
    (mine,), (theirs,) = torch.autograd.grad(y.sum(), w), torch.autograd.grad((x @ w).exp().sin().sum(), w)
    torch.testing.assert_close(mine, theirs)
    assert {aten.exp.default, aten.sin.default} <= set(seen["forward"]) - {aten.cos.default}
    assert aten.cos.default in seen["backward"] and aten.sin.default not in seen["backward"]



def test_memory_budget_keeps_less():
    def kept(budget: float | None) -> int:
        def function(x: torch.Tensor) -> tuple[torch.Tensor]:
            for _ in range(6):
                x = torch.tanh(x @ x)
            return (x,)

        x, sizes = torch.randn(16, 16, requires_grad=True), []
        with compat.memory_budget(budget):
            run = compat.partition_eagerly(fx.symbolic_trace(function), [x], lambda graph: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run(x)
        return sum(sizes)

    assert kept(None) == kept(1.0) > kept(0.3)
    assert kept(None) == kept(1.0)  # nothing stays set



def test_operators_of_attention_with_fewer_heads_of_keys_are_counted_under_a_memory_budget():
    q, k = torch.empty(2, 8, 16, 64, device="meta"), torch.empty(2, 2, 16, 64, device="meta")
    with compat.memory_budget(0.5):
        grouped = flop_counter.sdpa_flop_count(q.shape, k.shape, k.shape)
        assert grouped == flop_counter.sdpa_flop_count(q.shape, q.shape, q.shape) > 0



def test_lowered_graphs_are_those_of_forward_and_backward():
    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    with compat.FakeTensorMode():
        x, w = torch.empty(3, 4), torch.empty(4, 2, requires_grad=True)
    seen = []
    config = {"post_grad_custom_post_pass": compat.graph_pass(seen.append, __file__)}
    forward, backward = compat.lowered_graphs(graph, [x, w], config)
    assert [g.graph for g in (forward, backward)] == seen
    assert [n.target for n in forward.graph.nodes if n.op == "call_function"][:2] == [aten.mm.default, aten.tanh.default]
    assert [n.name for n in backward.graph.nodes if n.op == "placeholder"][-1] == "tangents_1"
    with torch.no_grad():
        assert len(compat.lowered_graphs(graph, [x, w], {})) == 1



def test_graph_passes_in_two_parts_are_those_in_one():
    """`stages.graphs_before` and `stages.apply_graph_passes`."""
    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    with compat.FakeTensorMode():
        x, w = torch.empty(3, 4), torch.empty(4, 2, requires_grad=True)
    seen = []
    config = {"post_grad_custom_post_pass": compat.graph_pass(seen.append, __file__)}
    decided: list[stages.Decision] = []
    parts = stages.graphs_before(graph, [x, w], config, decided.append)
    assert len(parts) == 2 and not seen
    [decision] = decided
    assert decision.forward < set(decision.graph.nodes) and decision.banned <= decision.forward
    assert {n.target for n in decision.fusible if n.op == "call_function"} >= {aten.tanh.default} and not decision.joins
    kept = {n.name: n.target for n in decision.saved}
    assert aten.tanh.default in kept.values()
    assert all(decision.network[f"{name}_in"][f"{name}_out"]["capacity"] > 0 for name in kept)
    made = [stages.apply_graph_passes(g, config) for g in parts]
    assert [g.graph for g in made] == seen
    whole = compat.lowered_graphs(graph, [x, w], config)
    assert [[n.target for n in g.graph.nodes] for g in made] == [[n.target for n in g.graph.nodes] for g in whole]



def test_values_of_changed_operators_stay_and_missing_ones_are_made():
    """`stages.apply_graph_passes`: a pass puts in an operator without a value, and has another read its result."""
    def edit(graph: fx.Graph) -> None:
        tanh = next(n for n in graph.nodes if n.target is aten.tanh.default)
        with graph.inserting_before(tanh):
            tanh.args = (graph.call_function(aten.abs.default, (tanh.args[0],)),)

    with compat.FakeTensorMode():
        x, w = torch.empty(3, 4), torch.empty(4, 2)
    config = {"post_grad_custom_post_pass": compat.graph_pass(edit, __file__)}
    with torch.no_grad():
        [module] = stages.graphs_before(fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),)), [x, w], config)
    before = {n.target: n.meta["val"] for n in module.graph.nodes if n.op == "call_function"}
    stages.apply_graph_passes(module, config)
    after = {n.target: n.meta["val"] for n in module.graph.nodes if n.op == "call_function"}
    assert isinstance(after[aten.abs.default], compat.FakeTensor) and after[aten.abs.default].shape == (3, 2)
    assert after[aten.tanh.default] is before[aten.tanh.default]


def test_fake_view():
    with compat.FakeTensorMode():
        base = torch.empty(4, 6)
        view = base.t()[2:5]
        other = torch.empty(4, 6)
    made = stages.fake_view(view, other)
    assert isinstance(made, compat.FakeTensor) and made.fake_mode is view.fake_mode and made.device == view.device
    assert (made.shape, made.stride(), made.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
    assert compat.storage_of(made) == compat.storage_of(other) != compat.storage_of(view)


@pytest.mark.parametrize("name", stages.UNBOUNDED)
def test_passes_are_local_unless_others_are_turned_on(name):
    assert stages.passes_are_local() and hasattr(inductor_config, name)
    with inductor_config.patch({name: True}):
        assert not stages.passes_are_local()
    assert stages.passes_are_local()


def test_interpreted_graphs_compute_what_compiled_ones_do():
    """`compat.interpret_graph`, through the graph passes of its settings, forward and backward."""
    ran = []

    class Counting(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            ran.append(target)
            return super().call_function(target, args, kwargs)

    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    passed: list[fx.Graph] = []
    config = {"post_grad_custom_post_pass": compat.graph_pass(passed.append, __file__)}
    run = compat.interpret_graph(graph, [x, w], config, Counting)
    assert len(passed) == 2 and ran == []  # the backward too, before anything ran
    (y,) = run(x, w)
    assert ran[:2] == [aten.mm.default, aten.tanh.default]
    torch.testing.assert_close(y, torch.tanh(x @ w))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], torch.autograd.grad(torch.tanh(x @ w).sum(), w)[0])



@pytest.mark.parametrize("way", ["trace", "interpret", "compile"])
def test_steps_are_handed_over_ready_to_run(way):
    """`compat.trace_steps`, `compat.interpret_steps`, `compat.compile_steps`: a `compat.TracedForward`, by a `compat.Cut`."""
    x, w = torch.randn(3, 4).requires_grad_(), torch.randn(4, 2).requires_grad_()
    ready: list = []

    def cut(graph: fx.GraphModule, like: list, saved: int, donated: list[int], make: compat.Make) -> None:
        assert len(like) == saved + 1 and (way == "trace" or donated)
        ready.append(make(graph, like, donated, 2))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("own", torch.ones(2))

        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
            return (x @ w + self.own,)

    def steps(function) -> compat.TracedForward:
        graph, config = fx.symbolic_trace(function), {"reorder_for_peak_memory": False}
        kept: compat.Cut = cut
        return {"trace": lambda: compat.trace_steps(graph, [x, w], lambda joint: None, kept),
                "interpret": lambda: compat.interpret_steps(graph, [x, w], config, fx.Interpreter, kept),
                "compile": lambda: compat.compile_steps(graph, [x, w], config, kept)}[way]()

    made = steps(lambda x, w: (torch.sin(x @ w), x.detach() + 1))
    with torch.autocast("cpu", torch.bfloat16), compat.as_traced():
        y, z, *saved = made.run([x, w])
        ((run, like),) = ready
        grads = run([*saved, torch.ones(3, 2)])
    assert made.seeds == [0] and made.saved == len(saved) and not y.requires_grad and y.dtype == torch.float32
    torch.testing.assert_close([y, z, *grads], [
        torch.sin(x @ w).detach(), x.detach() + 1, *torch.autograd.grad(torch.sin(x @ w).sum(), [x, w])])
    assert [(a.shape, a.stride()) for a in like] == [(a.shape, a.stride()) for a in grads]
    with pytest.raises(compat.SharedOutputs) as shared:
        steps(lambda x, w: (x @ w, x.t()))
    assert shared.value.positions == [1]
    with pytest.raises(compat.NotInSteps):
        steps(Own())
    assert compat.storage_of(x) == compat.storage_of(x.t()[1:]) != compat.storage_of(x.clone())


@pytest.mark.parametrize("way", ["interpret", "compile"])
def test_steps_of_graphs_that_were_edited(way):
    """`stages.graphs_before` in steps, `compat.steps_of`, `compat.compiling`, `compat.interpreting`: a `compat.Making`."""
    inputs = [torch.randn(3, 4).requires_grad_(), torch.randn(4, 2).requires_grad_()]
    made, parts = [], []
    making: compat.Making = compat.compiling() if way == "compile" else compat.interpreting(fx.Interpreter)

    def cut(module: fx.GraphModule, like: list, saved: int, donated: list[int], make: compat.Make) -> None:
        parts.append(make(module, like, donated, 2)[0])

    def edited(graphs: list[stages.HandedOver]) -> None:
        forward, backward = graphs
        (sine,) = forward.module.graph.find_nodes(op="call_function", target=aten.sin.default)
        sine.target = aten.tanh.default
        made.append(compat.steps_of(forward.module, backward.module, forward.outputs, forward.seeds, backward.donated,
                                    [g.options for g in graphs], cut, making))

    with compat.faked(inputs) as fakes:
        graph = fx.symbolic_trace(lambda x, w: (torch.sin(x @ w),))
        stages.graphs_before(graph, fakes, {"reorder_for_peak_memory": False}, then=edited, in_steps=True)
    x, w = (i.detach() for i in inputs)
    with compat.as_traced():
        y, *saved = made[0].run([x, w])
        grads = parts[0]([*saved, torch.ones(3, 2)])
    assert made[0].seeds == [0] and made[0].saved == len(saved)
    torch.testing.assert_close(y, torch.tanh(x @ w))
    torch.testing.assert_close(grads, [torch.cos(x @ w) @ w.t(), x.t() @ torch.cos(x @ w)])



def test_operands_are_computed_where_they_are_concatenated():
    """`compat.lower_as_concatenation`."""
    from fxpar.backends.inductor.products import WRITTEN

    compat.lower_as_concatenation(WRITTEN)
    x = torch.randn(4, 3)
    run = torch.compile(lambda x: WRITTEN([x.sin(), x.cos()], 1), fullgraph=True)
    with torch.no_grad():
        have, (code,) = torch._inductor.utils.run_and_get_code(run, x)
    torch.testing.assert_close(have, torch.cat([x.sin(), x.cos()], 1))
    assert "fxpar.cat.default(" not in code.split("def call")[-1] and code.count("# alias") == 2



def test_the_fate_of_a_node_in_a_backward_pass():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    inner = x * y
    leaves = [torch.autograd.graph.get_gradient_edge(t).node for t in (x, y)]
    outer, seen = inner * 2, []

    def look(_: torch.Tensor) -> None:
        seen.append([compat.backward_pass(), *map(compat.fate, [*leaves, inner.grad_fn])])

    outer.register_hook(look)
    outer.sum().backward(retain_graph=True)
    outer.sum().backward(retain_graph=True, inputs=[x])
    torch.autograd.grad(outer.sum(), x, retain_graph=True)
    torch.autograd.grad(outer.sum(), inner)
    assert [s[1:] for s in seen] == [["accumulated", "accumulated", "passed"], ["accumulated", "left out", "passed"],
                                     ["asked for", "left out", "passed"], ["left out", "left out", "passed"]]
    assert len({s[0] for s in seen}) == 4 and compat.backward_pass() == -1



def test_trace():
    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x * x).sum(), x)[0]

    with compat.FakeTensorMode() as mode:
        x = torch.ones(3)
    made = compat.trace(gradient, [x])
    assert any(n.target is aten.mul.Tensor for n in made.graph.nodes)
    assert all(n.meta["val"].fake_mode is mode for n in made.graph.nodes if n.op == "call_function")
    assert made(torch.tensor([1.0, 2, 3])).tolist() == [2, 4, 6]


def test_sizes_that_depend_on_values_are_traced():
    """`compat.sizes_of_values`, alone and for a graph that is split."""
    x = torch.tensor([1.0, 0.0, 3.0], requires_grad=True)
    with compat.sizes_of_values([x]) as (fake,):
        assert tuple(fake.shape) == (3,) and fake.requires_grad
        assert not isinstance(fake.nonzero().shape[0], int)
    with compat.sizes_of_values([x], counts=False) as (same,):
        assert same is x
    graph = fx.symbolic_trace(lambda x: ((x[x.nonzero().squeeze(1)] ** 2).sum(),))
    split = compat.partition_eagerly(graph, [x], lambda joint: None, counts=True)
    (grad,) = torch.autograd.grad(split(x)[0], [x])
    torch.testing.assert_close(grad, 2 * x.detach())


@pytest.mark.slow
def test_the_operand_of_a_collective_is_kept_until_it_has_arrived():
    """`compat.lower_as_collective`, of an operator that has one rank here."""
    compat.lower_as_collective(ROWS)
    splits, numbers = torch.ones(2, 2, dtype=torch.int64), torch.arange(2)
    graph = fx.symbolic_trace(lambda x: (WAIT(ROWS(x * 2, splits, numbers, numbers, False, LONE)) + 1,))
    x = torch.tensor([[1.0], [5.0]])
    torch.testing.assert_close(compat.compile_graph(graph, [x])(x)[0], torch.full((2, 1), 3.0))


@pytest.mark.slow
def test_parts_of_a_collective_are_waited_for_one_by_one():
    """`compat.lower_as_wait`: of each wait the operand is another value, and what the collective reads is kept until the last."""
    from fxpar.backends.inductor.tp_overlap import overlap_tensor_parallel
    from fxpar.backends.transport.base import Transport
    from fxpar.backends.transport.threads import Threads
    from fxpar.sharding.mesh import Mesh

    threads = Threads(Mesh(("a",), (3,)))
    name, weight, xs = threads.name(("a",)), torch.randn(4, 2), [torch.randn(2, 4) for _ in range(3)]
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default

    def product(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = WAIT(gather(x * 2, 3, name))
        return torch.mm(whole, w), whole + 1

    def compiled(rank: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        in_parts = compat.graph_pass(lambda graph: overlap_tensor_parallel(graph, Transport(places={name: rank})), key=str(rank))
        config = {"post_grad_custom_post_pass": in_parts, "reorder_for_peak_memory": False}
        return compat.compile_graph(fx.symbolic_trace(product), [xs[0], weight], config)

    with torch.no_grad():
        made = [compiled(rank) for rank in range(3)]
        found = threads.run(lambda rank: made[rank](xs[rank], weight))
    want = 2 * torch.cat(xs)
    for first, second in found:
        torch.testing.assert_close(first, want @ weight)
        torch.testing.assert_close(second, want + 1)


@pytest.mark.parametrize("draws, states", [(lambda q: F.scaled_dot_product_attention(q, q, q), 0),
                                           (lambda q: q * torch.rand_like(q), 1)])
def test_states_of_generators_are_kept_for_what_draws_again(draws, states):
    """`compat.mend_states`: attention without dropout draws nothing."""
    def again(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_function" and not compat.in_backward(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    q, kept = torch.randn(2, 2, 4, 8, requires_grad=True), []
    run = compat.partition_eagerly(make_fx(lambda q: (draws(q).exp(),))(q), [q], again)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        (y,) = run(q)
    assert kept.count(torch.uint8) == states
    (mine,) = torch.autograd.grad(y.sum(), q)
    if not states:
        (theirs,) = torch.autograd.grad(draws(q).exp().sum(), q)
        torch.testing.assert_close(mine, theirs)
    else:
        torch.testing.assert_close(mine * q, y * y.log())
