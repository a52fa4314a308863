"""Predictions of peak memory that trace few of many equal blocks are those that trace all."""

from __future__ import annotations

from dataclasses import replace

import networkx
import pytest
import torch
from torch import Tensor, fx, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar.backends import repeats
from fxpar.backends.inductor import brief, kept
from fxpar.compat.stages import Decision
from fxpar.passes.strategies.stages import cut_stages
from fxpar.pipeline.schedules import schedule
from fxpar.plan import Plan
from fxpar.report import memory

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=9, **COMMON))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=9, n_embd=32, n_head=4, vocab_size=64, n_positions=64, use_cache=False))


def deep_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=18, **COMMON))


def deep_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=18, n_embd=32, n_head=4, vocab_size=64, n_positions=64, use_cache=False))


def gemma2() -> nn.Module:
    """A sliding window in every second layer."""
    return Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=16, head_dim=8, sliding_window=8, **COMMON))


def uneven() -> nn.Module:
    """One layer is wider than the others."""
    model = llama()
    wide = model.model.layers[4].mlp
    wide.gate_proj, wide.up_proj, wide.down_proj = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)
    return model


@pytest.fixture(autouse=True)
def _whether_it_gains_anything_or_not(monkeypatch):
    monkeypatch.setattr(brief, "WORTH", 2)


def both(make, plan: str, monkeypatch) -> tuple[memory.Peak, memory.Peak, bool]:
    taken: list[bool] = []
    lowered = brief.lowered

    def seen(*args):
        made = lowered(*args)
        taken.append(made is not None)
        return made

    monkeypatch.setattr(brief, "lowered", seen)
    with torch.device("meta"):
        model, tokens = make(), torch.zeros(8, 32, dtype=torch.long)
    program = fxpar.compile_program(model, Plan.parse(plan), dict(input_ids=tokens, labels=tokens))
    return memory.predict(program), memory.predict(program, briefly=False), taken == [True]


@pytest.mark.slow
@pytest.mark.parametrize("make, plan", [
    (llama, "dp=2,zero=3,param_dtype=bf16,outputs=loss"),
    (llama, "tp=2,param_dtype=bf16,outputs=loss"),
    (llama, "dp=2,zero=3,recompute=full,param_dtype=bf16,outputs=loss"),
    (llama, "dp=2,tp=2,zero=1"),
    (llama, "dp=2,zero=1,microbatches=2,param_dtype=bf16"),
    (llama, "dp=2,zero=2,microbatches=2,cp=2"),
    (llama, "dp=2,zero=3,microbatches=2"),
    (gemma2, "dp=2,zero=3"),
])
def test_a_prediction_from_few_blocks_is_that_of_all(make, plan, monkeypatch):
    few, whole, taken = both(make, plan, monkeypatch)
    assert few == whole and taken


@pytest.mark.slow
@pytest.mark.parametrize("make, plan", [
    (uneven, "dp=2,zero=3"),
    (gpt2, "tp=2"),
    (gpt2, "dp=2,zero=3"),
    (llama, "dp=2,recompute=selective"),
])
def test_a_prediction_is_the_same_where_blocks_may_differ(make, plan, monkeypatch):
    few, whole, _ = both(make, plan, monkeypatch)
    assert few == whole


class Small(nn.Module):
    """residual: each block is added to what it takes; else its result is bent."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32, bias=False)) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) if self.residual else torch.tanh(block(x))
        return x.square().sum()


class Pointwise(nn.Module):
    """One chain of operators that all fit into one kernel, longer than the partitioner makes again; six blocks are shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(32) for _ in range(60))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.sin(x) * scale
        return x.square().sum()


@pytest.mark.parametrize("make, train, taken", [
    pytest.param(lambda: Small(False), True, True, id="bent", marks=pytest.mark.slow),
    pytest.param(lambda: Small(True), True, True, id="residual"),
    pytest.param(lambda: Small(True), False, True, id="no backward"),
    pytest.param(Pointwise, True, False, id="a long chain", marks=pytest.mark.slow),
])
def test_a_prediction_of_small_blocks(make, train, taken, monkeypatch):
    seen = []
    lowered = brief.lowered
    monkeypatch.setattr(brief, "lowered", lambda *args: seen.append(lowered(*args)) or seen[-1])
    with torch.device("meta"):
        model, x = make().train(train), torch.zeros(64, 32)
    program = fxpar.compile_program(model, Plan.parse("dp=2"), (x,))
    assert memory.predict(program) == memory.predict(program, briefly=False)
    assert (seen != [None]) == taken


# ---- pipelines ----


def both_of_stages(make, plan: str, monkeypatch) -> tuple[list[memory.Peak], list[memory.Peak], int, int]:
    """The peaks from few blocks and one of equal stages; those from all; how many stages were traced, and from few blocks."""
    with torch.device("meta"):
        model, inputs = make()
    program = fxpar.compile_program(model, plan, inputs)
    pp, count = program.plan.pp * program.plan.virtual_stages, program.plan.microbatches
    programs = [stage.program for stage in cut_stages(program, pp)]
    order = schedule(program.plan.schedule, ranks=program.plan.pp, virtual_stages=program.plan.virtual_stages, microbatches=count,
                     unshard=program.plan.stores_parts)
    seen: list[bool] = []
    lowered = brief.lowered

    def watched(*args):
        made = lowered(*args)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(brief, "lowered", watched)
    return memory.predict_stages(programs, order), memory.predict_stages(programs, order, briefly=False), len(seen), sum(seen)


def small(blocks: int):
    model = Small(True)
    model.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32, bias=False)) for _ in range(blocks))
    return model, (torch.zeros(64, 32),)


def of_ids(make):
    tokens = torch.zeros(16, 32, dtype=torch.long)
    return make(), dict(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("blocks, plan, traced, brief_ones", [
    pytest.param(8, "pp=4,dp=2,zero=1,microbatches=4", 3, 0, id="the two in the middle are equal"),
    pytest.param(12, "pp=2,dp=2,zero=1,microbatches=2,stage_boundaries=blocks.1", 2, 1, id="one of many blocks",
                 marks=pytest.mark.slow),
])
def test_peaks_of_a_pipeline_from_few_blocks_and_stages_are_those_of_all(blocks, plan, traced, brief_ones, monkeypatch):
    few, whole, *counts = both_of_stages(lambda: small(blocks), plan, monkeypatch)
    assert few == whole and counts == [traced, brief_ones]
    middle = [peak.where.partition(" of ")[2].split(".")[:2] for peak in few[1:-1]]
    assert middle == [["blocks", "3"], ["blocks", "5"]][: len(few) - 2]


@pytest.mark.slow
@pytest.mark.parametrize("make, plan, traced, brief_ones", [
    (llama, "pp=3,dp=2,cp=2,zero=1,microbatches=4,param_dtype=bf16,outputs=loss", 3, 0),
    (deep_llama, "pp=2,dp=2,tp=2,zero=1,microbatches=2,outputs=loss,stage_boundaries=model.layers.9", 2, 2),
    (deep_llama, "pp=2,zero=3,dp=2,microbatches=2,outputs=loss,stage_boundaries=model.layers.9", 2, 2),
    (deep_llama, "pp=2,dp=2,zero=2,microbatches=4,schedule=interleaved1f1b,virtual_stages=3", 4, 0),
    (deep_gpt2, "pp=2,dp=2,zero=1,microbatches=2,recompute=selective", 2, 2),
])
def test_peaks_of_pipelines_of_transformers(make, plan, traced, brief_ones, monkeypatch):
    few, whole, *counts = both_of_stages(lambda: of_ids(make), plan, monkeypatch)
    assert few == whole and counts == [traced, brief_ones]


# ---- what is kept ----


def decision(blocks: int, price: float) -> Decision:
    """Each block is a product, which is kept, scaled by what all blocks share. The backward pass needs that, too: kept in each
    block at a price of 1, or made again from what is shared, if that is kept, at `price`."""
    graph = fx.Graph()
    x, shared = graph.placeholder("x"), graph.placeholder("shared")
    weights = [graph.placeholder(f"w{i}") for i in range(blocks)]
    products, scaled = [], []
    for w in weights:
        products.append(graph.call_function(torch.matmul, (products[-1] if products else x, w)))
        scaled.append(graph.call_function(torch.mul, (products[-1], shared)))
    return decided(graph, {shared: price}, {*products, *(scaled if blocks < price else [shared])}, set(graph.nodes) - {*scaled})


def pointwise(blocks: int) -> Decision:
    """Each block is one operator, made again from what it reads: all of them from the model's input, if the chain is short."""
    graph = fx.Graph()
    x = made = graph.placeholder("x")
    for _ in range(blocks):
        made = graph.call_function(torch.sin, (made,))
    return decided(graph, {x: 0.5}, {x}, {x}, fusible=set(graph.nodes) - {x})


def decided(graph: fx.Graph, prices: dict[fx.Node, float], saved: set[fx.Node], banned: set[fx.Node],
            fusible: set[fx.Node] = frozenset()) -> Decision:
    """The backward pass needs what every operator makes."""
    network = networkx.DiGraph()
    for node in graph.nodes:
        network.add_edge(f"{node.name}_in", f"{node.name}_out", capacity=prices.get(node, 1))
        for user in node.users:
            network.add_edge(f"{node.name}_out", f"{user.name}_in", capacity=float("inf"))
        if node.op == "call_function":
            network.add_edge(f"{node.name}_out", "sink", capacity=float("inf"))
        if node in banned:
            network.add_edge("source", f"{node.name}_in", capacity=float("inf"))
    return Decision(graph, network, saved, set(graph.nodes), banned, fusible, joins=set(), exempt=set())


@pytest.mark.parametrize("few, missing, inputs", [(decision(5, price=20), 7, 14), (pointwise(5), 90, 1)])
def test_what_few_blocks_keep_all_blocks_keep(few, missing, inputs):
    kept.confirm(few, missing, inputs, least=3)


@pytest.mark.parametrize("few, missing, inputs", [
    pytest.param(decision(5, price=9), 7, 14, id="it costs less to keep what twelve share"),
    pytest.param(decision(5, price=20), 7, 15, id="other blocks than those of the program"),
    pytest.param(pointwise(5), 120, 1, id="a chain gets too long"),
    pytest.param(replace(decision(5, price=20), banned=set()), 7, 14, id="values are banned by other rules"),
])
def test_what_is_not_proved_is_refused(few, missing, inputs):
    with pytest.raises(repeats.NotEqual):
        kept.confirm(few, missing, inputs, least=3)
