"""Expert parallelism of whole models: what they compute, what is communicated, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fxpar
from fxpar.errors import CaptureError, PlanError
from fxpar.ops.collectives import typed
from fxpar.ops.exchange import COUNTS, ORDER, ROOM, ROWS, exchange_plan, to_experts, to_tokens
from fxpar.ops.experts import INVERSE
from fxpar.ops.vocabulary import WAIT
from fxpar.report.memory import trace
from fxpar.sharding.facts import sharding_at
from fxpar.testing import assert_equivalent
from tests.matrix import pairwise

VOCAB, LENGTH, BATCH = 96, 8, 8
WIDTHS = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "num_experts_per_tok": 2}  # fmt: skip


def family(name: str, padded: bool = False, **options: Any) -> Callable[..., tuple[nn.Module, dict[str, Tensor]]]:
    def build(layers: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        deep: dict[str, Any] = {"num_hidden_layers": layers}
        if "layer_types" in options:
            deep["layer_types"] = options["layer_types"] * layers
        tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, name)(**{**WIDTHS, **tokens, **options, **deep}, use_cache=False)
        model = transformers.AutoModelForCausalLM.from_config(config)
        batch = {"input_ids": torch.randint(1, VOCAB, (BATCH, LENGTH)), "labels": torch.randint(1, VOCAB, (BATCH, LENGTH))}
        if padded:
            lengths = torch.tensor([LENGTH - i % 3 for i in range(BATCH)])
            batch["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
        return model, batch

    return build


DEEPSEEK = {"n_routed_experts": 8, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 0, "num_key_value_heads": 4}  # fmt: skip
FAMILIES = {
    "mixtral": family("MixtralConfig", num_local_experts=8, output_router_logits=True),
    "mixtral, padded": family("MixtralConfig", padded=True, num_local_experts=8, output_router_logits=True),
    "qwen3": family("Qwen3MoeConfig", num_experts=8, moe_intermediate_size=32, head_dim=8),
    "olmoe": family("OlmoeConfig", num_experts=8),
    "deepseek": family("DeepseekV3Config", **DEEPSEEK),
    "gpt_oss": family("GptOssConfig", num_local_experts=8, head_dim=8, layer_types=["full_attention"]),
    "granite": family("GraniteMoeConfig", num_local_experts=8),
}
PLANS = ["dp=2,ep=2", "dp=2,tp=2,ep=4", "dp=4,tp=2,ep=8", "dp=4,ep=2", "dp=4,tp=2,ep=4", "tp=4,ep=2", "dp=2,tp=2,ep=2"]
MORE = ["", ",zero=1", ",zero=3", ",microbatches=2", ",zero=2,microbatches=2", ",zero=3,recompute=selective"]
DISPATCHES = ["", ",ep_dispatch=allgather"]


@pytest.fixture(scope="module")
def captured() -> Callable[[str], tuple[Any, dict[str, Tensor]]]:
    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            model, batch = FAMILIES[name]()
            known[name] = fxpar.capture(model, batch), batch
        return known[name]

    return get


@pytest.mark.parametrize("name, plan", [
    ("mixtral", "dp=2,tp=2,ep=4,zero=3"), ("gpt_oss", "dp=2,tp=2,ep=2,ep_dispatch=allgather"),
])
def test_families(name, plan, captured):
    made, batch = captured(name)
    assert_equivalent(made, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan, more, dispatch", pairwise(list(FAMILIES), PLANS, MORE, DISPATCHES))
def test_all_families(name, plan, more, dispatch, captured):
    made, batch = captured(name)
    assert_equivalent(made, plan + more + dispatch, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan, more, dispatch", pairwise(
    list(FAMILIES), ["dp=2,tp=2,ep=4", "dp=4,ep=2", "dp=2,ep=2"], ["", ",zero=3,recompute=full", ",microbatches=2"], DISPATCHES))
def test_all_families_lowered(name, plan, more, dispatch, captured):
    made, batch = captured(name)
    assert_equivalent(made, plan + more + dispatch, batch, lowered=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "mixtral, padded", "qwen3", "olmoe", "deepseek", "granite"])
@pytest.mark.parametrize("plan", ["cp=2,ep=2", "dp=2,cp=2,ep=4,cp_comm=a2a", "cp=2,tp=2,ep=4,ep_dispatch=allgather"])
def test_beside_context_parallelism(name, plan, captured):
    made, batch = captured(name)
    assert_equivalent(made, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_in_stages(schedule, dispatch):
    model, batch = family("MixtralConfig", num_local_experts=8, **{"num_hidden_layers": 2})()
    assert_equivalent(model, f"pp=2,dp=2,ep=2,microbatches=2,schedule={schedule}" + dispatch, batch)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,ep=2", "dp=2,tp=2,ep=4,recompute=selective"])
def test_compiled(plan, captured):
    made, batch = captured("mixtral")
    assert_equivalent(made, plan, batch, backend="inductor")


# ---- experts that are written by hand ----

H, E, K, S = 16, 4, 2, 6


class Routed(nn.Module):
    """A router, experts in one parameter, and `mix`, which brings both together. scores: what the router prefers."""

    def __init__(self, mix: Callable, scores: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.router, self.head = nn.Linear(H, H), nn.Linear(H, E), nn.Linear(H, H)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) / 4), nn.Parameter(torch.randn(E, 2 * H, H) / 4)
        self.mix = mix
        if scores is not None:
            self.router.weight = nn.Parameter(torch.zeros(E, H))
            self.router.bias = nn.Parameter(scores)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.reshape(-1, H)
        return (self.head(x + self.mix(self, tokens, self.router(tokens).softmax(-1)).view_as(x)) ** 2).mean()


def grouped(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    weights, experts = scores.topk(K, -1)
    sorted_experts, order = experts.flatten().sort(stable=True)
    ends = torch.histc(sorted_experts.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
    rows = F.grouped_mm(F.silu(F.grouped_mm(x[order // K], model.up, offs=ends)), model.down, offs=ends)
    return torch.zeros_like(x).index_add(0, order // K, rows * weights.flatten()[order][:, None])


def dense(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    weights, experts = scores.topk(K, -1)
    gates = torch.zeros_like(scores).scatter(-1, experts, weights)
    rows = torch.einsum("tef,efh->teh", F.silu(torch.einsum("th,ehf->tef", x, model.up)), model.down)
    return (rows * gates[..., None]).sum(1)


def capacity(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    """Each expert takes as many tokens as it has places."""
    places = 16
    weights, experts = scores.topk(K, -1)
    chosen = F.one_hot(experts, E).float()
    place = (chosen.reshape(-1, E).cumsum(0) - 1).reshape(chosen.shape)
    slots = F.one_hot(place.clamp(0, places - 1).long(), places) * (chosen * (place < places))[..., None]
    gates = (slots * weights[..., None, None]).sum(1) * (scores[..., None] > 0)
    rows = torch.einsum("tec,th->ech", (gates > 0).float(), x)
    rows = torch.bmm(F.silu(torch.bmm(rows, model.up)), model.down)
    return torch.einsum("tec,ech->th", gates, rows)


def loop(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    weights, experts = scores.topk(K, -1)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = (experts == e).nonzero(as_tuple=True)
        out = out.index_add(0, token, F.silu(x[token] @ model.up[e]) @ model.down[e] * weights[token, slot][:, None])
    return out


def plain(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    return F.silu(x) * scores.sum()


def batch(rows: int = 4, length: int = S) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(rows, length, H)}


@pytest.mark.parametrize("mix", [grouped, dense, capacity])
@pytest.mark.parametrize("plan", ["dp=2,tp=2,ep=4", *(pytest.param(p, marks=pytest.mark.slow) for p in
                                                      ("dp=2,ep=2", "dp=4,ep=2,zero=3", "dp=4,tp=2,ep=2"))])
def test_experts_by_hand(mix, plan):
    assert_equivalent(Routed(mix), plan, batch())
    program = fxpar.compile_program(Routed(mix), plan, batch())
    ep = program.mesh.axes("ep")
    for node, source in program.source_of().items():
        if source.name in ("up", "down"):
            assert sharding_at(node)[0][0].axes == ep, "each rank has some of the experts"


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("scores", [[9.0, 8.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]], ids=["two ranks have none", "one has most"])
def test_experts_without_tokens(scores, dispatch):
    assert_equivalent(Routed(grouped, torch.tensor(scores)), "dp=4,ep=4" + dispatch, batch())


def test_fewer_tokens_than_ranks():
    """What cannot be split over tp is gathered, and the plan says so."""
    program = fxpar.compile_program(Routed(grouped), "tp=4,ep=4", batch(2, 1))
    assert any("do not divide" in note for note in program.notes)
    assert_equivalent(Routed(grouped), "tp=4,ep=4", batch(2, 1))


def test_rows_are_exchanged_together():
    """One plan for all, and as many exchanges as there are values that move."""
    program = fxpar.compile_program(Routed(grouped), "dp=2,tp=2,ep=4", batch(4, 8))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert sum(n.target is exchange_plan for n in calls) == 1
    assert {n.args[1] for n in calls if n.target in (exchange_plan, to_experts, to_tokens)} == {("dp", "tp")}
    gathered = fxpar.compile_program(Routed(grouped), "dp=2,tp=2,ep=4,ep_dispatch=allgather", batch(4, 8))
    kinds = {c.kind for n in gathered.graph.nodes if n.op == "call_function" and (c := typed(n)) is not None}
    assert not kinds & {"to_experts", "to_tokens"} and {"all_gather_varying", "reduce_scatter"} <= kinds


def test_the_host_waits_for_counts_as_late_as_it_can():
    """Rows are sorted meanwhile; and what says where they belong is made while they travel."""
    forward = trace(fxpar.compile_program(Routed(grouped), "dp=2,ep=2,outputs=loss", batch(4, 8)))[0][0]
    nodes = [n for n in forward.nodes if n.op == "call_function"]
    at = {target: next(i for i, n in enumerate(nodes) if n.target is target) for target in (COUNTS, ROOM, ROWS, ORDER)}
    rows = nodes[at[ROWS]]
    wait = next(n for n in rows.users if n.target is WAIT)
    assert at[COUNTS] < nodes.index(rows.args[0]) < at[ROOM] < at[ROWS] < at[ORDER] < nodes.index(wait)
    reads = {n.target for n in nodes[at[ROOM] : at[ROWS]]}
    assert reads <= {ROOM, torch.ops.aten.sym_size.int}, "nothing else comes between what the host learns and their start"
    started = nodes[at[ROOM]].args[3]
    assert rows.args[0] in started and INVERSE in {n.target for n in started}, "what needs no answer has been started"


def test_a_report_counts_rows_and_says_how_they_go():
    """A balanced router's: as many FLOPs on each rank as without expert parallelism, and no pairs of all experts and tokens."""
    model, inputs = FAMILIES["mixtral"]()
    plain, rows, tokens = fxpar.inspect(model, ["dp=2", "dp=2,ep=2", "dp=2,ep=2,ep_dispatch=allgather"], inputs)
    assert plain.flops == rows.flops == tokens.flops and not plain.experts
    (sent,), (gathered,) = rows.experts, tokens.experts
    assert sent.dispatch == "alltoall" and gathered.dispatch == "allgather" and sent.axes == gathered.axes == ("dp",)
    of_rows = BATCH * LENGTH // 2 * 2 * 32 * 4  # a replica's tokens, two experts of each, hidden, fp32
    assert sent.sent == (2 * of_rows, 2 * of_rows)
    assert "alltoall" in str(rows) and rows.peak.bytes < 2 * plain.peak.bytes


def test_without_ep_products_are_split_inside_of_experts():
    model, inputs = FAMILIES["mixtral"]()
    program = fxpar.compile_program(model, "dp=2,tp=2", inputs)
    split = {s.name.rpartition(".")[2]: [{p.axes for p in dim} for dim in sharding_at(n)] for n, s in program.source_of().items()}
    assert ("tp",) in split["gate_up_proj"][1] and ("tp",) in split["down_proj"][2]


def test_ep_takes_the_minor_ranks_and_zero_the_others():
    program = fxpar.compile_program(Routed(grouped), "dp=8,ep=2,zero=3", batch(8))
    assert str(program.mesh) == "dp0=4 x dp1=2" and program.mesh.axes("ep") == ("dp1",)
    (up,) = (n for n, s in program.source_of().items() if s.name == "up")
    axes = [a for dim in sharding_at(up) for piece in dim for a in piece.axes]
    assert axes == ["dp1", "dp0"], "experts over the inner ranks, ZeRO over the outer ones"


# ---- what is refused ----


def refusal(mix: Callable, plan: str) -> str:
    with pytest.raises(PlanError) as error:
        fxpar.compile_program(Routed(mix), plan, batch(6))
    return str(error.value)


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "dp=4,ep=2,zero=3"])
def test_another_shape(plan):
    model, batch = family("MixtralConfig", num_local_experts=4)()
    made = fxpar.simulate(model, plan, batch)
    for length in (LENGTH, LENGTH - 3):
        part = {name: x[:, :length] for name, x in batch.items()}
        model.zero_grad()
        loss = model(**part).loss
        loss.backward()
        step = made.step(**part)
        torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-6, atol=0)
        for name, p in model.named_parameters():
            assert (step.grads[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_refusals_name_what_works():
    assert "this model has none" in refusal(plain, "dp=2,ep=2")
    assert "must divide the number of experts, 4" in refusal(grouped, "dp=3,ep=3")
    assert "must divide the number of experts, 4" in refusal(dense, "dp=6,ep=6") and "ep=2" in refusal(dense, "dp=6,ep=6")
    with pytest.raises(PlanError, match="must divide dp x cp x tp = 4"):
        fxpar.Plan(dp=4, ep=3)
    with pytest.raises(PlanError, match="dispatch equal tokens"):
        fxpar.Plan(tp=2, ep=2, sequence_parallel=False)


def test_a_loop_over_experts_cannot_be_captured():
    with pytest.raises(CaptureError, match="grouped_mm"):
        fxpar.compile_program(Routed(loop), "dp=2,ep=2", batch())


def rows_beside_others(model: Routed, x: Tensor, scores: Tensor) -> Tensor:
    weights, experts = scores.topk(K, -1)
    sorted_experts, order = experts.flatten().sort(stable=True)
    ends = torch.histc(sorted_experts.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
    rows = F.grouped_mm(x[order // K], model.up, offs=ends)
    rows = F.grouped_mm(rows - rows.mean(0), model.down, offs=ends)
    return torch.zeros_like(x).index_add(0, order // K, rows * weights.flatten()[order][:, None])


def test_rows_that_are_not_kept_apart():
    assert "a product of rows in groups" in refusal(rows_beside_others, "dp=2,ep=2")


@pytest.mark.parametrize("asked", ["eager", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_any_implementation_of_experts(asked):
    model, inputs = family("Qwen3MoeConfig", num_experts=8, moe_intermediate_size=32, head_dim=8)()
    model.set_experts_implementation(asked)
    assert_equivalent(model, "dp=2,ep=2", inputs)
    assert model.config._experts_implementation == asked, "it is put back"
