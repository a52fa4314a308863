"""Which attention with dropout is one operator, and which is written out, and noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.ops.dropout_attention import dropout_attention, use_kernels
from fxpar.ops.rng import dropout_mask
from fxpar.program import Program

LENGTH = 6
PLACE = torch.arange(LENGTH)


class Attends(nn.Module):
    """mask: a function of its parameter and of how far keys are behind queries. wide: the elements of a head."""

    def __init__(self, mask: Any = None, wide: int = 4, **options: Any) -> None:
        super().__init__()
        self.mask, self.wide, self.options = mask, wide, {"dropout_p": 0.25, **options}
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, self.wide)).permute(2, 0, 3, 1, 4)
        mask = None if self.mask is None else self.mask(self.slope, PLACE[:, None] - PLACE)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options).square().mean() * self.slope


def program_of(model: Attends) -> tuple[Program, dict[str, Any]]:
    """The program, and the options of its attention with dropout; none where it is written out."""
    program = fxpar.compile_program(model, "dp=1", {"x": torch.randn(2, LENGTH, 3 * 2 * model.wide)})
    made = [n for n in program.graph.nodes if n.target is dropout_attention]
    written_out = [n for n in program.graph.nodes if n.target is dropout_mask]
    assert len(made) + len(written_out) == 1
    return program, dict(made[0].kwargs) if made else {}


@pytest.mark.parametrize("model, options", [
    (Attends(), {}),
    (Attends(is_causal=True, scale=0.3), {"is_causal": True, "scale": 0.3}),
    (Attends(lambda slope, behind: behind >= 0), {"is_causal": True}),
    (Attends(lambda slope, behind: (behind >= 0) & (behind < 2)), {"window": 2}),
    (Attends(wide=128), {}),
])  # fmt: skip
def test_is_one_operator(model, options):
    program, found = program_of(model)
    assert found.pop("p") == 0.25 and found.pop("site") == 0 and found.pop("grid")
    assert found == options and not [n for n in program.notes if "dropout" in n]


def test_other_masks_stay():
    _, found = program_of(Attends(lambda slope, behind: behind.abs() < 2))
    assert isinstance(found["attn_mask"], torch.fx.Node)


@pytest.mark.parametrize("model, why", [
    (Attends(lambda slope, behind: slope * behind), "its mask has a gradient"),
    (Attends(wide=144), "wider than 128"),
    (Attends(dropout_p=1.0), "all weights drop out"),
])  # fmt: skip
def test_is_written_out_and_noted(model, why):
    program, found = program_of(model)
    assert not found
    (note,) = (n for n in program.notes if "attention with dropout" in n)
    assert why in note and "test_dropout.py" in note


@pytest.mark.parametrize("model", [
    Attends(), Attends(is_causal=True, scale=0.3), Attends(lambda slope, behind: behind.abs() < 2), Attends(wide=144),
    Attends(lambda slope, behind: slope * behind), Attends(lambda slope, behind: (behind >= 0) & (behind < 2)),
])  # fmt: skip
def test_is_written_out_where_users_say_so(dropout_written_out, model):
    program, found = program_of(model)
    assert not found and not [n for n in program.notes if "all scores" in n]


@pytest.mark.parametrize("mask", [None, lambda slope, behind: (behind >= 0) & (behind < 2)])
def test_both_ways_are_the_same_numbers(dropout_written_out, mask):
    """Of one captured model, which is traced again when the setting changes."""
    inputs = {"x": torch.randn(2, LENGTH, 24)}
    captured, found = fxpar.capture(Attends(mask), inputs), []
    for on in (True, False):
        use_kernels(on)
        found.append(fxpar.simulate(captured, "dp=2").step(**inputs, seed=5))
        assert [n.target for n in captured.partition("dp=1").graph.nodes].count(dropout_attention) == on
    torch.testing.assert_close(found[0].loss, found[1].loss)
    torch.testing.assert_close(found[0].grads, found[1].grads)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.drop(self.linear(x)).square().sum() * scale


def test_the_last_input_is_no_tensor():
    inputs = {"x": torch.randn(4, 4), "scale": 3.0}
    model = Switched()
    torch.testing.assert_close(*(fxpar.simulate(model, plan, inputs).step(**inputs, seed=1).loss for plan in ("dp=1", "dp=2")))
