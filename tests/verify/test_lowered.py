"""What the inductor backend hands over, run for all ranks in this process: it computes what the plain model does."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxpar
from fxpar import compat
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor import overlap
from fxpar.backends.transport.threads import Threads
from fxpar.errors import CaptureError, EquivalenceError, PlanError
from fxpar.program import Program
from fxpar.report.dump import readable
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.mesh import Mesh
from fxpar.testing import assert_equivalent
from tests import zoo
from tests.matrix import pairwise

c10d = torch.ops._c10d_functional

PLANS = ("dp=2", "tp=2", "dp=2,tp=2,zero=1,sequence_parallel=false", "dp=4,dp_replicate=2,zero=2", "dp=2,zero=3",
         "dp=2,tp=2,zero=3")  # fmt: skip
DTYPES = ("", "param_dtype=bf16")
RECOMPUTE = ("none", "selective", "full", "0.5")
MICROBATCHES = (1, 2)
TRANSPORTS = ("auto", "nccl")
NAMES = [*zoo.MODELS, *zoo.HELD_OUT]
CASES = pairwise(NAMES, PLANS, RECOMPUTE, DTYPES, MICROBATCHES, TRANSPORTS)


WHOLE = {"graph", "contrastive", "clip", "lstm_cell"}
"""Models that are refused in microbatches. They compare rows with each other, or name rows of one input by another; or have an
operator that runs replicated."""


MIXED = {"lstm_cell", "buffers"}
"""Models that make float32 values of their own and multiply them with what their parameters are: none runs in bfloat16."""


def check(name: str, plan: str, recompute: str, dtype: str, microbatches: int, transport: str, **options: Any) -> None:
    model, inputs = zoo.build(name)
    microbatches = 1 if name in WHOLE else microbatches
    parsed = fxpar.Plan.parse(",".join(filter(None, [plan, dtype, f"recompute={recompute},microbatches={microbatches}"])))
    rows = zoo.rows(name)
    if name in MIXED and dtype:
        with pytest.raises(CaptureError, match=r"a product of bfloat16 and float32 values.*zoo.*\.to\(x\.dtype\)"):
            assert_equivalent(model, parsed, inputs, lowered=True)
    elif rows % (parsed.dp * microbatches):
        field = "dp" if rows % parsed.dp else "microbatches"
        with pytest.raises(PlanError, match=f"`{field}`=.*must divide"):
            assert_equivalent(model, parsed, inputs, lowered=True)
    else:
        assert_equivalent(model, parsed, inputs, lowered=True, transport=transport, **options)


def id_of(case: tuple) -> str:
    return "-".join(map(str, filter(None, case)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_models_under_plans(case):
    check(*case)


SAMPLE = [
    ("llama_tied", "dp=2,zero=3", "none", "param_dtype=bf16", 1, "auto"),
    ("llama_odd", "tp=2", "selective", "", 1, "auto"),
    ("bert", "dp=2", "selective", "", 1, "auto"),
    ("mlp_norm", "dp=4,dp_replicate=2,zero=2", "none", "", 1, "auto"),
    ("mlp", "dp=2,zero=3", "none", "", 2, "nccl"),
    ("shared_block", "tp=2", "selective", "param_dtype=bf16", 2, "nccl"),  # a softmax, and a loss, of bf16 over split classes
    ("lstm_cell", "tp=2", "none", "param_dtype=bf16", 1, "nccl"),
]


LONGER = [
    ("gpt2", "dp=2,tp=2,zero=3", "full", "", 1, "nccl"),
    ("nanogpt", "tp=2,sequence_parallel=false", "0.5", "", 2, "auto"),
    ("lstm", "tp=2", "none", "param_dtype=bf16", 1, "nccl"),
    ("transformer", "dp=2", "full", "", 1, "auto"),  # several results of one operator
]


@pytest.mark.parametrize("case", [*SAMPLE, *(pytest.param(c, marks=pytest.mark.slow) for c in LONGER)], ids=id_of)
def test_some_models_under_plans(case):
    check(*case)


PINNED = [("gpt2", "dp=2,tp=2,zero=3"), ("gemma2_padded", "dp=2,param_dtype=bf16"), ("falcon", "dp=2,zero=2,param_dtype=bf16"),
          ("llama_tied", "tp=2"), ("nanogpt", "dp=4,dp_replicate=2,zero=3")]


def unnamed(program: Program) -> str:
    """A program as text, but for the names of sizes without a role."""
    return re.sub(r"\b[a-z]{1,2}(?=\d)", "_", readable(program))


@pytest.mark.parametrize("name, plan", PINNED)
def test_a_second_program_of_the_same_call_is_the_first(name, plan):
    """Where parameters are stored already, no operator is at another place: gradients are summed in the same dtype."""
    model, inputs = zoo.build(name)
    first = fxpar.compile_program(model, plan, inputs)
    stored = {s.name: sharding_at(node) for node, s in first.source_of().items() if s.kind == "param"}
    again = fxpar.compile_program(model, plan, inputs, pinned=stored)
    assert unnamed(again) == unnamed(first)


def test_microbatches_are_programs_of_stored_parameters():
    model, inputs = zoo.build("gemma2_padded")
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    first = fxpar.compile_program(model, "dp=2", inputs)
    stored = {s.name: sharding_at(node) for node, s in first.source_of().items() if s.kind == "param"}
    alone, again = (fxpar.compile_program(model, "dp=2,microbatches=2", inputs, pinned=p) for p in (None, stored))
    assert unnamed(again) == unnamed(alone)


def test_the_cover_has_every_pair():
    settings = [NAMES, PLANS, RECOMPUTE, DTYPES, MICROBATCHES, TRANSPORTS]
    for a, b in itertools.combinations(range(len(settings)), 2):
        assert {(c[a], c[b]) for c in CASES} == set(itertools.product(settings[a], settings[b]))
    assert len(CASES) <= len(NAMES) * len(PLANS) + 10


# ---- compiled ----


COMPILED = {
    "attention with a padding mask": ("bert", "dp=2,recompute=selective"),
    "causal attention, rotary tables": ("llama", "dp=2,tp=2,zero=3"),
    "attention with a learned bias": ("t5", "dp=2,zero=3"),
    "grouped products": ("mixtral", "tp=2"),
    "convolutions, batch norm": ("resnet", "dp=2,zero=3"),
    "dropout": ("dropouts", "dp=2,recompute=full"),
    "recurrence": ("lstm_cell", "dp=2"),
    "lookups": ("dlrm", "dp=2,tp=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_operators_of_every_kind(what):
    name, plan = COMPILED[what]
    model, inputs = zoo.build(name)
    assert_equivalent(model, plan, inputs, backend="inductor")


class Masked(nn.Module):
    """Attention behind a mask of booleans that is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])[:, None, None, None]
        columns = torch.arange(x.shape[1])[None, None, None, :]
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.bool()[rows, columns]).square().mean()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_mask_of_booleans_that_is_gathered_stays_one_when_compiled(recompute):
    """Inductor makes int64 of it, and whoever reads the mask again in the backward takes its bytes for booleans."""
    torch.manual_seed(0)
    keep = (torch.arange(6) < torch.tensor([6, 4, 5, 3])[:, None]).long()
    batch = {"x": torch.randn(4, 6, 8), "keep": keep}
    assert_equivalent(Masked(), f"dp=2,recompute={recompute}", batch, backend="inductor")


# ---- what goes wrong is said ----


def mlp(rows: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x))).square().mean()

    torch.manual_seed(0)
    return Net(), {"x": torch.randn(rows, 8)}


def test_a_wrong_graph_pass_is_named(monkeypatch):
    right = overlap.overlap_communication

    def wrong(graph: fx.Graph) -> None:
        right(graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            with graph.inserting_after(node):
                doubled = graph.call_function(torch.ops.aten.mul.Tensor, (node, 2))
            doubled.meta = dict(node.meta)
            node.replace_all_uses_with(doubled, lambda user, doubled=doubled: user is not doubled)

    monkeypatch.setattr(overlap, "overlap_communication", wrong)
    model, batch = mlp()
    with pytest.raises(EquivalenceError, match="the partitioned program agrees: the graph pass 'overlap' makes the difference"):
        assert_equivalent(model, "dp=2", batch, lowered=True)


def test_a_difference_of_the_program_is_not_blamed_on_a_graph_pass(monkeypatch):
    model, batch = mlp()
    monkeypatch.setitem(fxpar.ops.collectives.CONJUGATE, "vary", (fxpar.ops.collectives.SAME, fxpar.ops.collectives.SAME))
    with pytest.raises(EquivalenceError, match=r"try lowered=False|ranks disagree"):
        assert_equivalent(model, "dp=2", batch, lowered=True)


def group_of(ranks: int) -> tuple[Threads, str]:
    threads = Threads(Mesh(("dp",), (ranks,)))
    return threads, threads.runtime(0).name(("dp",))


def test_threads_exchange_as_process_groups_do():
    threads, name = group_of(3)

    def body(rank: int) -> list[list[float]]:
        x = torch.arange(3.0) + rank
        started = [c10d.all_reduce(x, "sum", name), c10d.all_reduce(x, "max", name), c10d.all_gather_into_tensor(x, 3, name),
                   c10d.reduce_scatter_tensor(x, "sum", 3, name), c10d.all_to_all_single(x, [1, 1, 1], [1, 1, 1], name)]
        return [c10d.wait_tensor(y).tolist() for y in started]

    for rank, (total, top, gathered, scattered, exchanged) in enumerate(threads.run(body)):
        assert total == [3, 6, 9] and top == [2, 3, 4] and gathered == [0, 1, 2, 1, 2, 3, 2, 3, 4]
        assert scattered == [[3], [6], [9]][rank] and exchanged == [rank + other for other in range(3)]


def test_a_result_is_not_there_before_it_is_waited_for():
    threads, name = group_of(2)

    def body(rank: int) -> tuple[bool, Tensor]:
        started = c10d.all_reduce(torch.ones(3), "sum", name)
        early = started.isnan().all().item()
        return early, c10d.wait_tensor(started)

    for early, result in threads.run(body):
        assert early and result.tolist() == [2, 2, 2]


@pytest.mark.parametrize("issue", [lambda x, name: c10d.all_gather_into_tensor(x, 2, name),
                                   lambda x, name: c10d.all_reduce_(x, "sum", name)], ids=["operand", "in place"])
def test_what_is_written_while_it_is_communicated_is_told(issue):
    threads, name = group_of(2)

    def body(rank: int) -> None:
        x = torch.ones(4)
        started = issue(x, name)
        x.fill_(rank)
        c10d.wait_tensor(started)

    with pytest.raises(EquivalenceError, match="between the start of a collective and its wait its tensors were written: all_"):
        threads.run(body)


LAID_OUT = [
    lambda p: p, lambda p: p.mT, lambda p: p[:, :6], lambda p: p[:6], lambda p: p[:6, :6].mT, lambda p: p / 2,
    lambda p: p[:, :6] / 2, lambda p: p[:6] / 2, lambda p: p.mT.contiguous(), lambda p: (p.mT / 2).contiguous(),
    lambda p: p[:, :6].contiguous(), lambda p: p[:6].clone(memory_format=torch.contiguous_format), lambda p: p[:6].reshape(-1),
    lambda p: (p[:4, :6] + 1).mT,
]  # fmt: skip
"""What may become of a matrix product before it is communicated; a compiler lays it out as it likes."""


def both(name: str, kind: str, *tensors: Tensor) -> list[Tensor]:
    """Tensors communicated over a group of two and waited for; one by one, unless `kind` is coalesced."""
    operator, arguments = getattr(c10d, kind), {"reduce": ("sum", 2, name), "gather": (2, name), "sum": ("sum", name)}
    mine = arguments["sum" if kind.startswith("all_reduce") else "reduce" if kind.startswith("reduce") else "gather"]
    if kind.endswith("coalesced"):
        made = operator(list(tensors), *mine)
        return [c10d.wait_tensor(made[i]) for i in range(len(tensors))]
    if kind == "all_to_all_single":
        return [c10d.wait_tensor(operator(t, [t.shape[0] // 2] * 2, [t.shape[0] // 2] * 2, name)) for t in tensors]
    return [c10d.wait_tensor(operator(t, *mine)) for t in tensors]


def by_hand(kind: str, parts: list[Tensor], rank: int) -> Tensor:
    if kind.startswith("all_gather"):
        return torch.cat(parts)
    if kind.startswith("all_to_all"):
        return torch.cat([p.chunk(2)[rank] for p in parts])
    return sum(parts) if kind.startswith("all_reduce") else sum(parts).chunk(2)[rank]


KINDS = ("all_reduce", "all_reduce_coalesced", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced",
         "all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_to_all_single")  # fmt: skip


@pytest.mark.parametrize("kind, makes", [
    *((kind, LAID_OUT) for kind in KINDS), *(("all_reduce_coalesced", [make]) for make in LAID_OUT),
])  # fmt: skip
def test_compiled_collectives_take_any_layout(kind, makes):
    """As Inductor lowers reductions of several, copies that lie otherwise were copied once more while they were being summed."""
    threads, name = group_of(2)

    class Products(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
            return tuple(both(name, kind, *(make(x.mT @ w) for make in makes for w in (y, z))))

    inputs = [[torch.randn(8, n) for n in (8, 8, 10)] for _ in range(2)]
    run = compat.compile_graph(fx.symbolic_trace(Products()), inputs[0], {})
    parts = [[make(x.mT @ w) for make in makes for w in (y, z)] for x, y, z in inputs]
    for rank, made in enumerate(threads.run(lambda rank: run(*inputs[rank]))):
        torch.testing.assert_close(list(made), [by_hand(kind, list(each), rank) for each in zip(*parts, strict=True)])


@pytest.mark.parametrize("last, message", [
    (lambda x, name: c10d.all_gather_into_tensor(x, 2, name), "different collectives: rank . all_"),
    (lambda x, name: c10d.all_reduce(x[:2], "sum", name), r"different collectives.*\[3\].*\[2\]|different.*\[2\].*\[3\]"),
    (lambda x, name: x, "wait for each other in vain.*rank 0 waits in all_reduce"),
], ids=["kind", "shape", "none"])  # fmt: skip
def test_ranks_that_would_hang_are_told(monkeypatch, last, message):
    monkeypatch.setattr("fxpar.backends.transport.threads.TIMEOUT", 1.0)
    threads, name = group_of(2)

    def body(rank: int) -> None:
        x = torch.ones(3)
        c10d.wait_tensor(last(x, name) if rank else c10d.all_reduce(x, "sum", name))

    with pytest.raises(EquivalenceError, match=message):
        threads.run(body)


def test_an_error_of_one_rank_ends_all_and_is_raised():
    threads, name = group_of(2)

    def body(rank: int) -> None:
        if rank:
            raise ValueError("rank 1 fails")
        c10d.wait_tensor(c10d.all_reduce(torch.ones(1), "sum", name))

    with pytest.raises(ValueError, match="rank 1 fails"):
        threads.run(body)


def test_unknown_backends_and_transports_are_refused():
    model, batch = mlp()
    with pytest.raises(PlanError, match="`backend`='triton': must be one of eager, inductor"):
        fxpar.simulate(model, "dp=2", batch, backend="triton")
    with pytest.raises(PlanError, match="`transport`='mpi': must be one of auto, nccl"):
        fxpar.simulate(model, "dp=2", batch, lowered=True, transport="mpi")


@pytest.mark.parametrize("plan", ["dp=2,tp=2,zero=3", "tp=2", "dp=2"])
def test_graphs_have_all_passes(plan, monkeypatch):
    """Each half of each kind of rank goes through each of the passes."""
    seen: list[str] = []
    passes = inductor.graph_passes

    def note(name: str, apply: Callable, graph: fx.Graph) -> None:
        seen.append(name.rpartition(".")[2])
        apply(graph)

    def noted(*args: Any) -> list:
        return [(m, functools.partial(note, m.__name__, apply)) for m, apply in passes(*args)]

    monkeypatch.setattr(inductor, "graph_passes", noted)
    model, batch = mlp()
    fxpar.simulate(model, plan, batch, lowered=True).step(**batch)
    names = ["reductions", "fp32_products", "products", "overlap", "prefetch", "buckets"]
    assert seen == names * 2


# ---- microbatches ----


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "tp=2"])
@pytest.mark.parametrize("lowered", [True, False])
def test_microbatches_are_the_whole_batch(plan, lowered):
    model, batch = mlp(8)
    whole = fxpar.simulate(model, plan, batch).step(**batch)
    parts = fxpar.simulate(model, f"{plan},microbatches=4", batch, lowered=lowered).step(**batch)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert parts.grads.keys() == whole.grads.keys()
    for name, grad in whole.grads.items():
        torch.testing.assert_close(parts.grads[name], grad)


def test_microbatches_that_do_not_divide_are_refused():
    model, batch = mlp(6)
    with pytest.raises(PlanError, match="`microbatches`=2: must divide each replica's part of a batch of 6"):
        assert_equivalent(model, "dp=2,microbatches=2", batch)
