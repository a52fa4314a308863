"""A program compiled from a trace of few of its equal blocks is the program: graph by graph, and number by number."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fxpar
from fxpar import compat
from fxpar.backends import repeats
from fxpar.backends.inductor import brief, few, whole
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.inductor.sites import sites_as_inputs
from fxpar.backends.remat import BLOCK
from fxpar.backends.trace import tensor_inputs_only
from fxpar.ops.runtime import use_runtime
from fxpar.sharding.facts import sharding_at
from fxpar.sharding.layout import take
from tests.processes import launch

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
BLOCKS = 9


class Block(nn.Module):
    """residual: what it computes is added to what it takes. biased, normed: it has a bias, and a norm. twice: two products.
    drops: of what it computes, some is dropped. noisy: noise is added to it."""

    def __init__(self, width: int, residual: bool, biased: bool, normed: bool, twice: bool, drops: bool, noisy: bool) -> None:
        super().__init__()
        self.drop, self.noisy = nn.Dropout(0.25 if drops else 0.0), noisy
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()
        self.up, self.residual = nn.Linear(width, width * (2 if twice else 1), bias=biased), residual
        self.down = nn.Linear(2 * width, width, bias=False) if twice else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        y = y + 0.1 * torch.rand_like(y) if self.noisy else y
        return x + y if self.residual else y


class Stack(nn.Module):
    def __init__(self, count: int = BLOCKS, width: int = 8, **block: bool) -> None:
        super().__init__()
        block = dict(residual=True, biased=True, normed=True, twice=True, drops=False, noisy=False) | block
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, **block) for _ in range(count))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()


class Uneven(Stack):
    """One block is wider than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[4].up, self.blocks[4].down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)


class Crossed(Stack):
    """Blocks run in another order than that of their list."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (0, 2, 1, 5, 3, 8, 4, 7, 6):
            x = self.blocks[i](x)
        return self.last(x).square().mean()


class Collects(Stack):
    """What each block makes is an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, made = self.first(x), []
        for block in self.blocks:
            x = block(x)
            made.append(x.sum())
        return (self.last(x).square().mean(), *made)


class DropsMore(Stack):
    """One block drops more than the others."""

    def __init__(self) -> None:
        super().__init__(**DROPPING)
        self.blocks[4].drop.p = 0.5


class Tied(Stack):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block.up.weight = self.blocks[0].up.weight


FEATURES = ["residual", "biased", "normed", "twice", "drops", "noisy"]
DROPPING = dict(biased=False, normed=False, twice=False, drops=True)
X = torch.linspace(-1, 1, 64).view(8, 8)


@contextlib.contextmanager
def spied(name: str = "from_few"):
    """Inside, yields a list: of each program that was made, whether it was made from few blocks. name: of what makes it."""
    made: list[bool] = []
    original = getattr(inductor, name)

    def seen(*args):
        found = original(*args)
        made.append(found is not None)
        return found

    with mock.patch.object(inductor, name, seen):
        yield made


def steps(model: nn.Module, plan: str, batch, backend: str = "eager"):
    """A step of the program from few blocks, one of the program that is traced whole, and which of its graphs came from few."""
    name = "few_steps" if "pp" in plan else "from_few"
    with spied(name) as made:
        mine = fxpar.simulate(model, plan, batch, lowered=True, backend=backend)
        mine = mine.step(**batch) if isinstance(batch, dict) else mine.step(*batch)
    with mock.patch.object(inductor, name, lambda *args: None):
        theirs = fxpar.simulate(model, plan, batch, lowered=True, backend=backend)
        theirs = theirs.step(**batch) if isinstance(batch, dict) else theirs.step(*batch)
    return mine, theirs, made


def assert_same(mine, theirs) -> None:
    assert torch.equal(mine.loss, theirs.loss)
    assert {*mine.grads} == {*theirs.grads}
    for name, grad in theirs.grads.items():
        assert torch.equal(mine.grads[name], grad), name


def graphs_of(model: nn.Module, plan: str, batch) -> tuple[list, list]:
    """`whole_graphs` as texts."""
    mine, theirs = whole_graphs(model, plan, batch)
    return _texts(mine) if mine else [], _texts(theirs)


def whole_graphs(model: nn.Module, plan: str, batch) -> tuple[list, list]:
    """The forward and backward graphs of rank 0 from few blocks, and those of a trace of all."""
    simulation = fxpar.simulate(model, plan, batch, lowered=True)
    ranks = Lowered(simulation.program.mesh, simulation.plan)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    example = [named.get(s.name, s.value) for s in simulation.program.sources]
    example = [_local(x, s, n, simulation.program.mesh)
               for x, s, n in zip(example, simulation.program.sources, simulation.program.source_of(), strict=True)]
    plain, keep = tensor_inputs_only(simulation.program.module, example, fused=True)
    taken, found = [example[i] for i in keep], []
    taken += sites_as_inputs(plain, taken)
    with use_runtime(ranks.threads.runtime(0)):
        config = inductor.settings(simulation.plan, as_on_gpu=True)
        with compat.faked(taken) as fakes:
            whole.from_few_blocks(plain, [brief.Input(x, "") for x in fakes], simulation.plan, config, found.append)
        with compat.faked(taken) as fakes:
            theirs = compat.lowered_graphs(plain, fakes, config)
    mine = [g for w in found for g in (w.forward, w.backward) if g is not None]
    return mine, theirs


def _local(x, source, node, mesh):
    if not isinstance(x, Tensor):
        return x
    return take(x.detach(), sharding_at(node), mesh, 0).clone().requires_grad_(source.requires_grad)


def _texts(graphs) -> list:
    """The graphs as they are, and which of their values are inputs, outputs, gradients, and what goes from one to the other."""
    texts, numbers = zip(*(repeats.written(g.graph, brief.shapes) for g in graphs), strict=True)
    lines = [text[: len(number)] for text, number in zip(texts, numbers, strict=True)]  # inputs that nothing reads do not count
    places = [[number.get(n) for n in g.graph.find_nodes(op="placeholder")] for g, number in zip(graphs, numbers, strict=True)]
    results = [[None if n is None else number.get(n) for n in g.graph.output_node().args[0]]
               for g, number in zip(graphs, numbers, strict=True)]
    if len(graphs) == 1:
        return [lines, places, results]
    tangents = [n for n in graphs[1].graph.find_nodes(op="placeholder") if n.name.startswith("tangents")]
    saved = len(places[1]) - len(tangents)
    kept = sorted((n, str(m)) for n, m in zip(places[1][:saved], results[0][-saved:], strict=True) if n is not None)
    return [lines, places[0], places[1][saved:], results[0][:-saved], results[1], kept]


PLANS = ["dp=1", "dp=2", "dp=2,zero=3", "tp=2", "dp=2,tp=2,zero=1", "dp=2,zero=3,param_dtype=bf16", "dp=2,recompute=selective",
         "dp=2,recompute=full"]


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(8, 11), st.fixed_dictionaries(dict.fromkeys(FEATURES, st.booleans())), st.sampled_from(PLANS))
def test_graphs_from_few_blocks_are_those_of_all(count, block, plan):
    mine, theirs = graphs_of(Stack(count, **block), plan, (X,))
    assert not mine or mine == theirs


@pytest.mark.parametrize("plan", ["dp=1", "dp=2,zero=3", pytest.param("dp=2,tp=2,zero=1", marks=pytest.mark.slow)])
def test_a_trace_of_few_blocks_is_enough(plan):
    mine, theirs = graphs_of(Stack(), plan, (X,))
    assert mine and mine == theirs


@pytest.mark.parametrize("plan, block", [
    ("dp=2,zero=3", DROPPING), *(pytest.param(plan, dict(drops=True, noisy=True), marks=pytest.mark.slow)
                                 for plan in ("dp=2,tp=2,zero=1", "dp=2,recompute=selective"))])
def test_a_trace_of_few_blocks_with_dropout_is_enough(plan, block):
    """Each block has its own masks: the numbers of its dropouts are inputs of the graphs, as parameters are."""
    mine, theirs = graphs_of(Stack(**block), plan, (X,))
    assert mine and mine == theirs


@pytest.mark.parametrize("plan, block", [
    ("dp=1", DROPPING),
    *(pytest.param(plan, dict(drops=True, noisy=True), marks=pytest.mark.slow) for plan in ("tp=2", "dp=2,zero=3"))])
def test_every_block_draws_its_own_numbers(plan, block):
    model = Stack(**block)
    mine, theirs, made = steps(model, plan, (X,))
    assert made and all(made)
    assert_same(mine, theirs)
    reference = fxpar.simulate(model, "dp=1", (X,)).step(X)
    torch.testing.assert_close(mine.loss, reference.loss, rtol=1e-6, atol=0)
    for name, grad in reference.grads.items():
        torch.testing.assert_close(mine.grads[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


def test_operators_know_their_blocks():
    """By the marks that passes and profiles read, and by their modules."""
    mine, theirs = ([[n for n in g.graph.nodes if n.op == "call_function"] for g in graphs]
                    for graphs in whole_graphs(Stack(), "dp=2,zero=3", (X,)))
    for made, wanted in zip(mine, theirs, strict=True):
        for key in ("nn_module_stack", "fwd_nn_module_stack"):
            assert [[path for path, *_ in n.meta.get(key, {}).values()] for n in made] == \
                [[path for path, *_ in n.meta.get(key, {}).values()] for n in wanted]
        assert [n.meta.get("custom", {}).get(BLOCK) for n in made] == [n.meta.get("custom", {}).get(BLOCK) for n in wanted]
    assert "blocks.6" in [n.meta.get("custom", {}).get(BLOCK) for n in mine[0]]


@pytest.mark.parametrize("plan", ["dp=2,zero=3", pytest.param("tp=2", marks=pytest.mark.slow)])
def test_every_parameter_gets_its_own_gradient(plan):
    mine, theirs, made = steps(Stack(), plan, (X,))
    assert made and all(made)
    assert_same(mine, theirs)


@pytest.mark.parametrize("plan, count, block, from_few", [
    ("pp=2,microbatches=2,stage_boundaries=blocks.1", 10, dict(biased=False, normed=False, twice=False), [False, True]),
    pytest.param("pp=2,microbatches=2,schedule=zb1p", 20, DROPPING, [True, True], marks=pytest.mark.slow),
    pytest.param("pp=2,dp=2,zero=3,microbatches=2", 20, {}, [True, True], marks=pytest.mark.slow),
    pytest.param("pp=2,tp=2,microbatches=2,schedule=zbv,virtual_stages=2", 36, {}, [True] * 4, marks=pytest.mark.slow),
])
def test_stages_from_few_blocks(plan, count, block, from_few):
    torch.manual_seed(0)
    mine, theirs, made = steps(Stack(count, **block), plan, (X,))
    assert made == from_few
    assert_same(mine, theirs)


def trained(rank: int, blocks: str, folder: str) -> tuple[list[float], dict[str, Tensor], list[bool]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    whole.FEWER = 1
    torch.manual_seed(0)
    with spied() as made:
        module = fxpar.parallelize(Stack(7, **DROPPING), "dp=2,zero=3", (X.chunk(2)[rank],), backend="inductor", blocks=blocks)
        losses = []
        for _ in range(2):
            loss = module(X.chunk(2)[rank])
            loss.backward()
            losses.append(loss.item())
    return losses, {n: p.grad.full_tensor() for n, p in module.named_parameters()}, made


@pytest.mark.slow
def test_processes_draw_the_same_numbers(tmp_path):
    """Compiled, on two ranks, and found on disk by the next start."""
    flat, auto, again = (launch(2, trained, blocks, str(tmp_path), timeout=900) for blocks in ("flat", "auto", "auto"))
    for whole_trace, few_blocks, found in zip(flat, auto, again, strict=True):
        assert whole_trace[2] == [False] and few_blocks[2] == found[2] == [True]
        assert whole_trace[0] == few_blocks[0] == found[0]
        assert whole_trace[0][0] != whole_trace[0][1]
        for name, grad in whole_trace[1].items():
            assert torch.equal(few_blocks[1][name], grad) and torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("make", [
    pytest.param(Crossed, id="another order"),
    pytest.param(Uneven, id="one is wider", marks=pytest.mark.slow),
    pytest.param(Collects, id="outputs of blocks", marks=pytest.mark.slow),
    pytest.param(lambda: Stack(7), id="few blocks"),
])
def test_what_is_not_proved_is_traced_whole(make):
    torch.manual_seed(0)
    mine, theirs, made = steps(make(), "dp=2", (X,))
    assert made and not any(made)
    assert_same(mine, theirs)


def test_a_block_that_drops_more_is_traced():
    mine, _ = whole_graphs(DropsMore(), "dp=1", (X,))
    assert not mine


def test_shared_parameters():
    mine, theirs, _ = steps(Tied(), "dp=2", (X,))
    assert_same(mine, theirs)


class Labelled(Stack):
    """Its labels are what it is given."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x) + (labels - x).square().mean() + labels.mean()


def test_labels_that_are_the_input_itself():
    """As of language models, which are given their ids as labels. The next batch has others."""
    model, other = Labelled(), X.flip(0)
    with spied() as made:
        mine = fxpar.simulate(model, "dp=2", (X, X), lowered=True)
        steps = [mine.step(X, X), mine.step(X, other)]
    assert made and all(made)
    reference = fxpar.simulate(model, "dp=1", (X, X))
    for step, labels in zip(steps, (X, other), strict=True):
        torch.testing.assert_close(step.loss, reference.step(X, labels).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("given, writes, found", [
    ([X, X[4:]], False, True), ([X, X], False, True), ([X, X], True, False), ([X, X.clone()], True, True),
    ([X.flatten()[1:], X.clone()], False, False)])
def test_what_begins_in_the_middle_and_what_shares_written_memory_is_traced_whole(given, writes, found):
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function((torch.ops.aten.add_ if writes else torch.ops.aten.add).Tensor, (x, y)))
    assert few._as_by_themselves(graph, given) == found


@pytest.mark.parametrize("wrong", [True, False])
def test_a_mistaken_order_is_seen(wrong, monkeypatch):
    """Of inputs of two blocks that were taken for each other."""
    original = whole._named

    def swapped(run, *rest):
        named = original(run, *rest)
        alike = [m for m in run.families if sum(n in named and n.op == "placeholder" for n in m.values()) > 4]
        if not wrong or not alike:
            return named
        a, b = [alike[0][q] for q in sorted(alike[0])][2:4]
        return named | {a: named[b], b: named[a]}

    monkeypatch.setattr(whole, "_named", swapped)
    with spied() as made:
        fxpar.simulate(Stack(), "dp=1", (X,), lowered=True).step(X)
    assert made == [not wrong]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=BLOCKS, **COMMON))


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=BLOCKS, head_dim=8, **COMMON))


def gemma2() -> nn.Module:
    """A sliding window in every second layer."""
    return Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=16, head_dim=8, sliding_window=8, **COMMON))


def gpt2(p: float = 0.0) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=BLOCKS, n_embd=32, n_head=4, vocab_size=64, n_positions=64, use_cache=False,
                                      resid_pdrop=p, embd_pdrop=p, attn_pdrop=p))


def bert(p: float = 0.0) -> nn.Module:
    common = {k: v for k, v in COMMON.items() if k not in ("use_cache", "num_key_value_heads", "pad_token_id")}
    return BertForMaskedLM(BertConfig(num_hidden_layers=BLOCKS, hidden_dropout_prob=p, attention_probs_dropout_prob=p, **common))


def dropping_gpt2() -> nn.Module:
    return gpt2(0.1)


def dropping_bert() -> nn.Module:
    return bert(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=1", "dp=2,zero=3", "tp=2", "dp=2,tp=2,zero=3,param_dtype=bf16", "cp=2",
                                  "dp=2,recompute=full", "dp=2,recompute=selective"])
@pytest.mark.parametrize("make", [llama, qwen3, gemma2, gpt2, bert, dropping_gpt2, dropping_bert])
def test_transformers(make, plan):
    torch.manual_seed(0)
    model, ids = make(), torch.randint(0, 64, (4, 16))
    mine, theirs, made = steps(model, plan, dict(input_ids=ids, labels=ids))
    assert_same(mine, theirs)
    known = plan in ("dp=2,zero=3", "tp=2", "dp=2,recompute=full", "dp=2,recompute=selective")
    if make in (llama, qwen3) or (make is not gemma2 and known):
        assert made and all(made)
