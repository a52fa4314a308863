"""Masks of rows of no expert: which of them go, and that no value or gradient changes by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.ops.experts import expert_product
from fxpar.testing import assert_equivalent

B, S, H, E, K = 4, 6, 16, 4, 2
MASK = torch.ops.aten.masked_fill.Scalar


class Masked(nn.Module):
    """A router that sends some rows nowhere, whose rows `mix` masks."""

    def __init__(self, mix: Callable, first: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = nn.Linear(H, E), nn.Linear(H, H)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) / 4), nn.Parameter(torch.randn(E, 2 * H, H) / 4)
        self.mix, self.first = mix, first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, H)
        scores, experts = self.router(tokens).softmax(-1).topk(K, -1)
        experts = torch.where(scores < 0.3, E, experts).flatten()
        order = experts.argsort(stable=True)
        numbers = experts[order]
        ends = torch.histc(numbers.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
        none = (numbers >= self.first).unsqueeze(-1)
        rows = self.mix(self, tokens[order // K], none, ends) * scores.flatten()[order][:, None]
        made = torch.zeros_like(tokens).index_add(0, order // K, rows)
        return (self.head(made.view_as(x) + x) ** 2).mean()


def around_products(model: Masked, rows: Tensor, none: Tensor, ends: Tensor) -> Tensor:
    """What Hugging Face's models do."""
    up = F.grouped_mm(rows.masked_fill(none, 0), model.up, offs=ends).masked_fill(none, 0.0)
    return F.grouped_mm(F.silu(up), model.down, offs=ends).masked_fill(none, 0)


def after_more(model: Masked, rows: Tensor, none: Tensor, ends: Tensor) -> Tensor:
    up = (F.grouped_mm(rows, model.up, offs=ends) + 1).masked_fill(none, 0)
    return (F.grouped_mm(up, model.down, offs=ends) + 1).masked_fill(none, 0)


def read_elsewhere(model: Masked, rows: Tensor, none: Tensor, ends: Tensor) -> Tensor:
    rows = rows.masked_fill(none, 0)
    return F.grouped_mm(F.silu(F.grouped_mm(rows, model.up, offs=ends)), model.down, offs=ends).masked_fill(none, 0) + rows


def another_number(model: Masked, rows: Tensor, none: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(F.grouped_mm(rows, model.up, offs=ends).masked_fill(none, 2), model.down, offs=ends).masked_fill(none, 2)


MASKS = {
    "around products": (around_products, E, 0),
    "some experts as well": (around_products, E - 1, 3),
    "after more": (after_more, E, 1),
    "read elsewhere": (read_elsewhere, E, 1),
    "another number": (another_number, E, 2),
}
"""Which mix, the first number that is masked, and how many masks stay."""


@pytest.mark.parametrize("mix, first, stay", MASKS.values(), ids=list(MASKS))
def test_masks_go_where_products_have_zeros_already(mix, first, stay):
    found: list[object] = []
    fxpar.compile_program(Masked(mix, first), "dp=1", {"x": torch.randn(B, S, H)}, observe=lambda name, program: found.extend(
        node.target for node in program.graph.nodes) if name == "unmask" else None)
    assert found.count(expert_product) == 2 and found.count(MASK) == stay


@pytest.mark.parametrize("mix, first, stay", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "dp=2,ep=2", "dp=2,ep=2,ep_dispatch=allgather"])
def test_nothing_changes_by_it(mix, first, stay, plan):
    assert_equivalent(Masked(mix, first), plan, {"x": torch.randn(B, S, H)})
