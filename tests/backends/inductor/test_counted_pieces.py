"""Graphs in pieces of which some sizes are known only when they run, as the rows that an expert is sent."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx

import fxpar
from fxpar import compat
from fxpar.backends.inductor import buckets, pieces, prefetch
from fxpar.backends.inductor import lower as inductor
from fxpar.testing import assert_equivalent
from tests.models.test_experts import FAMILIES
from tests.processes import launch

BLOCKS, ROWS, WIDTH = 7, 12, 8


@torch.library.custom_op("fxpar_tests::above", mutates_args=())
def above(x: Tensor, least: float) -> Tensor:
    """x, of any shape -> int64 [m], the places in it of what is larger than `least`."""
    return (x.reshape(-1) > least).nonzero()[:, 0].contiguous()


@above.register_fake
def _(x: Tensor, least: float) -> Tensor:
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def chosen_of(x: Tensor, least: float) -> Tensor:
    return x.detach().reshape(-1)[above(x.detach(), least)]


def stack_of(total: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Blocks that choose elements of x; `total` makes one number of what a block makes of the chosen."""
    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        left = []
        for w in weights:
            chosen = chosen_of(x, 0.3) * w[0, 0]
            y = torch.sin(chosen) * 2 + torch.cos(chosen) - chosen.square() / 3
            x = x + torch.tanh(x @ w) * total(y) / 50
            left.append(y)
        return (x, *left)

    return run


stack = stack_of(lambda y: torch.dot(torch.sin(y), torch.cos(y)))
sums = stack_of(torch.sum)
"""Whose backward needs the number of the chosen, which the forward keeps."""


def tensors(seed: int, rows: int = ROWS) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, WIDTH)] + [(WIDTH, WIDTH)] * BLOCKS
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def traced(function: Any, inputs: list[Tensor]) -> fx.GraphModule:
    with compat.sizes_to_compile(inputs, counts=True) as fake:
        made = compat.trace(function, list(fake))
    made.graph.eliminate_dead_code()
    return made


def sizes(results: Any) -> list[int]:
    return [len(y) for y in results[1:]]


def same(have: Any, want: Any) -> None:
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_blocks_are_equal_whatever_their_sizes_are_called():
    inputs = tensors(0)
    made = pieces.cut_into_pieces(traced(stack, inputs))
    assert made is not None and max(Counter(p.kind for p in made.pieces).values()) >= BLOCKS - 2
    assert any(p.counted for p in made.pieces)
    for seed in range(3):
        want = stack(*tensors(seed))
        assert len({*sizes(want)}) > 1
        same(compat.interpret_pieces(made, fx.Interpreter)(tensors(seed)), want)


def test_two_sizes_are_not_taken_for_one():
    """Blocks that take tensors of one size, and such that take tensors of two, are not equal, though all else is."""
    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        a, b = chosen_of(x, 0.0), chosen_of(x, 1.0)
        for first, second in [(torch.sin(a), torch.cos(a))] * 4 + [(torch.sin(a), torch.cos(b))] * 4:
            y = torch.cat([first, second]).exp().sin().mul(3).tanh().sum()
            x = torch.relu(x * 2 + y).tanh()
        return (x,)

    made = pieces.cut_into_pieces(traced(run, tensors(0)))
    assert made is not None and 3 <= max(Counter(p.kind for p in made.pieces).values()) <= 4
    same(compat.interpret_pieces(made, fx.Interpreter)(tensors(1)), run(*tensors(1)))


def test_blocks_may_have_operators_that_return_nothing():
    def checked(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        for w in weights:
            x = torch.tanh(x @ w) * 2 + torch.sin(x) - torch.cos(x) / 3
            torch.ops.aten._assert_async.msg((x < 100).all(), "too large")
        return (x,)

    made = pieces.cut_into_pieces(traced(checked, tensors(0)))
    assert made is not None and max(Counter(p.kind for p in made.pieces).values()) >= BLOCKS - 2
    same(compat.interpret_pieces(made, fx.Interpreter)(tensors(1)), checked(*tensors(1)))


def test_collectives_of_sizes_that_vary_stay_in_one_graph():
    """Quick code starts a gather by the sizes that it had at first."""
    def gathered(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x, *left = stack(x, *weights)
        whole = torch.ops._c10d_functional.all_gather_into_tensor(left[0], 1, "")
        return (x, torch.ops._c10d_functional.wait_tensor(whole))

    assert pieces.cut_into_pieces(traced(stack, tensors(0))) is not None
    assert pieces.cut_into_pieces(traced(gathered, tensors(0))) is None


@pytest.mark.parametrize("function", [stack, sums])
def test_compiled_blocks_run_with_other_sizes_each_time(function, monkeypatch, tmp_path):
    """Forward and backward; what runs from the second time on (see `fxpar.compat.quick`), too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made: list[compat.Pieces | None] = []

    def cutting(*args: Any) -> compat.Pieces | None:
        made.append(pieces.cut_into_pieces(*args))
        return made[-1]

    def loss(results: Any) -> Tensor:
        return sum((k + 1) * y.square().sum() for k, y in enumerate(results))

    module = traced(function, tensors(0))
    for node in module.graph.nodes:
        node.meta.clear()  # it is traced again
    compiled = compat.compile_graph(module, [t.requires_grad_() for t in tensors(0)], counts=True, cutting=cutting)
    assert len(made) == 2 and all(m is not None and len(m.graphs) < len(m.pieces) for m in made)
    numbers = [isinstance(value, torch.SymInt) for m in made for p in m.pieces for value in p.counted.values()]
    assert any(numbers) == (function is sums)
    for seed in range(4):
        results = []
        for run in (compiled, function):
            inputs = [t.requires_grad_() for t in tensors(seed)]
            out = run(*inputs)
            results.append([*out, *torch.autograd.grad(loss(out), inputs)])
        same(*results)


def steps(rank: int, blocks: str, folder: str) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, the last gradients, and how many programs were found on disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    for module, attribute, value in ((buckets, "BLOCK_BYTES", 1), (prefetch, "FIRST_BYTES", 1)):
        setattr(module, attribute, value)
    before = compat.cache_counts()
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
        num_local_experts=4, num_experts_per_tok=2, use_cache=False))
    ids = torch.randint(0, 32, (3, 2, 2, 8))[:, rank]
    module = fxpar.parallelize(model, "dp=2,ep=2", {"input_ids": ids[0], "labels": ids[0]}, backend="inductor", blocks=blocks)
    losses = []
    for number, batch in enumerate(ids):
        module.zero_grad()
        if number == len(ids) - 1:
            with torch.no_grad():
                for name, p in module.named_parameters():
                    p.mul_("gate.weight" not in name)  # the first two experts get all rows, and the other rank none
        loss = module(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
    return losses, {n: p.grad.full_tensor() for n, p in module.named_parameters()}, compat.cache_counts()["hit"] - before["hit"]


@pytest.mark.slow
def test_experts_in_pieces_equal_the_whole_graph(tmp_path):
    """Two processes; three batches, which send other numbers of rows to each rank, and at last none to one."""
    flat, once, again = (launch(2, steps, blocks, str(tmp_path), timeout=900) for blocks in ("flat", "once", "once"))
    for a, b, c in zip(flat, once, again, strict=True):
        assert b[0] == pytest.approx(a[0], rel=1e-6) and b[0] == c[0]
        for name, gradient in a[1].items():
            torch.testing.assert_close(b[1][name], gradient, rtol=1e-5, atol=1e-7)
            assert torch.equal(b[1][name], c[1][name])
        assert c[2] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, plan", [
    ("qwen3", "dp=2,ep=2"), ("olmoe", "dp=4,ep=2,zero=3,recompute=selective"), ("deepseek", "dp=2,tp=2,ep=4"),
    ("gpt_oss", "dp=2,ep=2,recompute=selective"), ("granite", "dp=2,ep=2,microbatches=2"),
    ("mixtral", "dp=2,ep=2,pp=2,microbatches=2,schedule=1f1b"), ("mixtral", "dp=2,ep=2,pp=2,microbatches=2,schedule=zb1p")])
def test_deep_mixtures_in_pieces_are_their_graphs(name, plan, monkeypatch):
    seen: list[compat.Pieces | None] = []
    cut = pieces.cut_into_pieces
    monkeypatch.setattr(pieces, "cut_into_pieces", lambda *args, **more: seen.append(cut(*args, **more)) or seen[-1])
    monkeypatch.setitem(inductor.SHARES, "auto", 1.0)
    for module, attribute, value in ((buckets, "BLOCK_BYTES", 1), (prefetch, "FIRST_BYTES", 1), (prefetch, "SMALL_BYTES", 16)):
        monkeypatch.setattr(module, attribute, value)
    model, batch = FAMILIES[name](layers=16 if "pp" in plan else 8)
    assert_equivalent(model, plan, batch, lowered=True)
    assert any(made is not None and any(p.counted for p in made.pieces) for made in seen)
