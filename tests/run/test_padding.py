"""Batches of many lengths: replicas pad to the longest, programs are few and bounded, and numbers are those of one device."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fxpar
from fxpar.run import programs
from tests.processes import launch
from tests.run.test_module import full, gradients

pytestmark = pytest.mark.multiproc


class Tagger(nn.Module):
    """A class for every token, from the tokens that a mask shows to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.attention = nn.Embedding(16, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.table(input_ids)
        hidden = None if attention_mask is None else attention_mask == 0
        y = self.head(x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
        return nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten())


def batch(length: int, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(1, 16, (rows, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids.flip(1)}


def whole(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of all replicas as one, padded by PyTorch."""
    rows = [{k: v[i] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    return {"input_ids": pad_sequence(ids, True), "labels": pad_sequence(labels, True, -100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True)}


def trained(rank: int, plan: str, lengths: list[tuple[int, int]], pad: Any, rows: int = 2) -> Any:
    """Losses and gradients of batches, of which replicas have other lengths; which were captured; what was said of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("fxpar")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    module = fxpar.parallelize(Tagger(), plan, batch(lengths[0][0]), backend="eager", pad=pad)
    alive = weakref.WeakSet(program.module for program in module._engine.programs.values())
    losses = []
    for pair in lengths:
        loss = module(**batch(pair[module.replica], rows))
        loss.backward()
        losses.append(full(loss).item())
        alive.update(program.module for program in module._engine.programs.values())
    gc.collect()
    return losses, gradients(module), len(alive), said


def want(lengths: list[tuple[int, int]], replicas: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = Tagger(), []
    for pair in lengths:
        loss = model(**whole([batch(length) for length in pair[:replicas]]))
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


def same(have: Any, lengths: list[tuple[int, int]], replicas: int = 2) -> None:
    losses, grads = want(lengths, replicas)
    torch.testing.assert_close(have[0], losses, rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(have[1][name], grad, rtol=1e-5, atol=1e-6)


def test_replicas_of_other_lengths_pad_to_the_longest():
    lengths = [(5, 9), (12, 3), (1, 2)]
    for have in launch(2, trained, "dp=2", lengths, 4):
        same(have, lengths)
        assert have[2] == 3  # of 8 tokens, as the example is, of 12, and of 4


def differing(rank: int, flat: bool) -> str:
    module = fxpar.parallelize(Tagger(), "dp=2", batch(4), backend="eager", pad=4)
    given = batch(5) | ({"attention_mask": torch.ones(2, 5, dtype=torch.long)} if rank else {})
    if rank and flat:  # which are no sequences
        given = {name: x.flatten() for name, x in given.items()}
    try:
        module(**given)
    except fxpar.MismatchError as error:
        return str(error)
    return ""


def failing(rank: int) -> str:
    module = fxpar.parallelize(Tagger(), "dp=2", batch(4), backend="eager", pad=4)
    given = batch(5) | ({"attention_mask": torch.ones(2, 1, 5, dtype=torch.long)} if rank else {})
    try:
        module(**given)
    except fxpar.FxparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
def test_mistakes_of_one_rank_are_errors_on_all():
    for text in [*launch(2, differing, False), *launch(2, differing, True)]:
        assert "with other sequences to pad: rank 0 with ['input_ids', 'labels'], rank 1 with [" in text
    texts = launch(2, failing)
    assert texts[1].startswith("InputError: padding: input 'attention_mask'")
    assert texts[0].startswith("FxparError: rank 1 could not take part")


@pytest.mark.slow
@pytest.mark.parametrize("plan, replicas", [("dp=2", 2), ("tp=2", 1)])
def test_forty_batches_of_forty_lengths(plan, replicas):
    """Without padding each is a program, of which so many are kept; with it there are few. Each is said, with what it took."""
    lengths = [(n, n) for n in torch.randperm(40, generator=torch.Generator().manual_seed(0)).add(1).tolist()]
    for rank, have in enumerate(launch(2, trained, plan, lengths, None)):
        same(have, lengths, replicas)
        assert have[2] == programs.MOST
        assert sum("is ready after" in line for line in have[3]) == (0 if rank else 40)
    for have in launch(2, trained, plan, lengths, 16):
        same(have, lengths, replicas)
        assert have[2] == 3


@pytest.mark.slow
def test_a_last_smaller_batch_is_as_large_as_the_others():
    lengths = [(5, 9), (7, 6)]
    for have in launch(2, trained, "dp=2", lengths, {"multiple_of": 4, "rows": 6}):
        same(have, lengths)
        assert have[2] == 2  # of 12 and of 8 tokens
