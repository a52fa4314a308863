"""A long logsumexp in parts, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxpar
import fxpar.testing
from fxpar.backends.trace import tensor_inputs_only
from fxpar.ops.logsumexp import LONGEST, SHORTEST, logsumexp
from fxpar.report import memory
from tests import zoo
from tests.graphs import local_feed

INF, NAN = float("inf"), float("nan")


@settings(max_examples=40)
@given(st.lists(st.integers(1, 3), max_size=2), st.sampled_from([1, 32, 33, 128]), st.sampled_from([31, 32, 50, 64]),
       st.sampled_from([0.1, 5.0, 300.0]), st.integers(0, 9))
def test_values_and_gradients_are_those_of_torch(rows, a, b, spread, seed):
    torch.manual_seed(seed)
    x = (spread * torch.randn(*rows, a * b, dtype=torch.float64)).requires_grad_()
    have, want = logsumexp(x), torch.logsumexp(x, -1)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, weight) for y in (have, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("put", [
    [(slice(None), -INF)], [(slice(0, LONGEST), -INF)], [(7, INF)], [(slice(None), INF)], [(3, NAN)], [(3, -INF), (9, INF)]])
def test_rows_that_are_not_finite(put):
    x = torch.randn(LONGEST * SHORTEST)
    for where, value in put:
        x[where] = value
    x.requires_grad_()
    have, want = logsumexp(x), torch.logsumexp(x, -1)
    torch.testing.assert_close(have, want, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (have, want)), equal_nan=True)


class Spread(torch.nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.head = torch.nn.Linear(4, classes)

    def forward(self, x):
        return torch.logsumexp(self.head(x), -1).sum()


@pytest.mark.parametrize("classes, cut", [(LONGEST * SHORTEST, True), (LONGEST * SHORTEST + 1, False), (LONGEST, False)])
def test_a_fused_program_cuts_long_rows_only(classes, cut):
    model, batch = Spread(classes), {"x": torch.randn(2, 4)}
    program = fxpar.compile_program(model, "dp=1", batch)
    feed = local_feed(program, model, batch)
    names = []
    for fused in (True, False):
        module, keep = tensor_inputs_only(program.module, feed, fused=fused)
        loss = module(*(feed[i] for i in keep))[0]
        torch.testing.assert_close(loss, model(**batch))
        names.append("_InParts" in str(torch.autograd.graph.get_gradient_edge(loss).node.next_functions))
    assert names == [cut, False]


class Masked(torch.nn.Module):
    """A loss over classes, some of which are excluded."""

    def __init__(self, excluded: slice):
        super().__init__()
        self.head = torch.nn.Linear(4, 64, bias=False)
        mask = torch.zeros(64)
        mask[excluded] = -INF
        self.register_buffer("mask", mask)

    def forward(self, x):
        return torch.logsumexp((self.head(x) + self.mask).float(), -1).mean()


@pytest.mark.parametrize("excluded", [slice(0, 0), slice(0, 5), slice(0, 32), slice(32, 64), slice(0, 63)])
@pytest.mark.parametrize("plan", ["tp=2", "dp=2,tp=2", "tp=4"])
def test_ranks_that_hold_parts_of_the_classes(plan, excluded):
    torch.manual_seed(0)
    fxpar.testing.assert_equivalent(Masked(excluded), plan, {"x": torch.randn(4, 4)})


def test_split_over_ranks_nothing_as_large_as_the_logits_is_kept_in_float32():
    model, batch = zoo.build("llama")
    program = fxpar.compile_program(model, "tp=2,param_dtype=bf16,outputs=loss", batch)
    forward = memory.trace(program)[0][0]
    mine = model.config.vocab_size // 2
    kept = [n.meta["val"] for n in forward.output_node().all_input_nodes if n.op == "call_function"]
    assert [t.dtype for t in kept if t.shape[-1:] == (mine,)] == [torch.bfloat16]
