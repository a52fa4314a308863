"""What computes nothing is dropped; lookups have dense gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpar
from fxpar.testing import assert_equivalent

IDS = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0))


class Lookup(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(16, 32)

    def forward(self, ids):
        logits = self.head(self.table(ids)).flatten(0, -2)
        return F.cross_entropy(logits, ids.flatten()[: logits.shape[0]])


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_become_dense_ones(table):
    torch.manual_seed(0)
    model = Lookup(table(32, 16, sparse=True))
    assert_equivalent(model, "dp=2", (IDS,))
    module = fxpar.parallelize(model, "dp=1", (IDS,))
    module(IDS).backward()
    assert not module.table.weight.grad.is_sparse
    assert any("sparse=True" in note and "test_simplify.py" in note for note in module.report().notes)
