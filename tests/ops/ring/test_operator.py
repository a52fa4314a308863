"""Ring attention as an operator: over threads, processes and in simulations; traced, compiled, recomputed and counted."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch._functorch import partitioners
from torch.utils.flop_counter import FlopCounterMode

from fxpar import compat
from fxpar.backends import simulate
from fxpar.backends.inductor.liveness import Buffer, Lowering, size_of
from fxpar.backends.remat import BLOCK, choose_recomputation
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.backends.transport.threads import Threads
from fxpar.cost import operators
from fxpar.errors import EquivalenceError
from fxpar.ops.ring import costs
from fxpar.ops.ring.operator import BACKWARD, FORWARD, axes_of, ring_attention
from fxpar.ops.runtime import LONE, LoneRuntime, use_runtime
from fxpar.plan import Plan
from fxpar.sharding.mesh import BoundMesh, Mesh
from tests.graphs import calls
from tests.harness import RANDOM
from tests.processes import launch
from tests.ring_cases import Case, off, random_case


def step(case: Case, rank: int) -> list[Tensor]:
    """A rank's part of the result and of the gradients."""
    q, k, v = case.operands(rank)
    out = ring_attention(q, k, v, ("cp",), **case.ids_of(rank), **case.settings)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), case.cut(case.grad, rank))]


def glued(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    return [case.glued(each) for each in zip(*parts, strict=True)]


def in_threads(case: Case, body: Any = step) -> list[Tensor]:
    threads = Threads(Mesh(("cp",), (case.ranks,)))

    def of_rank(rank: int) -> list[Tensor]:
        with use_runtime(threads.runtime(rank)):
            return body(case, rank)

    return glued(case, threads.run(of_rank))


def example(ranks: int = 2, length: int = 16, heads: int = 4, kv: int = 2, **ids_and_settings: Any) -> Case:
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, length, h, 8, generator=gen).transpose(1, 2) for h in (heads, kv, kv))
    names = ("q_segments", "kv_segments", "kv_valid")
    ids = {n: x for n, x in ids_and_settings.items() if n in names}
    return Case(ranks, q, k, v, ids, {n: x for n, x in ids_and_settings.items() if n not in names})


DOCUMENTS = (torch.arange(16) // 5)[None]
EXAMPLES = [
    example(causal=True, zigzag=True), example(4, causal=True), example(causal=True, zigzag=True, window=3), example(),
    example(4, causal=True, zigzag=True, q_segments=DOCUMENTS, kv_segments=DOCUMENTS, kv_valid=torch.arange(16)[None] < 13),
]  # fmt: skip


# ---- who runs it ----


@settings(max_examples=25)
@given(RANDOM)
def test_ranks_as_threads(r):
    case = random_case(r)
    assert off(in_threads(case), case.whole()) < 1e-6


MESH = Mesh(("dp", "cp", "tp"), (2, 2, 2))


@pytest.mark.parametrize("mesh", [Mesh(("cp",), (4,)), MESH], ids=str)
def test_a_simulation_runs_all_ranks_in_lock_step(mesh):
    """Groups of ranks, each with tensors of its own, and what comes before and after is differentiated too."""
    for causal in (True, False):
        cases = {}
        for number, group in enumerate(mesh.groups(("cp",))):
            for index, rank in enumerate(group):
                gen = torch.Generator().manual_seed(number)
                q, k, v = (torch.randn(1, h, 8 * len(group), 8, generator=gen) for h in (4, 2, 2))
                cases[rank] = Case(len(group), q, k, v, settings={"causal": causal, "zigzag": True}), index
        graph = fx.Graph()
        q, k, v = (graph.placeholder(n) for n in "qkv")
        made = graph.call_function(ring_attention, (graph.call_function(torch.sin, (q,)), k, v, ("cp",)),
                                   {"causal": causal, "zigzag": True})
        graph.output((graph.call_function(torch.mul, (made, 2)),))
        assert axes_of(made) == ("cp",) and axes_of(q) is None
        feeds = [list(case.operands(index)) for case, index in (cases[r] for r in range(mesh.world_size))]
        outs = [out for out, in simulate.run(fx.GraphModule(nn.Module(), graph), mesh, feeds)]
        grads = torch.autograd.grad(outs, [x for feed in feeds for x in feed], [
            case.cut(case.grad, index) for case, index in (cases[r] for r in range(mesh.world_size))])
        for group in mesh.groups(("cp",)):
            case = cases[group[0]][0]
            sines = Case(case.ranks, case.q.sin(), case.k, case.v, settings=case.settings)
            out, dq, dk, dv = sines.whole()
            have = [[2 * 0.5 * outs[r], *grads[3 * r : 3 * r + 3]] for r in group]
            assert off(glued(case, have), [2 * out, 2 * dq * case.q.double().cos(), 2 * dk, 2 * dv]) < 1e-6


def test_alone_partners_hold_what_a_rank_holds():
    case = example(causal=True, zigzag=True)
    q, k, v = case.operands(0)
    with use_runtime(LoneRuntime({"cp": 2})):
        out = ring_attention(q, k, v, ("cp",), **case.settings)
    twice = Case(2, *(case.glued([x.detach()] * 2) for x in (q, k, v)), settings=case.settings)
    assert off([out], [twice.cut(twice.whole()[0], 0)]) < 1e-6


def over_gloo(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    bound = BoundMesh(Mesh(("cp",), (4,)), "cpu")
    runtime = GroupRuntime(bound)
    graph = fx.Graph()
    q = graph.placeholder("q")
    graph.call_function(ring_attention, (q, q, q, ("cp",)))
    runtime.prepare(fx.GraphModule(nn.Module(), graph))
    assert len(bound.made_groups()) == 1
    with use_runtime(runtime):
        return [step(case, rank) for case in cases]


@pytest.mark.multiproc
def test_processes():
    cases = [c for c in (random_case(Random(i)) for i in range(60)) if c.ranks == 4][:10]
    assert {c.schedule.halo for c in cases} == {False, True} and any(c.ids for c in cases)
    found = launch(4, over_gloo, cases)
    for i, case in enumerate(cases):
        assert off(glued(case, [mine[i] for mine in found]), case.whole()) < 1e-6


# ---- what compilers see ----


@pytest.mark.parametrize("case", [EXAMPLES[4], *(pytest.param(c, marks=pytest.mark.slow) for c in EXAMPLES[:4])])
def test_what_pytorch_demands_of_an_operator(case):
    """Schemas, results of fake tensors (shapes and strides), gradients, and what AOTAutograd makes of it."""
    ids = [case.ids_of(0).get(n) for n in ("q_segments", "kv_segments", "kv_valid")]
    get = case.settings.get
    more = (*ids, LONE, case.ranks, get("causal", False), get("zigzag", False), get("window"), None)
    q, k, v = case.operands(0)
    torch.library.opcheck(FORWARD, (q, k, v, *more))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = FORWARD(q, k, v, *more)
    torch.library.opcheck(BACKWARD, (torch.ones_like(out), q, k, v, out, lse, *more))


def test_results_lie_as_models_take_them_on():
    case = example(causal=True)
    with use_runtime(LoneRuntime({"cp": 2})):
        out = ring_attention(*case.operands(0), ("cp",), causal=True)
    assert out.transpose(1, 2).is_contiguous()


def program_of(case: Case) -> fx.GraphModule:
    """Attention with operators before and behind it, as a block."""
    graph = fx.Graph()
    q, k, v, *ids = (graph.placeholder(n) for n in ("q", "k", "v", *case.ids))
    made = graph.call_function(ring_attention, (graph.call_function(torch.sin, (q,)), k, v, ("cp",)),
                               {**dict(zip(case.ids, ids, strict=True)), **case.settings})
    graph.output((graph.call_function(torch.tanh, (graph.call_function(torch.transpose, (made, 1, 2)),)),))
    for node in graph.nodes:
        node.meta["custom"] = {BLOCK: "layers.0"}
    return fx.GraphModule(nn.Module(), graph)


def wanted(case: Case) -> list[Tensor]:
    """What `program_of` returns on one device, and the gradients."""
    sines = Case(case.ranks, case.q.sin(), case.k, case.v, case.ids, case.settings)
    out = sines.whole()[0].tanh()
    sines.grad = case.grad * (1 - out * out)
    _, dq, dk, dv = sines.whole()
    return [out, dq * case.q.double().cos(), dk, dv]


@pytest.mark.parametrize("how, case", [
    pytest.param(how, EXAMPLES[i], id=f"{how}-{name}", marks=[pytest.mark.slow] if how == "inductor" and name != "window" else [])
    for how in ("inductor", "selective", "full") for i, name in ((0, "zigzag"), (2, "window"), (4, "documents"))])
def test_compiled(how, case):
    """By Inductor, or as AOTAutograd splits it under a recompute policy."""
    threads, module = Threads(Mesh(("cp",), (case.ranks,))), program_of(case)
    given = [[*case.operands(r), *case.ids_of(r).values()] for r in range(case.ranks)]
    with use_runtime(threads.runtime(0)):
        if how == "inductor":
            made = compat.compile_graph(module, given[0], backward_at_once=True)
        else:
            plan = Plan(recompute=how)
            made = compat.partition_eagerly(module, given[0], lambda joint: choose_recomputation(joint, plan))

    def run(rank: int) -> list[Tensor]:
        (out,) = made(*given[rank])
        grad = case.cut(case.grad, rank).transpose(1, 2)
        return [out.detach().transpose(1, 2), *torch.autograd.grad(out, given[rank][:3], grad)]

    assert off(glued(case, threads.run(run)), wanted(case)) < 1e-6


def test_selective_keeps_what_attention_made(monkeypatch):
    """The ring does not run again in the backward, unless all of a block does."""
    found = {}
    split = partitioners.min_cut_rematerialization_partition
    for how in ("none", "selective", "full"):
        def seen(*args: Any, how: str = how, **options: Any) -> Any:
            found[how] = split(*args, **options)
            return found[how]

        with monkeypatch.context() as patch, use_runtime(LoneRuntime({"cp": 2})):
            patch.setattr(partitioners, "min_cut_rematerialization_partition", seen)
            compat.partition_eagerly(program_of(EXAMPLES[0]), list(EXAMPLES[0].operands(0)),
                                     lambda joint, how=how: choose_recomputation(joint, Plan(recompute=how)))
    assert [calls(found[how][1].graph, "ring_attention") for how in found] == [0, 0, 1]
    assert all(calls(backward.graph, "ring_attention_backward") == 1 for _, backward in found.values())


# ---- what it costs ----


def test_memory_is_predicted_with_its_workspace():
    case = EXAMPLES[0]
    operands = case.operands(0)
    with use_runtime(LoneRuntime({"cp": 2})):
        graphs = compat.lowered_graphs(program_of(case), list(operands), {})
    q, k, v = (x.shape for x in operands)
    for module, operator, want in zip(graphs, costs.OPERATORS, costs.workspace_bytes(case.schedule, q, k, v, torch.float32),
                                      strict=True):
        given = [Buffer(n, torch.float32, size_of(n.meta["val"])) for n in module.graph.find_nodes(op="placeholder")]
        kernels = Lowering(module.graph, given).kernels
        assert [k.workspace for k in kernels if k.workspace] == [want]
        assert [k.nodes[0].target for k in kernels if k.workspace] == [operator]


def test_floating_point_operations_are_counted():
    """By fxpar's cost model, and by PyTorch's counter, of which the partitioner asks what it costs to make a value again."""
    case = EXAMPLES[2]
    operands = [x.detach().to("meta").requires_grad_() for x in case.operands(0)]
    forward, backward = costs.flops(case.schedule, operands[0].shape, operands[2].shape)
    with use_runtime(LoneRuntime({"cp": 2})):
        with FlopCounterMode(display=False) as counter:
            out = ring_attention(*operands, ("cp",), **case.settings)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == backward
        graph = fx.Graph()
        node = graph.call_function(ring_attention)
        value, cost = operators._look(node, (*map(operators.TensorSpec.of, operands), ("cp",)), case.settings)
    assert (cost.forward, cost.backward) == (forward, backward)
    assert value.shape == operands[0].shape


# ---- what is refused ----


X, IDS = torch.ones(2, 4, 8, 6), torch.zeros(2, 8, dtype=torch.int64)


@pytest.mark.parametrize("operands, more, message", [
    ((X, X[:, :3], X[:, :3]), {}, "kv is to divide h"),
    ((X, X[..., :5], X), {}, "kv is to divide h"),
    ((X, X, X.double()), {}, "one dtype"),
    ((X.int(), X.int(), X.int()), {}, r"\(2, 4, 8, 6\) torch.int32.*one dtype"),
    ((X, X, X[:, :, :7]), {}, "to have one dtype"),
    ((X, X, X), {"window": 3}, "window=3, causal=False"),
    ((X, X, X), {"window": 0, "causal": True}, "at least 1 key"),
    ((X, X[:, :, :4], X[:, :, :4]), {"causal": True}, "8 queries and 4 keys"),
    ((X[:, :, :7], X[:, :, :7], X[:, :, :7]), {"causal": True, "zigzag": True}, "7 positions are odd"),
    ((X, X, X), {"q_segments": IDS}, "of queries and of keys"),
    ((X, X, X), {"q_segments": IDS, "kv_segments": IDS[:, :7]}, r"kv_segments is to be \[2 or 1, 8\]"),
    ((X, X, X), {"q_segments": IDS, "kv_segments": IDS.float()}, "kv_segments is to be of integers"),
    ((X, X, X), {"kv_valid": IDS}, "kv_valid is to be of booleans"),
])  # fmt: skip
def test_operands_that_do_not_agree(operands, more, message):
    """Where they run, and where they are traced."""
    with use_runtime(LoneRuntime({"cp": 2})):
        for device in ("cpu", "meta"):
            named = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in more.items()}
            with pytest.raises(ValueError, match=message):
                ring_attention(*(x.to(device) for x in operands), ("cp",), **named)


def test_a_group_of_another_size():
    threads = Threads(Mesh(("cp",), (2,)))
    with pytest.raises(ValueError, match="over 4 ranks in a group of 2"):
        FORWARD(X, X, X, None, None, None, threads.name(("cp",)), 4, False, False, None, None)


def test_gradients_of_gradients_are_an_error():
    with use_runtime(LoneRuntime({"cp": 2})):
        q, k, v = example().operands(0)
        (grad,) = torch.autograd.grad(ring_attention(q, k, v, ("cp",)).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients of ring attention"):
        grad.sum().backward()


def test_ranks_that_ask_for_different_things():
    """One has a window, the other has none: an error, and not a hang."""
    def body(case: Case, rank: int) -> list[Tensor]:
        q, k, v = case.operands(rank)
        return [ring_attention(q, k, v, ("cp",), causal=True, window=2 if rank else None)]

    with pytest.raises(EquivalenceError, match="expects"):
        in_threads(example(causal=True), body)
