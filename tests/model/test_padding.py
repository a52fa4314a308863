"""Batches made longer: what is added counts nowhere, and what is not understood is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpar
from fxpar import InputError
from fxpar.model.padding import Padding

IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
WORDS = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": IDS}


def test_labels_are_ignored_and_masks_are_zero():
    made = fxpar.pad(WORDS, 4)
    assert made["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert made["labels"].tolist() == [[5, 6, 7, -100], [8, 9, 0, -100]]
    assert [*made] == [*WORDS] and WORDS["labels"].shape == (2, 3)


@pytest.mark.parametrize("options, length", [({}, 3), ({"multiple_of": 3}, 3), ({"multiple_of": 2}, 4), ({"length": 7}, 7),
                                             ({"multiple_of": 4, "length": 5}, 8), ({"length": 2}, 3)])
def test_lengths(options, length):
    assert {t.shape for t in fxpar.pad(WORDS, **options).values()} == {(2, length)}


def test_a_mask_is_added_where_there_is_none_whether_or_not_anything_is_padded():
    batch = {"input_ids": IDS, "labels": IDS}
    assert fxpar.pad(batch, 4)["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2
    assert fxpar.pad(batch, 3)["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert "attention_mask" not in fxpar.pad(batch, 4, mask=None)
    assert fxpar.pad(batch, 4, mask="seen")["seen"].sum() == 6


def test_sequences_of_other_lengths_are_padded_each_by_itself():
    made = fxpar.pad({"input_ids": IDS, "labels": torch.ones(2, 5, dtype=torch.long)}, 4)
    assert made["input_ids"].shape == made["attention_mask"].shape == (2, 4) and made["labels"].shape == (2, 8)


def test_what_is_put_in_can_be_chosen_and_other_dims_named():
    batch = {"idx": IDS, "targets": IDS, "table": torch.ones(3, 2), "pixels": torch.ones(2, 3)}
    made = fxpar.pad(batch, 4, mask=None, values={"targets": -1, "idx": 9}, dims={"table": 0, "pixels": None})
    assert made["targets"][:, 3].tolist() == [-1, -1] and made["idx"][:, 3].tolist() == [9, 9]
    assert made["table"].tolist() == [[1, 1]] * 3 + [[0, 0]] and made["pixels"] is batch["pixels"]


@pytest.mark.parametrize("more", [{"inputs_embeds": torch.ones(2, 3, 8)}, {"bias": torch.ones(2, 1, 3, 3)},
                                  {"weights": torch.ones(2, 3)}])
def test_what_may_go_along_a_sequence_is_not_passed_over(more):
    (name,) = more
    with pytest.raises(InputError, match=rf"input '{name}' .* is as long in dim \d as 'input_ids'.*dims="):
        fxpar.pad(WORDS | more, 4)
    assert fxpar.pad(WORDS | more, 4, dims={name: None})[name] is more[name]


def test_rows_of_padding_have_no_labels_and_attend_to_themselves():
    batch = WORDS | {"scale": 2.0, "weights": torch.ones(2)}
    made = fxpar.pad(batch, 4, rows=3)
    assert made["labels"][2].tolist() == [-100] * 4 and made["attention_mask"][2].tolist() == [1] * 4
    assert made["input_ids"].shape == (3, 4) and made["weights"].tolist() == [1, 1, 0] and made["scale"] == 2.0
    assert fxpar.pad(WORDS, rows=2).keys() == WORDS.keys()
    classes = {"input_ids": IDS, "labels": torch.tensor([1, 0])}
    assert fxpar.pad(classes, 4, rows=3)["labels"].tolist() == [1, 0, -100]


@pytest.mark.parametrize("batch, options, text", [
    (WORDS, {"rows": 1}, "2 rows is larger than rows=1"),
    ({"input_ids": IDS}, {"rows": 3}, "only to a batch with labels"),
    ({"input_ids": IDS, "labels": torch.ones(2)}, {"rows": 3}, "labels 'labels' of dtype torch.float32 have no value"),
    ({"input_ids": IDS, "labels": IDS.bool()}, {"multiple_of": 4}, "labels 'labels' of dtype torch.bool have no value"),
    (WORDS, {"multiple_of": 0}, "multiple_of=0 must be"), (WORDS, {"multiple_of": 4.0}, "multiple_of=4.0 must be"),
    (WORDS, {"rows": True}, "rows=True must be"),
])  # fmt: skip
def test_what_cannot_be_padded_is_refused(batch, options, text):
    with pytest.raises(InputError, match=text):
        fxpar.pad(batch, **options)


@pytest.mark.parametrize("given, text", [({"multiple": 4}, "unexpected keyword argument 'multiple'.*it takes multiple_of"),
                                         ("4", "multiple_of='4'"), (-1, "multiple_of=-1")])
def test_options_of_parallelize_are_checked(given, text):
    with pytest.raises(InputError, match=text):
        Padding.of(given)


def test_numbers_are_those_of_the_batch_as_it_was():
    def loss(logits: Tensor, labels: Tensor) -> Any:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    table = torch.randn(10, 10)
    made = fxpar.pad(WORDS, 4, rows=5)
    assert loss(table[made["input_ids"]], made["labels"]) == loss(table[IDS], IDS)


def test_what_masks_in_numbers_is_asked_for():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(InputError, match=r"mask 'attention_mask' of dtype torch.float32 may be one to multiply by or one to add"):
        fxpar.pad(batch, 4)
    padded = fxpar.pad(batch, 4, values={"attention_mask": float("-inf")})
    assert padded["attention_mask"].tolist() == [[0, 0, 0, float("-inf")]] * 2
