"""The key of a compiled graph holds all that a trace of it reads; what was compiled is found by another process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops import invoke_subgraph

import fxpar
from fxpar import compat
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor.key import key_of, python_functions
from fxpar.backends.trace import tensor_inputs_only
from fxpar.backends.transport.base import Transport
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.dropout_attention import use_kernels
from fxpar.ops.exchange import counts_rows
from fxpar.ops.runtime import use_runtime
from fxpar.program import Program
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.layout import take
from tests import zoo
from tests.backends.inductor.test_inductor import net, two_steps
from tests.graphs import local_feed, runtime_of
from tests.processes import launch
from tests.run.test_experts import LENGTH, VOCAB, Mixture

aten = torch.ops.aten
PLAN = "dp=2,zero=3"


@functools.cache
def program_of(plan: str) -> tuple[Program, list[Tensor]]:
    """The program of a small model, and what one rank feeds it."""
    model, batch = net(dropout=0.3)
    program = fxpar.compile_program(model, plan, batch)
    return program, local_feed(program, model, batch)


class Compiling:
    """What the inductor backend is given to compile."""

    def __init__(self, plan: str = PLAN):
        program, feed = program_of(plan)
        self.plan, self.runtime = program.plan, runtime_of(program)
        plain, keep = tensor_inputs_only(program.module, feed, fused=True)
        self.graph, self.inputs = plain.graph, [feed[i] for i in keep]

    def key(self) -> str | None:
        return key_of(self.graph, self.inputs, self.runtime.facts(), self.plan)


@pytest.fixture
def compiling(two_ranks) -> Compiling:
    return Compiling()


def a_call(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") == name)


def test_what_is_the_same_has_the_same_key(two_ranks):
    assert Compiling().key() == Compiling().key() is not None


@pytest.mark.parametrize("plan", ["tp=2", "dp=2", "dp=2,zero=1", "dp=2,zero=3,recompute=full", "dp=2,zero=3,recompute=0.5",
                                  "dp=2,zero=3,overlap_param_gather=false", "dp=2,zero=3,reduce_dtype=bf16"])
def test_another_plan_is_another_key(compiling, plan):
    assert Compiling(plan).key() != compiling.key()


def another_site(c: Compiling) -> None:
    node = a_call(c.graph, "dropout_mask")
    node.kwargs = {**node.kwargs, "site": node.kwargs["site"] + 1}


def another_argument(c: Compiling) -> None:
    node = a_call(c.graph, "all_gather")
    node.args = (*node.args[:1], ("tp",), *node.args[2:])


def another_operator(c: Compiling) -> None:
    next(n for n in c.graph.nodes if n.target is aten.gelu.default).target = aten.relu.default


def another_mark(c: Compiling) -> None:
    node = next(n for n in c.graph.nodes if n.meta.get("custom"))
    node.meta["custom"] = {**node.meta["custom"], "fxpar_unshard": "else"}


def like(change: Callable[[Tensor], Tensor]) -> Callable[[Compiling], None]:
    def changed(c: Compiling) -> None:
        at = next(i for i, x in enumerate(c.inputs) if x.dim() == 2)
        c.inputs[at] = change(c.inputs[at])

    return changed


def shared_input(c: Compiling) -> None:
    one, other = [i for i, x in enumerate(c.inputs) if x.dim() == 2][:2]
    c.inputs[one] = c.inputs[other].detach().flatten()[: c.inputs[one].numel()].view(c.inputs[one].shape).requires_grad_()


def of_mesh(**changed: Any) -> Callable[[Compiling], None]:
    return lambda c: c.runtime.mesh.__dict__.update(changed)


def another_group(c: Compiling) -> None:
    c.runtime.mesh._groups[("dp",)] = torch.distributed.new_group([0, 1])


def another_exchange_group(c: Compiling) -> None:
    c.runtime.mesh._exchange_groups[("dp",)] = torch.distributed.group.WORLD


def other_blocks(c: Compiling) -> None:
    c.runtime.blocks = "flat"


def another_transport(c: Compiling) -> None:
    c.runtime.transport = Transport({"0": "copies"})


def another_world(c: Compiling) -> None:
    mesh = c.runtime.mesh
    mesh.mesh = dataclasses.replace(mesh.mesh, sizes=(4,))


PARTS = {
    "a dropout site": another_site, "an argument": another_argument, "an operator": another_operator, "a mark": another_mark,
    "the shape of an input": like(lambda x: torch.empty(3, 3)), "its dtype": like(lambda x: x.detach().double().requires_grad_()),
    "its strides": like(lambda x: x.detach().t().contiguous().t().requires_grad_()), "its device": like(lambda x: x.to("meta")),
    "whether it wants a gradient": like(Tensor.detach), "whether it was computed": like(lambda x: x * 1),
    "where it begins in memory": like(lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape).requires_grad_()),
    "whether inputs share memory": shared_input,
    "this rank's index": of_mesh(rank=1), "the kind of this rank": of_mesh(kind=1), "kinds of ranks": of_mesh(kinds=2),
    "the name of a group": another_group, "that of a group of experts": another_exchange_group,
    "the transport": another_transport, "how blocks are compiled": other_blocks, "the size of the mesh": another_world,
    "whether as many rows arrive as leave": lambda c: setattr(c.runtime, "balanced", True),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_all_that_a_trace_reads_of_the_program_and_the_runtime_is_in_the_key(compiling, part):
    before = compiling.key()
    PARTS[part](compiling)
    assert compiling.key() not in (before, None)


def restored(change: Callable[[Any], Any], value: Any, before: Any) -> Callable[[], Iterator[None]]:
    def around() -> Iterator[None]:
        change(value)
        yield
        change(before)

    return around


def inside(context: Callable[[], Any]) -> Callable[[], Iterator[None]]:
    def around() -> Iterator[None]:
        with context():
            yield

    return around


STATES = {
    "gradients": inside(torch.no_grad), "inference": inside(torch.inference_mode),
    "autocast": inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast's dtype": inside(lambda: torch.autocast("cpu", torch.float16)),
    "deterministic": restored(torch.use_deterministic_algorithms, True, False),
    "dtype": restored(torch.set_default_dtype, torch.float64, torch.float32),
    "device": restored(torch.set_default_device, "meta", None),
    "threads": restored(torch.set_num_threads, 2, 1),
    "precision": restored(torch.set_float32_matmul_precision, "medium", "highest"),
    "flash": restored(torch.backends.cuda.enable_flash_sdp, False, True),
    "efficient": restored(torch.backends.cuda.enable_mem_efficient_sdp, False, True),
    "math": restored(torch.backends.cuda.enable_math_sdp, False, True),
    "cudnn's attention": restored(torch.backends.cuda.enable_cudnn_sdp, False, True),
    "kernels": restored(use_kernels, False, True),
    "cudnn": inside(lambda: torch.backends.cudnn.flags(enabled=False)),
    "mkldnn": inside(lambda: torch.backends.mkldnn.flags(enabled=False)),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_how_pytorch_is_set_is_in_the_key(compiling, state):
    before, around = compiling.key(), STATES[state]()
    next(around)
    try:
        assert compiling.key() != before
    finally:
        next(around, None)
    assert compiling.key() == before


@pytest.mark.parametrize("owner, name", [(torch, "__version__"), (torch.version, "git_version"),
                                         (compat, "attention_priority")])
def test_versions_are_in_the_key(compiling, monkeypatch, owner, name):
    before = compiling.key()
    monkeypatch.setattr(owner, name, (lambda: [0]) if callable(getattr(owner, name)) else "0")
    assert compiling.key() != before


def slow(plan: str) -> Any:
    return pytest.param(plan, marks=pytest.mark.slow)


@pytest.mark.parametrize("plan", ["tp=2", slow("dp=2,zero=3"), slow("cp=2"), slow("dp=2,ep=2")])
def test_a_trace_reads_of_the_runtime_what_its_facts_say(two_ranks, plan):
    """Whoever has operators ask a runtime for more puts that into `GroupRuntime.facts`, and then here."""
    read: set[str] = set()

    class Watched(GroupRuntime):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    model, batch = net(dropout=0.3) if plan in ("dp=2,zero=3", "tp=2") else zoo.build("mixtral")
    program = fxpar.compile_program(model, plan, batch)
    values = {"dropout_seed": torch.tensor(7)} | dict(model.named_parameters()) | dict(model.named_buffers()) | batch
    feed = [take(values.get(s.name, s.value).detach(), sharding_at(n), program.mesh, 0).clone().requires_grad_(s.requires_grad)
            for n, s in program.source_of().items()]
    mesh = runtime_of(program).mesh
    names, runtime = mesh.group_names(), Watched(mesh)
    plain, keep = tensor_inputs_only(program.module, feed, fused=True)
    with use_runtime(runtime):
        compat.partition_eagerly(plain, [feed[i] for i in keep], lambda graph: None, counts_rows(plain.graph))
    called = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}  # these ask for no more than the others
    assert "size" in read and read - called <= {"size", "index", "name", "exchange_name", "balanced", "mesh", "__class__"}
    assert mesh.group_names() == names


@pytest.mark.parametrize("change", ["method", "lambda", "object", "constant", "library"])
def test_what_no_text_describes_has_no_key(compiling, change):
    graph = compiling.graph
    node = next(n for n in graph.nodes if n.target is aten.gelu.default)
    with graph.inserting_before(node):
        if change == "method":
            node.args = (graph.call_method("neg", node.args),)
        elif change == "lambda":
            node.target = lambda x: x
        elif change == "object":
            node.args = (*node.args, object())
        elif change == "constant":
            graph.owning_module.register_buffer("made", torch.ones(1))
            node.args = (graph.get_attr("made"),)
        else:
            node.target = torch.ops.c10d.barrier.default
    assert compiling.key() is None
    assert inductor.settings(compiling.plan)["fx_graph_cache"] is False


# ---- what is found ----


def test_functions_that_a_graph_calls_are_named(compiling):
    names = python_functions(compiling.graph)
    assert "fxpar.ops.collectives.all_gather" in names and "fxpar.ops.rng.dropout_mask" in names and names == sorted({*names})
    settings = compat.cache_settings("key", reversed(names))
    assert list(settings["unsafe_marked_cacheable_functions"].items()) == [(name, "key") for name in names]


def test_the_graph_of_a_block_that_is_called_is_a_part_of_the_key():
    def key(operator: Any) -> str | None:
        block, graph = fx.Graph(), fx.Graph()
        block.output((block.call_function(operator, (block.placeholder("x"),)),))
        x = graph.placeholder("x")
        graph.output((graph.call_function(invoke_subgraph, (graph.get_attr("block"), "block", x)),))
        root = nn.Module()
        root.block = fx.GraphModule(nn.Module(), block)
        return key_of(fx.GraphModule(root, graph).graph, [torch.ones(1)], (), fxpar.Plan())

    assert key(aten.sin.default) == key(aten.sin.default) is not None
    assert key(aten.sin.default) != key(aten.cos.default) and key(torch.sin) is None


def found(rank: int, plan: str) -> tuple[dict[str, int], tuple]:
    """What a process finds of a program that it starts, and the numbers that it computes."""
    numbers = two_steps(rank, plan, "inductor")
    return compat.cache_counts(), numbers


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_the_next_start_finds_what_was_compiled(plan, tmp_path, monkeypatch):
    """Two ranks with one folder, each of which finds its own, forward and backward, and computes the same numbers, to the bit."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = launch(2, found, plan, timeout=300), launch(2, found, plan, timeout=300)
    for (first, before), (then, after) in zip(cold, warm, strict=True):
        assert (first["hit"], first["miss"], first["saved"], first["bypass"]) == (0, 1, 1, 0)
        assert (then["hit"], then["miss"], then["graph hit"], then["graph miss"]) == (1, 0, 2, 0)
        assert after[0] == before[0]
        assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


@pytest.mark.multiproc
@pytest.mark.slow
def test_the_stages_of_a_pipeline_find_their_graphs(tmp_path, monkeypatch):
    """Which are traced anew: a forward and the halves of a backward are found singly."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = (launch(2, found, "pp=2,microbatches=2,schedule=zb1p", timeout=400) for _ in range(2))
    for (first, before), (then, after) in zip(cold, warm, strict=True):
        assert first["graph miss"] >= 2 and first["graph hit"] == first["graph bypass"] == 0
        assert (then["graph hit"], then["graph miss"], then["graph bypass"]) == (first["graph miss"], 0, 0)
        assert after[0] == before[0]
        assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


def experts(rank: int) -> tuple[dict[str, int], list[float], dict[str, Tensor]]:
    """As `found`, of a graph with sizes that are known only when it runs; in two calls, of which the rows go elsewhere."""
    torch.manual_seed(0)
    module = fxpar.parallelize(Mixture(), "dp=2,ep=2", {"ids": torch.zeros(2, LENGTH, dtype=torch.long)}, backend="inductor")
    losses = []
    for seed in range(2):
        ids = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(seed))
        loss = module(ids=ids.chunk(2)[rank])["loss"]
        loss.backward()
        losses.append(loss.item())
    return compat.cache_counts(), losses, {n: p.grad.full_tensor() for n, p in module.named_parameters()}


@pytest.mark.multiproc
@pytest.mark.slow
def test_graphs_with_sizes_that_depend_on_values_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = launch(2, experts, timeout=500), launch(2, experts, timeout=500)
    for (first, losses, before), (then, again, after) in zip(cold, warm, strict=True):
        assert (first["hit"], first["miss"], first["saved"]) == (0, 1, 1)
        assert (then["hit"], then["miss"], then["graph hit"], then["graph miss"]) == (1, 0, 2, 0)
        assert again == losses
        assert all(torch.equal(after[name], grad) for name, grad in before.items())
