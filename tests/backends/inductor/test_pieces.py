"""Graphs cut into pieces: they compute the same, equal blocks are compiled once, and nothing is held for longer."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxpar import compat
from fxpar.backends.inductor import buckets, pieces, prefetch
from fxpar.backends.inductor import lower as inductor
from fxpar.testing import assert_equivalent
from tests.harness import RANDOM

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


class Peak(TorchDispatchMode):
    """The most bytes that operators' results ever take."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else [made]:
            if isinstance(x, Tensor) and compat.storage_of(x) not in self.alive:
                storage = x.untyped_storage()
                self.alive[key := compat.storage_of(x)] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, key)
        self.most = max(self.most, self.bytes)
        return made

    def gone(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)


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


@pytest.mark.parametrize("plan", ["dp=2,zero=3", pytest.param("tp=2", marks=pytest.mark.slow),
                                  pytest.param("dp=2", marks=pytest.mark.slow),
                                  pytest.param("dp=2,zero=3,recompute=full", marks=pytest.mark.slow),
                                  pytest.param("dp=2,pp=2,microbatches=2,schedule=zb1p", marks=pytest.mark.slow)])
def test_pieces_of_a_deep_model_are_its_graphs(plan, cuts):
    """Gathers that start in one piece and are waited for in another one, too: what reads a result early is an error there."""
    model, batch = deep(18 if "pp" in plan else 9)
    assert_equivalent(model, plan, batch, lowered=True)
    assert cuts and all(made is not None and longest(made) >= 3 for made in cuts)
    if plan == "dp=2,zero=3":
        assert any(p.after for p in cuts[0].pieces) and any(p.donated for p in cuts[1].pieces)
