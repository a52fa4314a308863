"""Pipeline stages: run one after the other, forward and backward, they are the plain model, wherever they are cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxpar
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.simulate import Lockstep
from fxpar.compiler import compile_program
from fxpar.errors import PlanError
from fxpar.model.inputs import leaves
from fxpar.ops.collectives import typed
from fxpar.ops.runtime import LoneRuntime, use_runtime
from fxpar.passes.partition.phases import split_phases
from fxpar.passes.strategies.stages import Stage, _Depth, _least_bound, _lightest_within, cut_stages
from fxpar.plan import Plan
from fxpar.program import Program, module_path
from fxpar.report.dump import readable
from fxpar.report.memory import predict
from fxpar.sharding.facts import full_value, sharding_at
from fxpar.sharding.layout import put, take
from fxpar.verify.equivalence import Reference, _exact, _first_difference, _Inferred
from fxpar.verify.step import StepResult, scalar_of, unflatten
from tests import zoo
from tests.harness import RANDOM, Seeded

PLANS = ("dp=2", "tp=2", "dp=2,tp=2,zero=3")


# ---- all ranks of all stages, in one process ----


def run(stages: Sequence[Stage], program: Program, model: nn.Module, inputs: dict[str, Any], lowered: bool = False) -> StepResult:
    """Forward through the stages, backward through them in the opposite order. What is sent is checked against its message."""
    mesh, ranks = program.mesh, range(program.mesh.world_size)
    backends = [Lowered(mesh, program.plan) if lowered else Lockstep(mesh) for _ in stages]
    fed, made, outputs = [], [], {}
    arrives: list[list[Tensor]] = []
    for stage, backend in zip(stages, backends, strict=True):
        received = [[sent[r].detach().requires_grad_(m.requires_grad) for m, sent in zip(stage.receives, arrives, strict=True)]
                    for r in ranks]
        feeds = [[*received[r], *feed(stage.program, model, inputs, r)] for r in ranks]
        outs = backend.forward(stage.program.module, feeds)
        for i, message in enumerate(stage.sends):
            for out in outs:
                assert (tuple(out[i].shape), out[i].dtype, out[i].requires_grad) == (message.shape, message.dtype,
                                                                                     message.requires_grad), message
        arrives = [[out[i] for out in outs] for i in range(len(stage.sends))]
        outputs |= {k: [out[len(stage.sends) + i] for out in outs] for i, k in enumerate(stage.outputs)}
        fed.append(feeds)
        made.append(outs)
    nodes, sinks = program.outputs(), program.tensor_sinks()
    assert sorted(outputs) == list(range(len(nodes)))
    full = [put(outputs[i], sharding_at(n), full_value(n).shape, mesh) for i, n in enumerate(nodes)]
    loss = scalar_of(unflatten(program, full))
    wanted = [i for i, t in enumerate(full) if t.requires_grad]
    seeds = dict(zip(wanted, torch.autograd.grad(loss, [full[i] for i in wanted], allow_unused=True), strict=True))
    grads: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}}
    returns: list[list[Tensor]] = []
    for stage, backend, feeds, outs in zip(*(reversed(x) for x in (stages, backends, fed, made)), strict=True):
        tangents = [(i, r, returns[i][r]) for i, m in enumerate(stage.sends) if m.requires_grad for r in ranks]
        tangents += [(len(stage.sends) + i, r, take(seeds[k], sharding_at(nodes[k]), mesh, r).contiguous())
                     for i, k in enumerate(stage.outputs) if seeds.get(k) is not None for r in ranks]
        tangents = [(i, r, t) for i, r, t in tangents if outs[r][i].requires_grad]
        places = [i for i, s in enumerate(stage.program.sources) if s.requires_grad]
        found = backend.backward([[outs[r][i] for i, at, _ in tangents if at == r] for r in ranks],
                                 [[t for _, at, t in tangents if at == r] for r in ranks],
                                 [[feeds[r][i] for i in places] for r in ranks]) if tangents and places else [[] for _ in ranks]
        returns = [[torch.zeros_like(feeds[r][i]) for r in ranks] for i in range(len(stage.receives))]
        for k, i in enumerate(places if found[0] else []):
            parts = [torch.zeros_like(feeds[r][i]) if found[r][k] is None else found[r][k] for r in ranks]
            source, node = stage.program.sources[i], stage.program.placeholders()[i]
            if source.kind == "received":
                returns[i] = parts
            elif any(found[r][k] is not None for r in ranks):
                grad, sums = put(parts, sharding_at(node), full_value(node).shape, mesh), grads[source.kind]
                sums[source.name] = sums[source.name] + grad if source.name in sums else grad
    buffers = {s.name: t.detach() for s, t in zip(sinks, full, strict=True) if s.kind == "buffer"}
    return StepResult(loss.detach(), grads["param"], None, grads["input"], buffers)


def feed(program: Program, model: nn.Module, inputs: dict[str, Any], rank: int) -> list[Any]:
    """What a rank takes besides what it receives."""
    known: dict[str, dict[str, Any]] = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers()),
                                        "input": inputs}
    out: list[Any] = []
    for node, source in program.source_of().items():
        if source.kind == "received":
            continue
        value = torch.tensor(0) if source.kind == "seed" else known.get(source.kind, {}).get(source.name, source.value)
        if isinstance(value, Tensor):
            value = take(value.detach(), sharding_at(node), program.mesh, rank).clone().requires_grad_(source.requires_grad)
        out.append(value)
    return out


class Case:
    """A model, captured once for all plans, and what it computes on one device: with the same dropout, if it has any."""

    def __init__(self, model: nn.Module, inputs: Any):
        self.model, self.captured = model, fxpar.capture(model, inputs)
        self.inputs = leaves(self.captured.call)
        self.programs: dict[str, Program] = {}
        inferred = _Inferred()
        self.captured.partition("dp=1", observe=inferred)
        before = {n: b.clone() for n, b in model.named_buffers()}
        self.reference: Reference = _exact(model, Plan(), self.captured.call, inferred.program, 0)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(before[n])

    def program(self, plan: str) -> Program:
        if plan not in self.programs:
            self.programs[plan] = self.captured.partition(plan)
        return self.programs[plan]

    def check(self, plan: str, stages: Sequence[Stage], lowered: bool = False) -> None:
        result = run(stages, self.program(plan), self.model, self.inputs, lowered)
        problem = _first_difference(self.reference, result, loss_tolerance=1e-6, gradient_tolerance=1e-5)
        assert problem is None, f"{problem}; {plan}; {[[m.name for m in s.sends] for s in stages]}"


class Odd(nn.Module):
    """An operator of several results, integers that are sent, operators between parameters that have none, a skip from the first
    operator to the last, and an input that wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.table, self.down = nn.Linear(8, 16), nn.Embedding(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.up(x).chunk(2, -1)
        chosen = left.argmax(-1)
        y = torch.tanh(left) * torch.sigmoid(right)
        y = self.down(y + self.table(chosen)) + x
        return F.mse_loss(y, target), chosen


@functools.cache
def case(name: str) -> Case:
    if name == "odd":
        torch.manual_seed(0)
        return Case(Odd(), (torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)))
    if name == "llama":
        torch.manual_seed(0)
        return Case(*zoo.language_model("LlamaConfig", **{**zoo.LLAMA, "num_hidden_layers": 5}))
    return Case(*zoo.build(name))


def parameters(stage: Stage) -> set[str]:
    return {s.name for s in stage.program.sources if s.kind == "param"}


# ---- the numbers ----


def somewhere(program: Program, r: Seeded, count: int) -> list[fx.Node]:
    order = _Depth(program).order
    return [order[i] for i in sorted(r.sample(range(1, len(order)), min(count, len(order)) - 1))]


def cut_somewhere(made: Case, plan: str, r: Seeded, count: int) -> list[Stage]:
    at = somewhere(made.program(plan), r, count)
    return cut_stages(made.program(plan), len(at) + 1, at)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "resnet", "mlp", "odd"])
@given(r=RANDOM)
@settings(max_examples=2)
def test_wherever_it_is_cut(name, r):
    plan = r.choice(PLANS)
    case(name).check(plan, cut_somewhere(case(name), plan, r, 4))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, "dp=2,zero=1", "tp=2,sequence_parallel=false"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "resnet", "mlp", "odd", "llama_tied", "nanogpt", "mixtral",
                                  "timm_convnext", "transformer"])  # fmt: skip
@given(r=RANDOM)
@settings(max_examples=10)
def test_wherever_and_whatever_is_cut(name, plan, r):
    case(name).check(plan, cut_somewhere(case(name), plan, r, r.randint(2, 9)))


@pytest.mark.parametrize("name, plan", [
    ("odd", "tp=2"), pytest.param("nanogpt", "dp=2,zero=3,recompute=full", marks=pytest.mark.slow),
    pytest.param("t5", "tp=2", marks=pytest.mark.slow)])  # fmt: skip
def test_stages_are_lowered_as_any_program(name, plan):
    """Through AOTAutograd, recomputation and the graph passes of the inductor backend."""
    made = case(name)
    program = made.program(plan)
    made.check(plan, cut_stages(program, 3, odd_places(program)) if name == "odd" else cut_stages(program, 3), lowered=True)


def odd_places(program: Program) -> list[fx.Node]:
    """The stage between them has no parameters; a float and an integer value are sent past it."""
    return [next(n for n in program.graph.nodes if n.target is target)
            for target in (torch.ops.aten.tanh.default, torch.ops.aten.embedding.default)]


def test_five_layers_on_four_stages():
    made = case("llama")
    stages = cut_stages(made.program("tp=2"), 4)
    made.check("tp=2", stages)
    flops = [s.flops for s in stages]
    assert max(flops) <= 1.1 * sum(flops) / 4
    assert set.union(*map(parameters, stages)) == {s.name for s in made.program("tp=2").sources if s.kind == "param"}


# ---- what a stage is ----


def test_what_crosses_a_cut():
    """T5's encoder output is relayed to the last decoder layer, as a rank's part of the sequence and not gathered."""
    made = case("t5")
    program = made.program("tp=2")
    stages = cut_stages(program, 4, ["encoder.block.1", "decoder", "decoder.block.1"])
    assert [s.index for s in stages] == [0, 1, 2, 3] and not stages[0].receives and not stages[-1].sends
    for before, after in pairwise(stages):
        assert before.sends == after.receives
        assert before.bytes_sent == sum(m.bytes for m in before.sends) > 0
    assert [(m.shape, m.dtype, m.requires_grad) for m in stages[1].sends] == [((4, 6, 32), torch.float32, True)]
    encoded = stages[1].sends[0]
    assert encoded in stages[2].sends and encoded in stages[3].receives
    nodes = {n.name: n for n in program.graph.nodes}
    assert not any(typed(nodes[m.name]) is not None and typed(nodes[m.name]).gathers for s in stages for m in s.sends)
    gathered = [n for n in stages[3].program.graph.nodes if typed(n) is not None and typed(n).gathers]
    assert encoded.name in {n.args[0].name for n in gathered}


def test_a_tied_parameter_is_on_the_stages_that_use_it():
    stages = cut_stages(case("gpt2").program("dp=2"), 3, ["transformer.h.0", "transformer.ln_f"])
    assert [("transformer.wte.weight" in parameters(s)) for s in stages] == [True, False, True]
    bytes_of_stages = [sum(case("gpt2").model.get_parameter(n).nbytes for n in parameters(s)) for s in stages]
    assert [s.parameter_bytes for s in stages] == bytes_of_stages


def test_a_stage_may_have_no_parameters():
    made = case("odd")
    stages = cut_stages(made.program("dp=2"), 3, odd_places(made.program("dp=2")))
    assert not parameters(stages[1]) and stages[1].parameter_bytes == stages[1].flops == 0
    assert {m.dtype: m.requires_grad for m in stages[1].receives} == {torch.float32: True, torch.int64: False}
    made.check("dp=2", stages)


def test_the_model_s_outputs_are_made_once_each():
    program = case("resnet").program("dp=2")
    stages = cut_stages(program, 3)
    assert sorted(i for s in stages for i in s.outputs) == list(range(len(program.outputs())))
    for stage in stages:
        names = [s.name for s in stage.program.tensor_sinks() if s.kind != "sent"]
        assert names == [program.tensor_sinks()[i].name for i in stage.outputs]


def test_the_program_is_left_as_it_is():
    program = case("llama").program("tp=2")
    before = program.module.code, list(program.sources), list(program.sinks), [dict(n.meta) for n in program.graph.nodes]
    cut_stages(program, 3)
    assert before == (program.module.code, program.sources, program.sinks, [dict(n.meta) for n in program.graph.nodes])


def test_passes_and_reports_take_a_stage():
    program = case("nanogpt").program("dp=2,zero=1")
    stages = cut_stages(program, 2)
    whole, parts = split_phases(program), [split_phases(s.program) for s in stages]
    assert {b.key for v in parts for b in v.boundaries} == {b.key for b in whole.boundaries}
    assert all(v.compute_and_reduce.module.graph.find_nodes(op="output") for v in parts)
    last, peak = stages[-1], predict(stages[-1].program)
    assert last.parameter_bytes <= peak.parts["parameters"] < last.parameter_bytes + 512 * len(parameters(last))
    assert peak.phase == "backward" and peak.kept > 0
    for stage in stages:
        namespace: dict[str, Any] = {"__name__": "a dump"}
        exec(readable(stage.program), namespace)
        with use_runtime(LoneRuntime({"dp": 2})):
            outs = namespace["forward"](*namespace["made_up_inputs"]())
        assert [tuple(o.shape) for o in outs[: len(stage.sends)]] == [m.shape for m in stage.sends]


# ---- where it is cut ----


@given(costs=st.lists(st.integers(1, 20), min_size=4, max_size=9), count=st.integers(2, 4), data=st.data())
def test_the_cuts_are_the_best_there_are(costs, count, data):
    """Against all ways to cut."""
    levels = [0, *accumulate(costs)]
    crossing = data.draw(st.lists(st.integers(1, 5), min_size=len(levels), max_size=len(levels)))
    ways = [(0, *way, len(costs)) for way in combinations(range(1, len(costs)), count - 1)]
    largest = {way: max(levels[b] - levels[a] for a, b in pairwise(way)) for way in ways}
    least = _least_bound(levels, count)
    assert least == min(largest.values())
    for bound in (least, least + 3):
        def worth(way: tuple[int, ...]) -> tuple[int, int]:
            return sum(crossing[i] for i in way[1:-1]), sum((levels[b] - levels[a]) ** 2 for a, b in pairwise(way))

        found = (0, *_lightest_within(levels, crossing, count, bound), len(costs))
        assert largest[found] <= bound and worth(found) == min(worth(way) for way in ways if largest[way] <= bound)


class Tower(nn.Module):
    """Equal layers behind a lookup, and a head that costs as much as two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 128)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for layer in self.layers:
            y = y + layer(y)
        return self.head(y).square().mean()


def tower(plan: str = "dp=2") -> Program:
    return compile_program(Tower(), plan, (torch.zeros(8, 4, dtype=torch.long),))


def test_the_head_counts_and_the_lookup_does_not():
    stages = cut_stages(tower(), 4)
    blocks = [sorted({module_path(n).split(".")[1] for n in s.program.graph.nodes
                      if n.op == "call_function" and module_path(n).startswith("layers")}) for s in stages]
    assert blocks == [["0", "1"], ["2", "3"], ["4", "5"], []] and len({s.flops for s in stages}) == 1
    assert [len(s.sends) for s in stages] == [1, 1, 1, 0]


def test_flops_are_those_of_a_step():
    """Of 16 rows on a rank: 2 x rows x 32 x 32 a product forward, twice that backward."""
    product = 2 * 16 * 32 * 32
    assert sum(s.flops for s in cut_stages(tower(), 2)) == 3 * product * (12 + 4)
    assert sum(s.flops for s in cut_stages(tower("dp=2,recompute=full"), 2)) == product * (4 * 12 + 3 * 4)
    assert sum(s.flops for s in cut_stages(tower("dp=2,recompute=0.5"), 2)) == product * (3.5 * 12 + 3 * 4)
    idle = compile_program(Tower().eval(), "dp=2", (torch.zeros(8, 4, dtype=torch.long),))
    assert sum(s.flops for s in cut_stages(idle, 2)) == product * (12 + 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_chosen_cuts_are_balanced_and_right(name):
    made = case(name)
    stages = cut_stages(made.program("dp=2"), 2)
    assert max(s.flops for s in stages) <= 1.15 * sum(s.flops for s in stages) / 2
    made.check("dp=2", stages)


def test_boundaries_are_honoured():
    made = case("llama")
    names = ["model.layers.1", "model.layers.4", "model.norm"]
    program = made.program("tp=2")
    planned = replace(program, plan=replace(program.plan, pp=4, stage_boundaries=names))
    for stages in (cut_stages(program, 4, names), cut_stages(planned, 4)):
        made.check("tp=2", stages)
        layers = [sorted({int(n.split(".")[2]) for n in parameters(s) if "layers" in n}) for s in stages]
        assert layers == [[0], [1, 2, 3], [4], []]
        assert "model.norm.weight" in parameters(stages[3]) and "lm_head.weight" in parameters(stages[3])
    assert len(cut_stages(program, 1)) == 1


@pytest.mark.parametrize("names, says, suggestion", [
    (["model.layers.2"], "which are 2, and names 1", "leaving stage_boundaries out"),
    (["model.layers.2", "model.layer.4"], "'model.layer.4' is none", "stage_boundaries=model.layers.2;model.layers.4"),
    (["model.layers.4", "model.layers.2"], "'model.layers.2' runs before 'model.layers.4'",
     "stage_boundaries=model.layers.2;model.layers.4"),
    (["model.rotary_emb", "model.layers.2"], "'model.rotary_emb' makes depends on no parameter", "the module that uses it"),
    (["model.embed_tokens", "model.layers.2"], "no operator for the stage before 'model.embed_tokens'",
     "a module between the first and the last"),
    (["model.layers.2", "model.layers.2.input_layernorm"], "begins two stages with the same operator",
     "modules that begin one after the other"),
])  # fmt: skip
def test_boundaries_that_are_none(names, says, suggestion):
    with pytest.raises(PlanError) as raised:
        cut_stages(case("llama").program("tp=2"), 3, names)
    assert raised.value.field == "stage_boundaries" and says in str(raised.value) and raised.value.suggestion == suggestion


def test_more_stages_than_can_be_cut():
    program = case("mlp").program("dp=2")
    assert len(cut_stages(program, 3)) == 3
    with pytest.raises(PlanError) as raised:
        cut_stages(program, 4)
    assert (raised.value.field, raised.value.value, raised.value.suggestion) == ("pp", 4, "pp=3")
    assert "asks for 4 stages, and the model has operators for 3" in str(raised.value)
