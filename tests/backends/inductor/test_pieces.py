"""Graphs cut into pieces: they compute the same, equal blocks are compiled once, and nothing is held for longer."""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxpar
from fxpar import compat
from fxpar.backends.inductor import buckets, pieces, prefetch
from fxpar.backends.inductor import lower as inductor
from fxpar.errors import PlanError
from fxpar.testing import assert_equivalent
from tests.harness import RANDOM
from tests.processes import launch

aten = torch.ops.aten
BLOCKS, ROWS, WIDTH = 8, 64, 48


# ---- graphs ----


def graph_of(function: Callable, *inputs: Tensor) -> fx.GraphModule:
    """What a function does, without gradients, as Inductor is given it."""
    with compat.FakeTensorMode() as mode:
        made = compat.trace(function, [mode.from_tensor(x) for x in inputs])
    made.graph.eliminate_dead_code()
    return made


def kinds(made: compat.Pieces | None) -> list[int]:
    assert made is not None
    return [p.kind for p in made.pieces]


def longest(made: compat.Pieces | None) -> int:
    """How many of the pieces are of one class."""
    return max(Counter(kinds(made)).values())


def block(x: Tensor, w: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1).sqrt()
    return x + torch.tanh(y @ w)


def stack(*inputs: Tensor) -> tuple[Tensor, ...]:
    x, *weights = inputs
    for w in weights:
        x = block(x, w)
    return (x.sum(), x)


def tensors(count: int = BLOCKS) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(ROWS, WIDTH), *(torch.randn(WIDTH, WIDTH) for _ in range(count))]


def equal_results(module: fx.GraphModule, made: compat.Pieces, inputs: list[Tensor]) -> None:
    want = fx.Interpreter(module).run(*inputs)
    have = compat.interpret_pieces(made, fx.Interpreter)(list(inputs))
    for a, b in zip(want, have, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_equal_blocks_are_one_graph():
    inputs = tensors()
    module = graph_of(stack, *inputs)
    made = pieces.cut_into_pieces(module, share=0.5)
    assert longest(made) >= BLOCKS - 2 and len(made.graphs) <= 3
    equal_results(module, made, inputs)


def test_the_graph_stays_as_it_was():
    module = graph_of(stack, *tensors())
    before = str(module.graph)
    assert pieces.cut_into_pieces(module) is not None
    assert str(module.graph) == before


def test_a_cut_does_not_come_between_what_is_fused():
    """Not behind the sum of the residual stream, whose kernel also normalises, but at a product."""
    made = pieces.cut_into_pieces(graph_of(stack, *tensors()))
    repeated = made.graphs[Counter(kinds(made)).most_common(1)[0][0]]
    first = next(n for n in repeated.graph.nodes if n.op == "call_function")
    assert first.target in (aten.mm.default, aten.tanh.default)


@pytest.mark.parametrize("change", ["argument", "shape"])
def test_what_differs_is_not_taken_for_equal(change):
    def uneven(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, *weights = inputs
        for i, w in enumerate(weights):
            x = block(x, w)
            if i == BLOCKS // 2:
                x = x * 2 if change == "argument" else torch.cat([x, x])
        return (x,)

    inputs = tensors(2 * BLOCKS)
    module = graph_of(uneven, *inputs)
    made = pieces.cut_into_pieces(module)
    assert made is not None and len(made.graphs) > 2
    equal_results(module, made, inputs)


def test_two_stacks_are_two_runs():
    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, *weights = inputs
        for w in weights[:BLOCKS]:
            x = block(x, w)
        for w in weights[BLOCKS:]:
            x = F.gelu(x @ w) @ w.t() - torch.cos(x).cumsum(-1).exp().clamp(0, 1)
        return (x,)

    inputs = tensors(2 * BLOCKS)
    module = graph_of(both, *inputs)
    made = pieces.cut_into_pieces(module)
    assert made is not None and sorted(Counter(kinds(made)).values())[-2] >= BLOCKS - 2
    equal_results(module, made, inputs)


def test_nothing_repeats_and_sizes_of_values_are_left_alone():
    assert pieces.cut_into_pieces(graph_of(stack, *tensors(1))) is None
    inputs = tensors(1)
    with compat.sizes_to_compile(inputs, counts=True) as fake:
        module = compat.trace(lambda x, w: (stack(x, *[w] * BLOCKS)[1][x.nonzero()[:, 0]],), list(fake))
    assert pieces.cut_into_pieces(module) is None
    assert pieces.cut_into_pieces(graph_of(stack, *tensors()), share=0.01) is None


@pytest.mark.slow
@given(RANDOM)
def test_random_stacks(r: Random):
    """Blocks of random operators, whose results are read by the next block, by later ones, and by the user."""
    choices: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, w: x @ w, lambda x, w: x + w[:1], lambda x, w: torch.tanh(x), lambda x, w: x.t().contiguous().t(),
        lambda x, w: x.reshape(-1).reshape(x.shape), lambda x, w: x - x.mean(0), lambda x, w: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x, w: x * x.amax(-1, keepdim=True), lambda x, w: torch.where(x > 0, x, w[0])]
    steps = [r.choice(choices) for _ in range(r.randint(2, 6))]
    far, keep, count = r.random() < 0.4, r.random() < 0.4, r.randint(4, 9)

    def run(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = inputs
        first, out = x, []
        for w in weights:
            y = x
            for step in steps:
                x = step(x, w)
            x = x + (first if far else y)
            if keep:
                out.append(x * 2)
        return x, *out

    inputs = tensors(count)
    module = graph_of(run, *inputs)
    made = pieces.cut_into_pieces(module)
    if made is not None:
        equal_results(module, made, inputs)


def test_memory_that_is_written_to_is_written_to_in_order():
    def run(buffer: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = stack(*inputs)[1]
        buffer.add_(x)
        return (x * buffer,)

    inputs = [torch.ones(ROWS, WIDTH), *tensors()]
    module = graph_of(run, *inputs)
    made = pieces.cut_into_pieces(module)
    assert made is not None
    copies = [[x.clone() for x in inputs] for _ in range(2)]
    want = fx.Interpreter(module).run(*copies[0])
    have = compat.interpret_pieces(made, fx.Interpreter)(list(copies[1]))
    assert torch.equal(want[0], have[0]) and torch.equal(copies[0][0], copies[1][0])


# ---- memory ----


def test_values_are_let_go_as_they_are_in_one_graph():
    """Those that are passed on, and those that came in, as saved activations come into a backward."""
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, *saved = inputs
        for s in reversed(saved):
            x = block(x, s) * s.sum()
        return (x,)

    module = graph_of(run, *tensors())
    made = pieces.cut_into_pieces(module)
    assert made is not None
    seen: list[list[int]] = []
    for start in (lambda given: fx.Interpreter(module).boxed_run(given), compat.interpret_pieces(made, fx.Interpreter)):
        given = tensors()
        alive = [weakref.ref(x) for x in given]
        counts: list[int] = []

        class Noted(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is aten.mm.default:
                    counts.append(sum(ref() is not None for ref in alive))  # noqa: B023
                return func(*args, **(kwargs or {}))

        with Noted():
            start(given)
        seen.append(counts)
        gc.collect()
    whole, cut = seen
    assert len(whole) == len(cut) == BLOCKS and all(b <= a + 1 for a, b in zip(whole, cut, strict=True))
    assert cut[-1] <= 3


# ---- whole models, simulated ----


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(width, width), nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(x, target)


def deep(depth: int = 9) -> tuple[Deep, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Deep(depth), {"x": torch.randn(4, 8), "target": torch.randint(8, (4,))}


@pytest.fixture
def cuts(monkeypatch) -> list[compat.Pieces | None]:
    """What graphs were cut into; all that repeats is cut, and every block has buckets of its own."""
    seen: list[compat.Pieces | None] = []
    cut = pieces.cut_into_pieces

    def noted(*args: Any, **options: Any) -> compat.Pieces | None:
        seen.append(cut(*args, **options))
        return seen[-1]

    monkeypatch.setattr(pieces, "cut_into_pieces", noted)
    monkeypatch.setitem(inductor.SHARES, "auto", 1.0)
    for module, name, value in ((buckets, "BLOCK_BYTES", 1), (prefetch, "FIRST_BYTES", 1), (prefetch, "SMALL_BYTES", 16)):
        monkeypatch.setattr(module, name, value)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2", "dp=2", "dp=2,zero=3,recompute=full",
                                  "dp=2,pp=2,microbatches=2,schedule=zb1p"])
def test_pieces_of_a_deep_model_are_its_graphs(plan, cuts):
    """Gathers that start in one piece and are waited for in another one, too: what reads a result early is an error there."""
    model, batch = deep(18 if "pp" in plan else 9)
    assert_equivalent(model, plan, batch, lowered=True)
    assert cuts and all(made is not None and longest(made) >= 3 for made in cuts)
    if plan == "dp=2,zero=3":
        assert any(p.after for p in cuts[0].pieces) and any(p.donated for p in cuts[1].pieces)


COMMON = {"vocab_size": 64, "use_cache": False}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 32} | COMMON  # fmt: skip
MODELS = {
    "llama": lambda n: transformers.LlamaConfig(num_hidden_layers=n, **LLAMA),
    "gemma": lambda n: transformers.Gemma3TextConfig(num_hidden_layers=n, head_dim=8, sliding_window=4, **LLAMA,
                                                     layer_types=["sliding_attention", "full_attention"] * (n // 2)),
    "mixtral": lambda n: transformers.MixtralConfig(num_hidden_layers=n, num_local_experts=4, num_experts_per_tok=2, **LLAMA),
    "gpt2": lambda n: transformers.GPT2Config(n_layer=n, n_embd=32, n_head=4, n_positions=16, **COMMON),
    "t5": lambda n: transformers.T5Config(num_layers=n, d_model=32, d_ff=64, num_heads=4, d_kv=8, dropout_rate=0.0, **COMMON,
                                          decoder_start_token_id=0, pad_token_id=0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, plan, layers, cut", [
    ("llama", "dp=2,zero=3", 9, True), ("llama", "dp=2,zero=3,recompute=full", 9, False), ("gpt2", "dp=2,zero=3", 9, True),
    ("t5", "tp=2", 5, True), ("gemma", "dp=2", 8, True), ("mixtral", "dp=2,ep=2", 8, True),
    ("mixtral", "dp=2,tp=2,ep=2,recompute=selective", 8, True), ("mixtral", "dp=4,ep=2,zero=3", 8, True)])
def test_pieces_of_models_are_their_graphs(name, plan, layers, cut, cuts):
    """PyTorch keeps the random state for attention that is run again: that stays whole, and right. Layers with dropout are cut,
    and mixtures of experts, whose sizes depend on values."""
    torch.manual_seed(0)
    config = MODELS[name](layers)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    ids = torch.randint(1, 64, (4, 12))
    assert_equivalent(kind.from_config(config), plan, {"input_ids": ids, "labels": ids}, lowered=True)
    found = [made for made in cuts if made is not None]
    assert bool(found) == cut
    if name == "t5":
        assert sorted(Counter(kinds(found[0])).values())[-2] >= 3


def compiled_steps(rank: int, blocks: str, folder: str) -> tuple[list[float], dict[str, Tensor], dict[str, int]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    for module, attribute, value in ((buckets, "BLOCK_BYTES", 1), (prefetch, "FIRST_BYTES", 1)):
        setattr(module, attribute, value)
    before = compat.cache_counts()
    model, batch = deep(8)
    mine = {k: v.chunk(2)[rank] for k, v in batch.items()}
    module = fxpar.parallelize(model, "dp=2,zero=3", mine, backend="inductor", blocks=blocks)
    losses = []
    for _ in range(2):
        loss = module(**mine)
        loss.backward()
        losses.append(loss.item())
    return losses, {n: p.grad.full_tensor() for n, p in module.named_parameters()}, {
        k: v - before[k] for k, v in compat.cache_counts().items()}


@pytest.mark.slow
def test_compiled_pieces_equal_the_compiled_graph_and_are_found_by_the_next_start(tmp_path):
    flat, once, again = (launch(2, compiled_steps, blocks, str(tmp_path), timeout=900) for blocks in ("flat", "once", "once"))
    for a, b, c in zip(flat, once, again, strict=True):
        assert a[0] == b[0] == c[0]
        for name, gradient in a[1].items():
            torch.testing.assert_close(b[1][name], gradient)
            assert torch.equal(b[1][name], c[1][name])
        assert b[2]["saved"] == 1 and c[2]["hit"] == 1


def test_there_are_three_ways_to_compile_blocks():
    with pytest.raises(PlanError, match="blocks"):
        fxpar.parallelize(deep(1)[0], "dp=1", deep(1)[1], blocks="never")
