"""Mixtures of experts: which sorts are seen for what they are, and that their tokens are split where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.errors import PlanError
from fxpar.ops.collectives import typed
from fxpar.ops.experts import combine, expert_product, order_of, put_back, take_rows
from fxpar.sharding.facts import sharding_at
from fxpar.testing import assert_equivalent
from tests import zoo

B, S, H, E, K = 4, 6, 16, 5, 2


class Mixture(nn.Module):
    """A router, and experts whose rows `mix` sorts."""

    def __init__(self, mix: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.router, self.head = nn.Linear(H, H), nn.Linear(H, E), nn.Linear(H, H)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) / 4), nn.Parameter(torch.randn(E, 2 * H, H) / 4)
        self.bias, self.mix = nn.Parameter(torch.randn(E, 2 * H)), mix

    def product(self, rows: Tensor, experts: Tensor, count: Tensor) -> Tensor:
        ends = count.cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(rows, self.up, offs=ends) + self.bias[experts])
        return F.grouped_mm(hidden, self.down, offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.reshape(-1, H)
        scores, experts = self.router(tokens).softmax(-1).topk(K, -1)
        return (self.head(x + self.mix(self, tokens, scores, experts).view_as(x)) ** 2).mean()


def counted(experts: Tensor) -> Tensor:
    return torch.histc(experts.float(), E, 0, E - 1)


def by_index_add(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    token = order // K
    rows = model.product(x[token], flat[order], counted(flat)) * scores.flatten()[order][:, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def by_scatter_add(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
    """The way of indices that are widened; scores come in first, and what is added to is not zero."""
    sorted_experts, order = experts.flatten().sort()
    token = (order // K).reshape(-1, 1).expand(-1, H)
    rows = x.gather(0, token) * scores.flatten()[order].unsqueeze(-1)
    return x.scatter_add(0, token, model.product(rows, sorted_experts, counted(sorted_experts)))


def by_inverse(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
    sorted_experts, order = experts.flatten().sort(stable=True)
    rows = x.repeat_interleave(K, 0).index_select(0, order)
    rows = F.layer_norm(model.product(rows, sorted_experts, counted(sorted_experts)), [H]).view(-1, 2, H // 2).softmax(-1)
    rows = torch.cat(rows.flatten(1).chunk(2, -1)[::-1], -1)[order.argsort()]
    return (rows.view(-1, K, H) * scores[..., None]).sum(1)


def by_assignment(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
    """Counts of the sorted experts are read as well: those of the whole batch."""
    sorted_experts, order = experts.flatten().sort()
    count = counted(sorted_experts)
    rows = model.product(x[order // K], sorted_experts, count)
    back = torch.zeros_like(rows)
    back[order] = rows
    return (back.view(-1, K, H) * (1 + count.max() / count.sum()) * scores[..., None]).sum(1)


WAYS = [by_index_add, by_scatter_add, by_inverse, by_assignment]
COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bincount": lambda ids: torch.bincount(ids.flatten(), minlength=E),
    "one_hot": lambda ids: F.one_hot(ids, E).sum((0, 1)),
    "compared": lambda ids: (ids.flatten()[None] == torch.arange(E)[:, None]).sum(1),
    "ones": lambda ids: torch.zeros(E, dtype=torch.long).scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten())),
    "ones by index": lambda ids: torch.zeros(E).index_add(0, ids.flatten(), torch.ones(ids.numel())),
}  # fmt: skip
"""Ways to count how often each expert was chosen."""
MISCOUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of other numbers": lambda ids: torch.bincount(ids.flatten().flip(0) * 1, minlength=E),
    "of pairs": lambda ids: F.one_hot(ids, E).sum((0, 1)) * 1,
    "places from one": lambda ids: (ids.flatten()[None] + 1 == torch.arange(1, E + 1)[:, None]).sum(1),
    "from one": lambda ids: torch.ones(E, dtype=torch.long).scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten())) - 1,
    "of truths": lambda ids: (ids.flatten().bool().long()[None] == torch.arange(E)[:, None]).sum(1),
    "of the first experts alone": lambda ids: F.one_hot(ids, E)[:, :1].sum((0, 1)) + F.one_hot(ids, E)[:, 1:].sum((0, 1)),
}  # fmt: skip
"""Others, that count something else, or are not known to count the same."""


def counting(count: Callable[[Tensor], Tensor]) -> Callable:
    def mix(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        rows = model.product(x[order // K], flat[order], count(experts)) * scores.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // K, rows)

    return mix


def operators(mix: Callable) -> list[object]:
    """The targets of what the pass makes of a model."""
    found: list[object] = []
    fxpar.compile_program(Mixture(mix), "dp=1", {"x": torch.randn(B, S, H)}, observe=lambda name, program: found.extend(
        node.target for node in program.graph.nodes) if name == "experts" else None)
    return found


@pytest.mark.parametrize("mix", WAYS)
def test_a_sort_by_expert_is_found(mix):
    found = operators(mix)
    assert found.count(order_of) == found.count(put_back) + found.count(combine) == 1 and found.count(expert_product) == 2
    assert take_rows in found and not {torch.ops.aten.sort.default, torch.ops.aten.argsort.stable} & set(found)


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_experts_are_counted_in_other_ways(count):
    assert operators(counting(count)).count(expert_product) == 2
    assert_equivalent(Mixture(counting(count)), "dp=5,ep=5", {"x": torch.randn(5, S, H)})


@pytest.mark.parametrize("count", MISCOUNTS.values(), ids=MISCOUNTS)
def test_what_may_count_something_else_is_left_alone(count):
    assert expert_product not in operators(counting(count))


@pytest.mark.parametrize("mix", WAYS)
@pytest.mark.parametrize("plan", ["dp=2,tp=2,zero=3", "dp=2,microbatches=2"])
def test_a_part_of_the_tokens_is_a_part_of_the_result(mix, plan):
    assert_equivalent(Mixture(mix), plan, {"x": torch.randn(B, S, H)})


def test_compiled_and_in_stages():
    assert_equivalent(Mixture(by_inverse), "pp=2,microbatches=2", {"x": torch.randn(B, S, H)}, lowered=True)


def test_each_replica_has_its_own_tokens_alone():
    program = fxpar.compile_program(Mixture(by_inverse), "dp=2", {"x": torch.randn(B, S, H)})
    made = [typed(node) for node in program.graph.nodes if node.op == "call_function"]
    assert {c.kind for c in made if c is not None} <= {"vary", "psum"}
    (order,) = (node for node in program.graph.nodes if node.target is order_of)
    assert [piece.axes for piece in sharding_at(order)[0] if piece.axes] == [("dp",)]


# ---- what mixes rows ----


def changed(change: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """A mixture whose sorted rows are changed, by their order too."""

    def mix(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        sorted_experts, order = experts.flatten().sort()
        rows = model.product(x[order // K], sorted_experts, counted(sorted_experts))
        rows = change(rows, order) * scores.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // K, rows)

    return mix


MIXING = {
    "scores that were not sorted": lambda rows, order: rows * torch.linspace(0, 1, B * S * K)[:, None],
    "a softmax over rows": lambda rows, order: rows.softmax(0),
    "a running sum over rows": lambda rows, order: rows.cumsum(0),
    "the mean of all rows": lambda rows, order: rows - rows.mean(0),
    "rows beside others": lambda rows, order: rows + rows.flip(0),
    "rows turned into columns": lambda rows, order: (rows @ rows.T) @ rows / 9,
    "places in the order": lambda rows, order: rows * order[:, None] / 9,
    "half of the rows": lambda rows, order: torch.cat([rows[: B * S], rows[B * S :] * 2]),
}


@pytest.mark.parametrize("what", MIXING)
def test_an_operator_that_mixes_rows_is_left_alone(what):
    mix = changed(MIXING[what])
    assert order_of not in operators(mix)
    model, inputs = Mixture(mix), {"x": torch.randn(B, S, H)}
    assert_equivalent(model, "dp=2", inputs)
    with pytest.raises(PlanError, match=r"operator sort.*test_experts\.py.*all microbatches"):
        fxpar.compile_program(model, "microbatches=2", inputs)


def test_dropout_of_sorted_rows_is_left_alone():
    """Its mask follows from an element's place in the whole batch."""
    assert order_of not in operators(changed(lambda rows, order: F.dropout(rows, 0.5)))


def test_a_sort_from_the_last_is_left_alone():
    def mix(model: Mixture, x: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        order = experts.flatten().argsort(descending=True)
        return torch.zeros_like(x).index_add(0, order // K, x[order // K])

    assert order_of not in operators(mix)


# ---- whole models ----


@pytest.mark.parametrize("name, plan, lowered", [
    ("qwen3_moe", "dp=2,tp=2,zero=3,microbatches=2,recompute=full", False),
    *(pytest.param(name, plan, lowered, marks=pytest.mark.slow)
      for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe") for lowered in (False, True)
      for plan in ("dp=2,microbatches=2", "dp=2,pp=2,microbatches=2,schedule=zb1p", "dp=2,tp=2,zero=3,microbatches=2")),
])
def test_model(name, plan, lowered):
    model, inputs = zoo.build(name)
    assert_equivalent(model, plan, inputs, lowered=lowered)


def test_a_load_balancing_loss_is_an_estimate():
    model, inputs = zoo.build("mixtral")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 5:] = 0
    program = fxpar.compile_program(model, "microbatches=2", {**inputs, "output_router_logits": True})
    assert any("not linear in microbatches" in note and "modeling_mixtral" in note for note in program.notes)
    assert_equivalent(model, "dp=2,microbatches=2", {**inputs, "output_router_logits": True})
