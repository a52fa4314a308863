"""What masks that depend on inputs are made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpar.compiler import compile_program
from fxpar.ops.vocabulary import SDPA
from fxpar.sharding.facts import global_value
from fxpar.testing import assert_equivalent

LENGTH = 16


def causal():
    at = torch.arange(LENGTH)
    return at[None] <= at[:, None]


def window():
    at = torch.arange(LENGTH)
    return at[None] > at[:, None] - 4


MASKS = {
    "padding": (lambda ids, seen: seen[:, None, None, :].expand(-1, 1, LENGTH, LENGTH), "valid"),
    "causal and padding": (lambda ids, seen: causal() & seen[:, None, None, :], "causal valid"),
    "packed": (lambda ids, seen: ids[:, None, :, None] == ids[:, None, None, :], "segments"),
    "causal and packed": (lambda ids, seen: causal()[None, None] & (ids[:, None, :, None] == ids[:, None, None, :]),
                          "causal segments"),
    "keys first": (lambda ids, seen: (ids[:, None, None, :] == ids[:, None, :, None]) & causal(), "causal segments"),
    "a window in two": (lambda ids, seen: causal() & (window() & seen[:, None, None, :]), "causal window valid"),
    "all": (lambda ids, seen: causal() & (ids[:, None, :, None] == ids[:, None, None, :]) & seen[:, None, None, :],
            "causal segments valid"),
}  # fmt: skip
OTHER = {
    "or": lambda ids, seen: causal() | seen[:, None, None, :],
    "another comparison": lambda ids, seen: causal() & (ids[:, None, :, None] >= ids[:, None, None, :]),
    "of queries": lambda ids, seen: causal() & seen[:, None, :, None],
    "a window alone": lambda ids, seen: window() & seen[:, None, None, :],
    "heads apart": lambda ids, seen: (causal() & seen[:, None, None, :]).expand(-1, 4, -1, -1).clone() & seen[:, None, None, :],
}


class Attention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.embed, self.qkv, self.mask = nn.Embedding(24, 16), nn.Linear(16, 48), mask

    def forward(self, x, ids, seen):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.embed(x)).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(ids, seen)).square().mean()


def built(mask):
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 5 + [1] * 11, [3] * 16, [7] + [8] * 15, list(range(16))])
    seen = torch.ones(4, LENGTH, dtype=torch.bool)
    seen[1, 10:] = seen[3, 2] = False
    return Attention(mask), {"x": torch.randint(24, (4, LENGTH)), "ids": ids, "seen": seen}


def sight(mask):
    found = []

    def look(name, program):
        if name == "sights":
            found.extend(global_value(n.args[3]).sight for n in program.graph.nodes if n.target is SDPA)

    compile_program(*built(mask)[:1], "dp=1", built(mask)[1], observe=look)
    return found[0]


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_says(name):
    made, words = MASKS[name]
    found = sight(made)
    have = {"causal": found.causal, "window": found.window, "segments": found.q_segments, "valid": found.valid}
    assert " ".join(k for k, v in have.items() if v) == words and found.window in (None, 4)
    assert (found.q_segments is None) == (found.kv_segments is None)


@pytest.mark.parametrize("name", OTHER)
def test_what_it_may_say_besides_is_no_sight(name):
    assert sight(OTHER[name]) is None


@pytest.mark.parametrize("name, comm", [("all", "p2p"), ("padding", "a2a"), ("a window in two", "allgather"),
                                        ("of queries", "p2p"), ("keys first", "a2a")])  # fmt: skip
def test_equivalence(name, comm):
    mask = OTHER[name] if name in OTHER else MASKS[name][0]
    model, batch = built(mask)
    assert_equivalent(model, f"dp=2,cp=2,cp_comm={comm}", batch)
