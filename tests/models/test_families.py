"""Families of transformers, shrunk automatically, against the table of docs/support.md (see tests/support.py)."""

import pytest

from tests import support
from tests.zoo.families import FAMILIES

COMMITTED = support.committed()
SAMPLE = ["causal/gemma2", "causal/bloom", "causal/mamba", "masked/deberta-v2", "sequence-to-sequence/umt5", "image/convnext",
          "sound/wav2vec2"]
"""Quick ones that have little in common."""


def check(name):
    assert support.outcome(name) == COMMITTED[name], f"run python -m tests.support {name}"


def test_the_table_names_every_family():
    assert set(COMMITTED) == set(FAMILIES)
    text = support.FILE.read_text()
    assert support.table({n: COMMITTED[n] for n in FAMILIES}) in text


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in SAMPLE])
def test_family(name):
    check(name)
