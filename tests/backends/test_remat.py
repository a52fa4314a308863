"""Recomputation: what training steps keep, gather again and compute again, in the graphs that AOTAutograd splits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxpar.backends.remat import BLOCK
from tests.graphs import Halves, calls

BLOCKS, WIDTH, HIDDEN, LENGTH = 2, 8, 20, 6
PRODUCTS = ("mm", "addmm", "bmm")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu",)
GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"
WEIGHTS = {(24, 8), (8, 24), (HIDDEN, WIDTH), (WIDTH, HIDDEN)}
"""The shapes of blocks' weights, unsharded, as they are and transposed: no other value has them."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, WIDTH), nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


@pytest.fixture(scope="module")
def known() -> dict[str, Halves]:
    return {}


@pytest.fixture
def halves(two_ranks: str, known: dict[str, Halves], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Halves]:
    """A plan -> the graphs of its step; made once."""
    batch = {"x": torch.randint(16, (4, LENGTH)), "target": torch.randint(16, (4, LENGTH))}

    def of(plan: str) -> Halves:
        if plan not in known:
            known[plan] = Halves(Net(), plan, batch, monkeypatch)
        return known[plan]

    return of


def shapes(nodes: list[fx.Node]) -> set[tuple[int, ...]]:
    return {tuple(n.meta["val"].shape) for n in nodes}


def in_blocks(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if n.meta.get("custom", {}).get(BLOCK)]


# ---- parameters ----


SLOW = pytest.mark.slow


@pytest.mark.parametrize("zero, recompute", [
    (1, "none"), (2, "full"), pytest.param(1, "selective", marks=SLOW), pytest.param(2, "none", marks=SLOW)])
def test_zero_1_and_2_keep_what_they_gathered(halves, zero, recompute):
    made = halves(f"dp=2,zero={zero},recompute={recompute}")
    assert calls(made.forward, GATHER) == calls(made.backward, SCATTER) == 2 + 10 * BLOCKS
    assert calls(made.backward, GATHER) == 0
    assert shapes(made.saved) & WEIGHTS


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "0.5"])
def test_zero_3_keeps_no_gathered_weight_of_a_block(halves, recompute):
    made = halves(f"dp=2,zero=3,recompute={recompute}")
    assert calls(made.forward, GATHER) == calls(made.backward, SCATTER) == 2 + 10 * BLOCKS
    assert calls(made.backward, GATHER) >= 4 * BLOCKS  # every weight
    assert not shapes(made.saved) & WEIGHTS


def test_zero_3_keeps_what_it_gathered_after_the_last_block(halves):
    made = halves("dp=2,zero=3")
    assert (16, WIDTH) in {tuple(sorted(shape, reverse=True)) for shape in shapes(made.saved)}


# ---- activations ----


class Chooses(nn.Module):
    """Two blocks, each of which takes its largest elements, in their order."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x)).topk(4, -1).values.sort(-1).values))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chooses.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_was_chosen_is_not_chosen_again(two_ranks, monkeypatch, recompute):
    made = Halves(Chooses(), f"dp=2,recompute={recompute}", {"x": torch.randn(4, WIDTH)}, monkeypatch)
    assert calls(made.forward, "topk") == calls(made.forward, "sort") == 2
    assert calls(made.backward, "topk", "sort") == 0 and calls(made.backward, "gelu") == 2


@pytest.mark.parametrize("zero", [0, 3])
def test_full_keeps_of_a_block_what_leaves_it(halves, zero):
    made = halves(f"dp=2,zero={zero},recompute=full")
    kept = in_blocks(made.saved)
    assert 0 < len(kept) <= BLOCKS and shapes(kept) == {(2, LENGTH, WIDTH)}
    assert calls(made.forward, *ATTENTION) == calls(made.backward, *ATTENTION) == BLOCKS
    none = halves(f"dp=2,zero={zero}")
    assert calls(made.backward, *PRODUCTS) == calls(none.backward, *PRODUCTS) + 3 * BLOCKS  # but for the last of a block


def test_selective_computes_no_product_and_no_attention_again(halves):
    none, made = halves("dp=2"), halves("dp=2,recompute=selective")
    assert calls(made.backward, *PRODUCTS) == calls(none.backward, *PRODUCTS)
    assert calls(made.forward, *ATTENTION) == BLOCKS and calls(made.backward, *ATTENTION) == 0
    assert calls(made.backward, "gelu", "native_layer_norm") == 2 * BLOCKS
    assert calls(none.backward, "gelu", "native_layer_norm") == 0


class Drops(Net):
    """The weights of its attention drop out."""

    class Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            return x + F.dropout(self.down(F.gelu(self.up(x + self.out(y.transpose(1, 2).flatten(2))))), 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Drops.Block() for _ in range(BLOCKS))


@pytest.mark.parametrize("recompute, again", [
    pytest.param("none", 0, marks=pytest.mark.slow), ("selective", 0), ("full", BLOCKS),
])  # fmt: skip
def test_attention_with_dropout_is_kept_as_attention_is(two_ranks, monkeypatch, recompute, again):
    batch = {"x": torch.randint(16, (4, LENGTH)), "target": torch.randint(16, (4, LENGTH))}
    made = Halves(Drops(), f"dp=2,recompute={recompute}", batch, monkeypatch)
    assert calls(made.forward, "attend") == calls(made.backward, "attend_backward") == BLOCKS
    assert calls(made.backward, "attend") == again
    values = [n.meta["val"] for n in made.saved]
    assert not [x for x in values if x.shape[2:] == (LENGTH, LENGTH)]


def test_dropout_masks_are_drawn_again(two_ranks, monkeypatch):
    """Those of written out attention, too."""
    batch = {"x": torch.randint(16, (4, LENGTH)), "target": torch.randint(16, (4, LENGTH))}
    made = Halves(Drops(), "dp=2", batch, monkeypatch)
    values = [n.meta["val"] for n in made.saved]
    assert not [x for x in values if x.dtype in (torch.bool, torch.int32, torch.int64) and x.dim() > 2]


@pytest.mark.slow
def test_selective_communicates_nothing_again(halves):
    none, made = halves("tp=2"), halves("tp=2,recompute=selective")
    kinds = (GATHER, SCATTER, "all_reduce")
    assert calls(made.forward, *kinds) == calls(none.forward, *kinds) > 0
    assert calls(made.backward, *kinds) == calls(none.backward, *kinds) > 0


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=SLOW), 3])
def test_fewer_bytes_are_kept_the_more_is_made_again(halves, zero):
    kept = [halves(f"dp=2,zero={zero},recompute={how}").saved_bytes for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_a_smaller_fraction_keeps_less(halves):
    none, most, least = (halves(f"dp=2{how}").saved_bytes for how in ("", ",recompute=0.6", ",recompute=0.3"))
    assert none > most > least > 0
