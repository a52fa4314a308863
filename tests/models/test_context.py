"""Context parallelism of whole models: what they compute, how attention runs, what is communicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fxpar
from fxpar.errors import PlanError
from fxpar.ops.ring.chunks import attention_of_chunks
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.vocabulary import SDPA
from fxpar.report.attention import lines
from fxpar.testing import assert_equivalent
from tests.matrix import pairwise

VOCAB, LENGTH, BATCH = 96, 32, 4


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCAB, (BATCH, length))


def labels() -> Tensor:
    made = ids()
    made[0, :5] = -100
    return made


def padding(length: int = LENGTH) -> Tensor:
    return (torch.arange(length) < torch.tensor([length - 3 * i for i in range(BATCH)])[:, None]).long()


def packed() -> Tensor:
    return torch.cat([torch.arange(n) for n in (9, 3, 20)]).expand(BATCH, -1).clone()


def causal(name: str, more: dict[str, Tensor] | None = None, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(**tokens, use_cache=False, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model, {"input_ids": ids(), "labels": labels(), **(more or {})}


WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64}
SINKS = {"head_dim": 4, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
         "experts_implementation": "grouped_mm"}  # fmt: skip
ENCODER = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
           "max_position_embeddings": 64}  # fmt: skip


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=4, d_ff=64, num_layers=2, num_heads=8, use_cache=False,
                                   decoder_start_token_id=0, dropout_rate=0.1)
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": ids(16), "attention_mask": padding(16), "labels": labels()}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, attention_probs_dropout_prob=0.0))
    return model, {"input_ids": ids(), "attention_mask": padding(), "labels": labels()}


class Orderly(nn.Module):
    """What touches the order of a sequence: a learned table, a convolution, a roll, a cumulative sum, and a shift of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, 32), nn.Parameter(torch.randn(LENGTH, 32))
        self.conv, self.qkv, self.head = nn.Conv1d(32, 32, 3, padding=2), nn.Linear(32, 96), nn.Linear(32, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.places
        h = h + self.conv(h.transpose(1, 2))[..., :LENGTH].transpose(1, 2) + h.roll(1, 1)
        q, k, v = (t.unflatten(-1, (8, 4)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = self.head(h + h.cumsum(1) / LENGTH)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "llama": lambda: causal("LlamaConfig", **WIDTHS),
    "llama_padded": lambda: causal("LlamaConfig", {"attention_mask": padding()}, **WIDTHS),
    "llama_packed": lambda: causal("LlamaConfig", {"position_ids": packed()}, **WIDTHS),
    "llama_eager": lambda: causal("LlamaConfig", **WIDTHS, attn_implementation="eager"),
    "gpt2": lambda: causal("GPT2Config", **GPT2, attn_pdrop=0.0),
    "gpt2_attention_dropout": lambda: causal("GPT2Config", **GPT2, attn_pdrop=0.1),
    "mistral": lambda: causal("MistralConfig", **WIDTHS, sliding_window=6),
    "gemma3": lambda: causal("Gemma3TextConfig", **WIDTHS, head_dim=4, sliding_window=6),
    "gpt_oss": lambda: causal("GptOssConfig", **WIDTHS, **SINKS),
    "bloom": lambda: causal("BloomConfig", hidden_size=32, n_layer=2, n_head=8),
    "t5": t5,
    "bert": bert,
    "orderly": lambda: (Orderly(), {"x": ids()}),
}
MORE = {
    "qwen3": ("Qwen3Config", {"head_dim": 4}), "gemma2": ("Gemma2Config", {"head_dim": 4, "sliding_window": 6}),
    "olmo2": ("Olmo2Config", {}), "phi3": ("Phi3Config", {}), "stablelm": ("StableLmConfig", {}),
    "gpt_oss": ("GptOssConfig", SINKS),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}),
    "falcon": ("FalconConfig", {}), "mpt": ("MptConfig", {"d_model": 32, "n_heads": 8, "n_layers": 2}),
}  # fmt: skip
COMMUNICATION = ["p2p", "allgather", "a2a", "a2a+p2p"]
PLANS = ["cp=2", "cp=4", "cp=8", "cp=2,tp=2", "cp=4,tp=2", "dp=2,cp=2,zero=3", "dp=2,cp=2,tp=2,zero=1,recompute=selective",
         "cp=4,zero=2,microbatches=2"]  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(), batch


@pytest.mark.parametrize("name, plan", [
    ("llama", "cp=4"),
    ("llama_packed", "cp=2,tp=2,zero=3"),
    ("gpt2", "dp=2,cp=2,zero=3,cp_comm=allgather"),
    ("mistral", "cp=4,cp_comm=a2a+p2p"),
    ("bert", "cp=2,cp_comm=a2a,microbatches=2"),
    ("orderly", "dp=2,cp=2,zero=2"),
    ("gpt_oss", "cp=2,tp=2"),
])  # fmt: skip
def test_a_step_is_that_of_one_device(name, plan):
    model, batch = build(name)
    assert_equivalent(model, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan, comm", pairwise(list(MODELS), PLANS, COMMUNICATION))
def test_every_model_under_every_plan(name, plan, comm):
    model, batch = build(name)
    assert_equivalent(model, f"{plan},cp_comm={comm}", batch)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cp=8", "cp=4,tp=2,cp_comm=a2a+p2p", "dp=2,cp=2,zero=3,microbatches=2,cp_comm=a2a"])
@pytest.mark.parametrize("name", MORE)
def test_more_of_the_zoo(name, plan):
    config, options = MORE[name]
    torch.manual_seed(0)
    model, batch = causal(config, **({} if name == "mpt" else WIDTHS), **options)
    assert_equivalent(model, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("comm", COMMUNICATION)
@pytest.mark.parametrize("name", ["llama", "llama_packed", "gpt2", "mistral", "bert", "t5"])
def test_lowered_graphs(name, comm):
    model, batch = build(name)
    assert_equivalent(model, f"dp=2,cp=2,zero=3,cp_comm={comm}", batch, lowered=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan", [
    ("llama", "dp=2,cp=2,zero=3,recompute=selective"), ("llama_packed", "cp=4,cp_comm=a2a+p2p"), ("llama_padded", "cp=2,tp=2"),
    ("mistral", "cp=2,cp_comm=allgather,recompute=full"), ("bert", "cp=2,cp_comm=a2a,zero=1"), ("gpt2_attention_dropout", "cp=2"),
])  # fmt: skip
def test_lowered_graphs_in_bf16(name, plan):
    model, batch = build(name)
    assert_equivalent(model, f"{plan},param_dtype=bf16", batch, lowered=True)


PIPELINES = ["cp=2,pp=2,microbatches=2", "cp=4,pp=2,microbatches=4,schedule=zb1p", "cp=2,tp=2,pp=2,microbatches=2,zero=1",
             "dp=2,cp=2,pp=2,microbatches=2,zero=3"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, plan, comm", pairwise(
    ["llama", "llama_packed", "gpt2_attention_dropout", "mistral", "bert", "bloom"], PIPELINES, COMMUNICATION))
def test_pipelines(name, plan, comm):
    model, batch = build(name)
    assert_equivalent(model, f"{plan},cp_comm={comm}", batch)


def targets(name: str, plan: str) -> list[Any]:
    model, batch = build(name)
    return [n.target for n in fxpar.capture(model, batch).partition(plan).graph.nodes]


@pytest.mark.parametrize("comm, operator", [("p2p", ring_attention), ("allgather", attention_of_chunks), ("a2a", SDPA)])
def test_what_attention_becomes(comm, operator):
    found = targets("llama", f"cp=2,cp_comm={comm}")
    assert [t for t in found if t in (ring_attention, attention_of_chunks, SDPA)] == [operator] * 2


@pytest.mark.parametrize("name, comm", [("llama_packed", "p2p"), ("llama_packed", "a2a"), ("llama_padded", "allgather"),
                                        ("mistral", "allgather"), ("llama_padded", "p2p")])  # fmt: skip
def test_no_mask_is_as_long_as_the_sequence_twice(name, comm):
    model, batch = build(name)
    simulation = fxpar.simulate(model, f"cp=2,cp_comm={comm}", batch)
    seen = []
    simulation.watch = lambda node, values: seen.extend(v for v in values if isinstance(v, Tensor) and v.dtype is torch.bool)
    simulation.step(**batch)
    assert all(t.numel() <= BATCH * LENGTH for t in seen)


def test_logits_stay_split_and_only_what_is_named_is_gathered():
    model, batch = build("orderly")
    report = fxpar.inspect(model, "cp=2", batch)
    (note,) = [n for n in report.notes if "gathered along the sequence" in n]
    assert all(word in note for word in ("conv", "roll", "cumsum")) and "head" not in note


def test_the_report_says_how_attention_runs_and_why():
    rows = {}
    for name, plan in [("llama", "cp=2"), ("llama", "cp=2,cp_comm=a2a"), ("t5", "cp=2"), ("llama", "tp=8,cp=2,cp_comm=a2a")]:
        model, batch = build(name)
        rows[name, plan] = fxpar.inspect(model, plan, batch).attention
    (ring,) = rows["llama", "cp=2"]
    assert ring.count == 2 and "go round over cp" in ring.how and min(*ring.sent, *ring.workspace) > 0
    assert rows["llama", "cp=2,cp_comm=a2a"][0].how == "heads over cp (all-to-all)"
    t5 = {row.where.rpartition(".")[2]: row for row in rows["t5", "cp=2"]}
    assert t5["SelfAttention"].how.startswith("written out; keys and values gathered")  # its bias has a gradient
    assert t5["EncDecAttention"].how.startswith("keys and values gathered") and "drop out" in t5["EncDecAttention"].why
    assert any(ring.how in line and ring.why in line for line in lines([ring]))
    (left,) = rows["llama", "tp=8,cp=2,cp_comm=a2a"]
    assert "gathered over cp" in left.how and "heads do not divide" in left.why


def test_keys_that_go_round_are_not_kept_whole():
    model, batch = build("llama")
    gathers = [r for r in fxpar.inspect(model, "cp=4", batch).collectives if r.kind == "all_gather" and "attn" in r.where]
    assert not gathers


@pytest.mark.parametrize("name, rows, ids", [("llama", 4, 0), ("llama_packed", 8, 8 * 16 * 4)])
def test_what_goes_round_is_in_the_totals(name, rows, ids):
    """Keys and values of a rank are 2 * 4 * 16 * 4 numbers a row in float32, with segments of documents. Backward they go round
    again, and their gradients with them, and home."""
    model, batch = build(name)
    made = fxpar.inspect(model, "cp=2", batch)
    found = {r.phase: (r.axes, r.count, r.bytes) for r in made.collectives if r.kind == "ring"}
    size = rows * 2 * 4 * 16 * 4 * 4
    assert found == {"forward": (("cp",), 2, 2 * (size + ids)), "backward": (("cp",), 2, 2 * (3 * size + ids))}
    assert made.attention[0].sent[1] == 3 * size + ids and made.attention[0].sent[0] >= size + ids
    total = next(t for t in made.totals() if t.name == "cp")
    assert total.bytes == sum(r.bytes for r in made.collectives if r.strategy == "cp") >= 8 * size


class Patches(nn.Module):
    """A ViT's tokens: 16 patches and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).square().mean()


@pytest.mark.parametrize("plan, model, batch, words", [
    ("cp=2", Patches, {"x": torch.randn(2, 16, 16)}, "padding to 18"),
    ("cp=2", nn.Sequential, {"input": torch.randn(2, 8)}, "none that was found"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(plan, model, batch, words):
    made = nn.Sequential(nn.Linear(8, 8)) if model is nn.Sequential else model()
    with pytest.raises(PlanError, match=words):
        fxpar.inspect(made, plan, batch)


def test_a_causal_length_must_be_divided_by_two_chunks_for_each_rank():
    with pytest.raises(PlanError, match=r"2 cp.*does not divide the length 32.*padding to 48"):
        fxpar.inspect(*_swapped(build("llama"), "cp=12"))


def _swapped(built: tuple[nn.Module, dict[str, Tensor]], plan: str) -> tuple[nn.Module, str, dict[str, Tensor]]:
    return built[0], plan, built[1]
