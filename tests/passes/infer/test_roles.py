"""Roles of attention's dims: heads are split where they divide, what is inside a head never."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar.sharding.factors import leaves
from fxpar.sharding.facts import dims_of
from fxpar.testing import assert_equivalent
from tests import zoo
from tests.processes import launch
from tests.zoo.hugging_face import LLAMA, language_model

THREE = {**LLAMA, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
DEEPSEEK = dict(moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
                q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8, first_k_dense_replace=1)  # fmt: skip


class Attention(nn.Module):
    """Attention with `heads` heads of 16."""

    def __init__(self, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = 16 * heads
        self.heads, self.attend, self.norm = heads, attend, nn.LayerNorm(width)
        self.q, self.k, self.v, self.out, self.head = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.head(F.gelu(x)).square().mean()


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query may look at nothing at all: a column of scores that is no key's."""
    scores = q @ k.mT / 4
    scores = torch.cat([scores, q.new_ones(1, 1, 1, 1).expand(*q.shape[:3], 1)], -1)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhke->bhqe", torch.einsum("bhqd,bhkd->bhqk", q, k).div(4).softmax(-1), v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads are one dim."""
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(b, h, s, d)


def packed(heads: int, weights: bool) -> nn.Module:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(48, heads, batch_first=True), nn.LayerNorm(48)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return (x + self.attention(h, h, h, need_weights=weights)[0]).square().mean()

    return Packed()


def t5(heads: int) -> zoo.Built:
    model, batch = zoo.build("t5")
    config = model.config
    config.num_heads = heads
    return type(model)(config).train(), batch


def plain(model: nn.Module, width: int = 48) -> zoo.Built:
    return model, (torch.randn(4, 8, width),)


def eager() -> zoo.Built:
    model, batch = language_model("LlamaConfig", **THREE)
    model.set_attn_implementation("eager")
    return model, batch


MODELS: dict[str, Callable[[], zoo.Built]] = {
    "llama": lambda: language_model("LlamaConfig", **THREE),
    "eager": eager,
    "one key head": lambda: language_model("LlamaConfig", **{**THREE, "num_key_value_heads": 1}),
    "normed": lambda: language_model("Qwen3Config", **THREE, head_dim=16),
    "fused": lambda: language_model("GPT2Config", n_embd=48, n_layer=2, n_head=3, n_positions=64, resid_pdrop=0.0,
                                    embd_pdrop=0.0, attn_pdrop=0.0),
    "fused projections": lambda: language_model("Phi3Config", **THREE),
    "fused heads": lambda: language_model("GPTNeoXConfig", hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=3, max_position_embeddings=64),
    "latent": lambda: language_model("DeepseekV3Config", **THREE, **DEEPSEEK),
    "t5": lambda: t5(3),
    "function": lambda: plain(Attention(3, F.scaled_dot_product_attention)),
    "written out": lambda: plain(Attention(3, written_out)),
    "einsum": lambda: plain(Attention(3, by_letters)),
    "merged": lambda: plain(Attention(3, merged)),
    "module": lambda: plain(packed(3, False)),
    "module with weights": lambda: plain(packed(3, True)),
    "one head": lambda: plain(packed(1, False)),
}  # fmt: skip
LONG = ("latent", "t5")


def roles(model: nn.Module, batch: Any) -> dict[str, list[list[str | None]]]:
    """Of every dim of every parameter, under its name without the layers' and "_proj"."""
    found: dict[str, list[list[str | None]]] = {}

    def observe(name: str, program: fxpar.Program) -> None:
        if name == "infer":
            found.update({re.sub(r"^.*attn\.|_proj", "", s.name): [[f.role for f in leaves(d)] for d in dims_of(n)]
                          for n, s in program.source_of().items() if s.kind == "param"})

    fxpar.compile_program(model, "tp=2", batch, observe=observe)
    return found


def split(report: fxpar.Report) -> list[str]:
    """Parameters of attention that are split over tp."""
    of_attention = re.compile(r"attn|[aA]ttention|^[qkv]\.|^out")
    return [p.name for p in report.parameters if of_attention.search(p.name) and "/tp" in p.layout]


@pytest.mark.parametrize("name", [n if n not in LONG else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_heads_that_do_not_divide_leave_attention_replicated(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.train()
    assert_equivalent(model, "tp=2", batch)
    report = fxpar.inspect(model, "tp=2", batch)
    assert not split(report)
    if name != "one head":
        assert any(re.match(r"heads 3 .* does not divide by tp=2: left replicated", n) for n in report.notes)


def test_groups_of_heads_that_are_split_are_not_called_replicated():
    """Six heads of queries are three to each of two heads of keys, which two ranks share out."""
    config = LlamaConfig(hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
                         vocab_size=16, use_cache=False)
    ids = torch.zeros(2, 4, dtype=torch.long)
    report = fxpar.inspect(LlamaForCausalLM(config), "tp=2", {"input_ids": ids, "labels": ids})
    assert split(report) and not report.notes


@pytest.mark.parametrize("name", ["llama", "eager", "merged", "einsum", "function"])
def test_what_is_inside_a_head_has_a_role(name):
    found = roles(*MODELS[name]())
    for projection in "qkv":
        rows, columns = found[f"{projection}.weight"]
        assert rows[0] == "heads" and set(rows[1:]) == {"head_dim"} and columns == ["hidden"]


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, written_out, with_sinks, merged, by_letters])
def test_heads_that_divide_are_split(attend):
    model, batch = plain(Attention(4, attend), 64)
    report = fxpar.inspect(model, "tp=2", batch)
    layouts = {p.name: p.layout for p in report.parameters}
    assert all("heads4/tp" in layouts[f"{n}.weight"] for n in "qkv") and "heads4/tp" in layouts["out.weight"]
    assert_equivalent(model, "tp=2", batch)


def test_one_key_head_is_replicated_and_the_query_heads_are_split():
    model, batch = language_model("LlamaConfig", **{**LLAMA, "num_key_value_heads": 1})
    report = fxpar.inspect(model, "tp=2", batch)
    layouts = {p.name.removeprefix("model.layers.0.self_attn."): p.layout for p in report.parameters}
    assert "heads4/tp" in layouts["q_proj.weight"] and "heads4/tp" in layouts["o_proj.weight"]
    assert "/tp" not in layouts["k_proj.weight"] + layouts["v_proj.weight"]
    full = 4 * 8 * 32 * 4  # bytes of all query heads of the batch, in fp32
    inside = [r for r in report.collectives if r.phase == "forward" and r.where.endswith("self_attn")]
    assert sum(r.bytes for r in inside) < 2 * full  # in two layers, the one key and value head
    assert_equivalent(model, "tp=2", batch)


def test_the_residual_stream_is_hidden_where_it_is_attended_to_as_it_is():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.down(F.gelu(self.up(self.norm(x))))
            return (h + F.scaled_dot_product_attention(h, h, h)).square().mean()

    assert roles(Mixing(), (torch.randn(4, 8, 16),))["up.weight"] == [["ffn"], ["hidden"]]


# ---- compiled, by two processes ----


def one_layer() -> zoo.Built:
    torch.manual_seed(0)
    return language_model("LlamaConfig", **{**THREE, "num_hidden_layers": 1})


def step(rank: int, plan: str, backend: str) -> tuple[float, dict[str, Tensor]]:
    model, batch = one_layer()
    module = fxpar.parallelize(model, plan, batch, backend=backend)
    loss = module(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.full_tensor() for n, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.multiproc
def test_three_heads_are_compiled_for_two_ranks():
    model, batch = one_layer()
    loss = model(**batch).loss
    loss.backward()
    for have, grads in launch(2, step, "tp=2", "inductor", timeout=300):
        assert have == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
