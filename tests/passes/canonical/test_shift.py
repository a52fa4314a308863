"""Losses that leave out the last token."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpar
from fxpar.sharding.facts import full_value, local_value
from fxpar.testing import assert_equivalent

VOCAB, SEQ = 24, 8


class Head(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.embed, self.head, self.loss = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), loss

    def forward(self, ids):
        return self.loss(self.head(torch.tanh(self.embed(ids))), ids)


SHIFTED = {
    "view": lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, VOCAB), y[:, 1:].reshape(-1)),
    "contiguous": lambda x, y: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, VOCAB), y[..., 1:].contiguous().view(-1)),
    "sum": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum"),
    "smooth": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), label_smoothing=0.1),
    "ignored": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=3),
    "backwards": lambda x, y: F.cross_entropy(x[:, 1:].flatten(0, 1), y[:, :-1].flatten()),
    "wide": lambda x, y: F.cross_entropy(x[:, :-1].bfloat16().float().flatten(0, 1), y[:, 1:].flatten()),
}
OTHER = {
    "two": lambda x, y: F.cross_entropy(x[:, :-2].flatten(0, 1), y[:, 2:].flatten()),
    "each": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="none").square().mean(),
    "classes": lambda x, y: F.cross_entropy(x[..., :-1].flatten(0, 1), y.flatten().clamp(max=VOCAB - 2)),
}


def built(loss):
    torch.manual_seed(0)
    return Head(loss), {"ids": torch.randint(VOCAB, (4, SEQ))}


@pytest.mark.parametrize("name", [*SHIFTED, *OTHER])
def test_values_and_gradients_stay(name):
    model, batch = built({**SHIFTED, **OTHER}[name])
    assert_equivalent(model, "dp=2,tp=2", batch)


def sliced(loss):
    """Whether logits are cut."""
    model, batch = built(loss)
    program = fxpar.capture(model, batch).partition("dp=1")
    return any(n.target is torch.ops.aten.slice.Tensor and full_value(n).shape[-1] in (VOCAB, VOCAB - 1)
               for n in program.graph.nodes if local_value(n).full is not None)


@pytest.mark.parametrize("name", SHIFTED)
def test_logits_are_not_cut(name):
    assert not sliced(SHIFTED[name])


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_shift_by_one_stays(name):
    assert sliced(OTHER[name])
