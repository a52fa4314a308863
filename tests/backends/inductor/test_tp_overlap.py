"""Gathers and scatters beside products: on random graphs whose ranks are threads, in models, and between processes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

import fxpar
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor import tp_overlap
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.inductor.overlap import overlap_communication
from fxpar.backends.inductor.products import WRITTEN
from fxpar.backends.remat import BLOCK, UNSHARD
from fxpar.backends.transport.base import NCCL, Transport
from fxpar.backends.transport.threads import Threads
from fxpar.ops.parts import GATHER_PARTS, NEXT_PART
from fxpar.ops.vocabulary import GATHER, SCATTER, WAIT
from fxpar.plan import plan as plans
from fxpar.report import memory
from fxpar.run.transport import largest_part, overlap_told
from fxpar.sharding.mesh import Mesh
from fxpar.testing import assert_equivalent
from fxpar.verify.step import SimulatedStep
from tests import zoo
from tests.harness import RANDOM
from tests.processes import launch

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
MM, ADDMM = aten.mm.default, aten.addmm.default
EXCHANGE = c10d.all_to_all_single.default


# ---- graphs ----


class Ranks:
    """A graph that every rank of a group runs on numbers of its own."""

    def __init__(self, ranks: int):
        self.ranks, self.threads = ranks, Threads(Mesh(("tp",), (ranks,)))
        self.group = self.threads.name(("tp",))
        self.graph, self.feeds = fx.Graph(), [[] for _ in range(ranks)]

    def input(self, *shape: int) -> fx.Node:
        """What each rank has its own of."""
        given = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(given[-1]) if given else contextlib.nullcontext():
            node = self.graph.placeholder(f"x{len(given)}")
        for rank, feed in enumerate(self.feeds):
            made = torch.Generator().manual_seed(1000 * rank + len(feed))
            feed.append(torch.randn(shape, generator=made, dtype=torch.float64))
        node.meta["val"] = torch.empty(shape, dtype=torch.float64, device="meta")
        return node

    def do(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given, more = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*given, **more)
        return node

    def waited(self, target: Any, x: fx.Node, rows: int, *args: Any) -> fx.Node:
        start = self.graph.call_function(target, (x, *args, self.ranks, self.group))
        wait = self.graph.call_function(WAIT, (start,))
        start.meta["val"] = wait.meta["val"] = x.meta["val"].new_empty(rows, *x.meta["val"].shape[1:])
        return wait

    def gathered(self, x: fx.Node) -> fx.Node:
        return self.waited(GATHER, x, x.meta["val"].shape[0] * self.ranks)

    def scattered(self, x: fx.Node) -> fx.Node:
        return self.waited(SCATTER, x, x.meta["val"].shape[0] // self.ranks, "sum")

    def graphs(self, passes: Any) -> list[fx.Graph]:
        """What the passes make of the graph, rank by rank."""
        made = []
        for rank in range(self.ranks):
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.graph, copies := {}))
            for node, copied in copies.items():
                copied.meta = {k: dict(v) if isinstance(v, dict) else v for k, v in node.meta.items()}
            for apply in passes:
                apply(graph, rank)
            made.append(graph)
        return made

    def run(self, graphs: list[fx.Graph]) -> list[list[Tensor]]:
        modules = [fx.GraphModule(nn.Module(), g) for g in graphs]
        return self.threads.run(lambda rank: list(fx.Interpreter(modules[rank]).run(*self.feeds[rank])))

    def split(self) -> list[fx.Graph]:
        """Every rank's graph after the pass, by which its results are what they were."""
        def apply(graph: fx.Graph, rank: int) -> None:
            tp_overlap.overlap_tensor_parallel(graph, Transport(places={self.group: rank}))

        whole, split = self.graphs([]), self.graphs([apply, lambda graph, rank: overlap_communication(graph)])
        for have, want in zip(self.run(split), self.run(whole), strict=True):
            assert len(have) == len(want)
            for a, b in zip(have, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        return split


def count(graph: fx.Graph, *targets: Any) -> int:
    return sum(n.target in targets for n in graph.nodes)


@dataclass
class Case:
    """Rows are [sequence, batch, width]. projections: how wide each product of what was gathered is; between: operators behind
    the gather; biased: which bias products add; back: what is before the scatter; whole: whether what was gathered is returned,
    too; gradient: whether the last product's left operand has another one."""

    ranks: int
    rows: int
    batch: int
    width: int
    projections: list[int]
    between: list[str]
    biased: str
    back: list[str]
    whole: bool
    gradient: bool


def some_case(r: Random) -> Case:
    return Case(
        r.choice([2, 3, 4]), r.randint(1, 3), r.randint(1, 3), r.randint(1, 4), [r.randint(1, 3) for _ in range(r.randint(1, 3))],
        r.choices(["turn", "sin", "scale", "other", "rows"], k=r.randint(0, 3)), r.choice(["", "row", "matrix"]),
        r.choices(["sin of one", "sum", "turn", "scale", "nothing"], k=r.randint(0, 2)), r.random() < 0.5, r.random() < 0.5)


def between(made: Ranks, case: Case, x: fx.Node) -> fx.Node:
    """Operators on what was gathered, [rows, batch, width], that keep rows apart."""
    for what in case.between:
        shape = list(x.meta["val"].shape)
        if what == "turn":
            x = made.do(aten.permute.default, made.do(aten.permute.default, x, [1, 0, 2]), [1, 0, 2])
        elif what == "sin":
            x = made.do(aten.sin.default, x)
        elif what == "scale":
            x = made.do(aten.mul.Tensor, x, made.input(shape[-1]))
        elif what == "other":
            x = made.do(aten.add.Tensor, x, made.input(*shape))
        else:
            x = made.do(aten.reshape.default, made.do(aten.reshape.default, x, [shape[0] * shape[1], shape[2]]), shape)
    return x


def product(made: Ranks, case: Case, x: fx.Node, wide: int) -> fx.Node:
    weight = made.do(aten.permute.default, made.input(wide, x.meta["val"].shape[1]), [1, 0])
    if not case.biased:
        return made.do(MM, x, weight)
    bias = made.input(wide) if case.biased == "row" else made.input(x.meta["val"].shape[0], wide)
    return made.do(ADDMM, bias, x, weight)


def case_of(case: Case) -> tuple[Ranks, int]:
    """A gather, products, operators, and a product behind which is a scatter. How many products the gather has."""
    made = Ranks(case.ranks)
    x = made.do(aten.cos.default, made.input(case.rows, case.batch, case.width))
    whole = made.gathered(x)
    flat = made.do(aten.reshape.default, between(made, case, whole), [-1, case.width])
    flat.args = (flat.args[0], list(flat.meta["val"].shape))
    results = [product(made, case, flat, wide) for wide in case.projections]
    joined = made.do(aten.sin.default, made.do(aten.cat.default, results, 1))
    out = product(made, case, joined, case.width)
    shape = [case.rows * case.ranks, case.batch, case.width]
    for what in case.back:
        if what == "sum":
            out = made.do(aten.add.Tensor, out, product(made, case, joined, case.width))
        elif what == "sin of one":
            out = made.do(aten.sin.default, out)
        elif what == "scale":
            out = made.do(aten.mul.Tensor, out, made.input(case.width))
        elif what == "turn":
            turned = made.do(aten.permute.default, made.do(aten.reshape.default, out, shape), [1, 0, 2])
            out = made.do(aten.reshape.default, made.do(aten.permute.default, turned, [1, 0, 2]), [shape[0] * shape[1], shape[2]])
    scattered = made.scattered(made.do(aten.reshape.default, out, shape))
    ends = [made.do(aten.mul.Tensor, scattered, made.do(aten.sin.default, scattered))]
    if case.gradient:
        ends.append(made.do(MM, made.do(aten.permute.default, joined, [1, 0]), flat))
    if case.whole:
        ends.append(made.do(aten.reshape.default, whole, shape))
    made.graph.output(ends)
    return made, len(results)


@settings(max_examples=40, deadline=None)
@given(RANDOM)
def test_any_graph(r: Random):
    case = some_case(r)
    made, products = case_of(case)
    for graph in made.split():
        n = case.ranks
        assert count(graph, GATHER, SCATTER) == 0 and count(graph, GATHER_PARTS) == 1
        assert count(graph, NEXT_PART) == count(graph, EXCHANGE) == count(graph, WAIT) == n - 1
        assert count(graph, WRITTEN) == products
        behind = 1 + case.back.count("sum")
        assert count(graph, MM, ADDMM) == n * (products + behind) + case.gradient


def order(graph: fx.Graph) -> str:
    """What stands where: g a gather starts, p a product, n a part has come, s a part is sent, w what was sent is waited for."""
    letters = {GATHER_PARTS: "g", MM: "p", NEXT_PART: "n", EXCHANGE: "s", WAIT: "w", aten.sin.default: "f"}
    return "".join(letters.get(n.target, "") for n in graph.nodes)


def test_what_runs_beside_what():
    made = Ranks(4)
    x = made.do(aten.cos.default, made.input(2, 3))
    whole = made.gathered(x)
    gradient = made.do(MM, made.do(aten.permute.default, whole, [1, 0]), made.input(8, 2))
    one, two = (made.do(MM, whole, made.input(3, 2)) for _ in range(2))
    made.graph.output([made.do(aten.sin.default, made.do(aten.add.Tensor, one, two)), gradient])
    assert [order(g) for g in made.split()] == ["gpp" + "npp" * 3 + "pf"] * 4

    made = Ranks(3)
    y = made.do(aten.cos.default, made.input(6, 4))
    scattered = made.scattered(made.do(MM, y, made.input(4, 2)))
    out = made.do(aten.mul.Tensor, made.do(aten.sin.default, scattered), scattered)
    weight = made.do(MM, made.do(aten.permute.default, y, [1, 0]), made.input(6, 5))
    made.graph.output([out, weight])
    assert [order(g) for g in made.split()] == ["pspsp" + "p" + "wwf"] * 3


def test_parts_are_those_of_the_ranks_in_their_turn():
    made = Ranks(4)
    made.graph.output([made.do(MM, made.gathered(made.do(aten.cos.default, made.input(2, 3))), made.input(3, 2))])
    for rank, graph in enumerate(made.split()):
        starts = [n.args[2] for n in graph.nodes if n.target is aten.slice.Tensor]
        assert starts == [2 * ((rank + k) % 4) for k in range(4)]


UNTOUCHED = ["another group", "a parameter", "another order", "both sides", "columns", "leaves", "its own product", "used twice",
             "a gather alone"]


@pytest.mark.parametrize("why", UNTOUCHED)
def test_what_is_left_as_it_is(why: str):
    made = Ranks(2)
    x = made.do(aten.cos.default, made.input(4, 4))
    if why in ("leaves", "used twice"):
        y = made.do(MM, x, made.input(4, 4))
        out = made.scattered(y)
        ends = [out] if why == "leaves" else [made.do(aten.mul.Tensor, made.do(aten.sin.default, out), out), y]
    else:
        whole = made.gathered(x)
        turned = made.do(aten.permute.default, whole, [1, 0])
        if why == "another order":
            shape = made.do(aten.permute.default, made.do(aten.reshape.default, whole, [4, 2, 4]), [1, 0, 2])
            out = made.do(MM, made.do(aten.reshape.default, made.do(aten.clone.default, shape), [8, 4]), made.input(4, 4))
        elif why == "both sides":
            out = made.do(MM, whole, turned)
        elif why == "columns":
            out = made.do(MM, turned, made.input(8, 4))
        elif why == "its own product":
            out = made.do(MM, whole, made.do(MM, turned, made.input(8, 4)))
        elif why == "a gather alone":
            out = made.do(aten.sin.default, whole)
        else:
            out = made.do(MM, whole, made.input(4, 4))
        if why == "a parameter":
            next(n for n in made.graph.nodes if n.target is GATHER).meta["custom"] = {UNSHARD: True}
        ends = [made.do(aten.sin.default, out)]
    made.graph.output(ends)
    group = "others" if why == "another group" else made.group
    for rank, graph in enumerate(made.graphs([])):
        before = str(graph)
        tp_overlap.overlap_tensor_parallel(graph, Transport(places={group: rank}))
        assert str(graph) == before


def test_products_of_other_blocks_wait_for_all():
    """What is gathered once for all layers (an encoder's output): the first layer's products alone are in parts."""
    made = Ranks(2)
    whole = made.gathered(made.do(aten.cos.default, made.input(2, 3)))
    ends = []
    for block in range(3):
        ends.append(made.do(MM, whole, made.input(3, 2)))
        ends[-1].meta["custom"] = {BLOCK: f"layers.{block}"}
    made.graph.output(ends)
    assert [count(g, MM) for g in made.split()] == [4, 4]
    assert [order(g) for g in made.split()] == ["gpnppp"] * 2


def test_a_weight_that_comes_later_is_brought():
    """A weight that is gathered for a later product stands before the first part; what is computed later is not moved."""
    made = Ranks(2)
    whole = made.gathered(made.do(aten.cos.default, made.input(2, 3)))
    first = made.do(MM, whole, made.input(3, 2))
    second = made.do(MM, whole, made.do(aten.permute.default, made.gathered(made.input(1, 3)), [1, 0]))
    third = made.do(MM, whole, made.do(aten.reshape.default, made.do(aten.cos.default, made.input(6)), [3, 2]))
    made.graph.output([first, second, third])
    for graph in made.split():
        assert count(graph, MM) == 5 and count(graph, WRITTEN) == 2
        assert order(graph).replace("w", "") == "gppnppp"


# ---- models ----


class Block(nn.Module):
    def __init__(self, heads: int, ups: int, bias: bool):
        super().__init__()
        width, self.heads = 4 * heads, heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.ups = nn.ModuleList(nn.Linear(width, 8 * heads, bias=bias) for _ in range(ups))
        self.down = nn.Linear(8 * heads, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (w(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        first, *more = [up(y) for up in self.ups]
        return x + self.down(torch.stack([F.gelu(first), *more]).prod(0) if more else F.gelu(first))


class Net(nn.Module):
    def __init__(self, heads: int = 4, ups: int = 2, bias: bool = True, layers: int = 1):
        super().__init__()
        self.table = nn.Embedding(16, 4 * heads)
        self.blocks = nn.ModuleList(Block(heads, ups, bias) for _ in range(layers))
        self.head = nn.Linear(4 * heads, 16, bias=bias)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def net(*args: Any, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(*args, **kwargs)


def batch(rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    tokens = torch.randint(16, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


ON = ",tp_comm_overlap=true"


def traced(captured: Any, plan: str) -> list[fx.Graph]:
    return memory.trace(captured.partition(plan))[0]


def test_a_model_is_what_it_is_without():
    captured = fxpar.capture(net(), batch())
    steps = [fxpar.simulate(captured, plan, lowered=True).step(**batch()) for plan in ("tp=2", "tp=2" + ON)]
    torch.testing.assert_close(steps[1].loss, steps[0].loss, rtol=1e-6, atol=0)
    for name, grad in steps[0].grads.items():
        assert (steps[1].grads[name] - grad).norm() <= 1e-5 * grad.norm(), name
    forward, backward = traced(captured, "tp=2" + ON)
    assert count(forward, GATHER_PARTS) == 3 and count(forward, EXCHANGE) == 2
    assert count(backward, GATHER_PARTS) == 2 and count(backward, EXCHANGE) == 3
    assert not any(count(g, GATHER_PARTS, EXCHANGE) for g in traced(captured, "tp=2"))


PLANS = ["tp=2", "tp=4", "dp=2,tp=2,zero=3", "dp=2,tp=2,zero=1", "tp=2,recompute=full", "tp=2,recompute=selective",
         "tp=2,microbatches=2", "dp=2,tp=2,zero=2,microbatches=2", "tp=2,pp=2,microbatches=2",
         "tp=2,pp=2,microbatches=2,schedule=zb1p"]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(RANDOM)
def test_models_under_plans(r: Random):
    plan = fxpar.Plan.parse(r.choice(PLANS) + ON)
    plan = fxpar.Plan.parse(f"{plan},param_dtype=bf16") if r.random() < 0.4 else plan
    model = net(r.choice([4, 8]), r.randint(1, 3), r.random() < 0.5, plan.pp)
    rows = plan.dp * plan.microbatches * r.randint(1, 2)
    assert_equivalent(model, plan, batch(rows, plan.tp * r.choice([1, 2, 4])), lowered=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan", [
    ("llama", "tp=4"), ("llama_odd", "tp=2,recompute=selective"), ("gpt2", "dp=2,tp=2,zero=3,param_dtype=bf16"),
    ("bert", "tp=2"), ("t5", "tp=2"), ("mixtral", "tp=2,ep=2"), ("nanogpt", "tp=2,cp=2"), ("nanogpt", "tp=2,recompute=0.5"),
    ("shared_block", "tp=2,microbatches=2,param_dtype=bf16"), ("llama_tied", "tp=2,pp=2,microbatches=2")])
def test_models_of_the_zoo(name: str, plan: str):
    model, inputs = zoo.build(name)
    assert_equivalent(model, plan + ON, inputs, lowered=True)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2", "dp=2,tp=2,zero=3,param_dtype=bf16"])
def test_a_compiled_model(plan: str):
    assert_equivalent(net(bias=False), plan + ON, batch(4), backend="inductor")


@pytest.mark.parametrize("plan", ["tp=4,param_dtype=bf16", *(pytest.param(p, marks=pytest.mark.slow) for p in (
    "tp=2", "tp=2,recompute=full"))])
def test_the_peak_grows_by_less_than_what_is_gathered(plan: str):
    with torch.device("meta"):
        model, tokens = Net(32, 2, False, 2), torch.zeros(2, 512, dtype=torch.long)
    captured = fxpar.capture(model, {"tokens": tokens, "labels": tokens})
    off, on = (memory.predict(captured.partition(p)).bytes for p in (plan, plan + ON))
    gathered = 2 * 512 * 4 * 32 * (2 if "bf16" in plan else 4)
    assert on <= off + gathered


def test_where_it_is_on():
    """One line (`AUTO_TP_OVERLAP`) says what nobody said; and nothing is gathered where the sequence is not sharded."""
    assert not plans.AUTO_TP_OVERLAP and not fxpar.Plan(tp=2).overlaps_tp
    assert fxpar.Plan(tp=2, tp_comm_overlap=True).overlaps_tp
    assert not fxpar.Plan(tp=2, sequence_parallel=False, tp_comm_overlap=True).overlaps_tp
    assert not fxpar.Plan(tp_comm_overlap=True).overlaps_tp
    on, off = ([m.__name__.split(".")[-1] for m, _ in inductor.graph_passes(fxpar.Plan.parse(p))] for p in ("tp=2" + ON, "tp=2"))
    assert [n for n in on if n != "tp_overlap"] == off and on.index("tp_overlap") == on.index("overlap") - 1


TOLD = {
    "tp=2": 'off: "auto"', "tp=2,tp_comm_overlap=false": "off: tp_comm_overlap=False",
    "tp=2,tp_comm_overlap=true": "on: parts go by",
    "tp=2,sequence_parallel=false,tp_comm_overlap=true": "off: without sequence_parallel", "dp=2": None,
    "dp=2,tp_comm_overlap=true": "off: without tensor parallelism"}


def test_a_report_says_why_not():
    captured = fxpar.capture(net(), batch())
    for plan, want in TOLD.items():
        program = captured.partition(plan)
        told = overlap_told(program.plan, True, NCCL, program)
        assert (told is None) if want is None else told.startswith(want)
    assert overlap_told(fxpar.Plan.parse("tp=2" + ON), False, NCCL, captured.partition("tp=2")).startswith("off: the eager")
    by_copies = overlap_told(fxpar.Plan.parse("tp=2" + ON), True, Transport(part_groups={"a": "b"}), captured.partition("tp=2"))
    assert by_copies == "on: parts go by copy engines"
    assert largest_part(captured.partition("tp=2")) == 2 * 8 * 16 * 4 // 2
    alone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    program = fxpar.compile_program(alone, "tp=2" + ON, (torch.ones(2, 4),))
    assert overlap_told(program.plan, True, NCCL, program) == "off: nothing of this model is gathered or scattered along tp"


@pytest.mark.slow
def test_blocks_are_cut_alike():
    """Equal layers stay equal: parts that are under way at a cut are waited for behind it."""
    simulation = fxpar.simulate(net(bias=False, layers=6), "tp=2" + ON, batch(), lowered=True)
    flat = simulation.step(**batch())
    ranks = Lowered(simulation.program.mesh, simulation.plan, blocks="once")
    once = SimulatedStep(simulation.model, simulation.program, ranks, batch(), 0, None).run()
    torch.testing.assert_close(once.loss, flat.loss, rtol=0, atol=0)
    assert all(torch.equal(once.grads[n], g) for n, g in flat.grads.items())


# ---- processes ----


def trained(rank: int, backend: str, options: dict[str, Any]) -> list[Any]:
    """Losses of three steps and the weights behind them, with overlap and without; what the report says of it."""
    found = []
    for overlap in (True, False):
        module = fxpar.parallelize(net(layers=options.get("layers", 1), bias=False), "tp=2", batch(), backend=backend,
                                   tp_comm_overlap=overlap, blocks=options.get("blocks", "auto"))
        optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
        for _ in range(3):
            loss = module(**batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights = {n: p.full_tensor().detach() for n, p in module.named_parameters()}
        found.append((losses, weights, module.report().tp_comm_overlap))
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize("backend, options", [
    pytest.param("eager", {}, marks=pytest.mark.slow), pytest.param("inductor", {}, marks=pytest.mark.slow),
    pytest.param("inductor", {"blocks": "once", "layers": 4}, marks=pytest.mark.slow)])
def test_processes(backend: str, options: dict[str, Any]):
    for (losses, weights, told), (plain, want, untold) in launch(2, trained, backend, options, timeout=400):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=1e-6, atol=0)
        for name, weight in want.items():
            assert (weights[name] - weight).norm() <= 1e-5 * weight.norm(), name
        on = "on: parts go by the process group"
        assert told == (on if backend == "inductor" else "off: the eager backend runs one operator after the other")
        assert untold == "off: tp_comm_overlap=False"
