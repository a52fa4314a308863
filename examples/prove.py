"""Prove that a model of your own trains the same under several plans as on one device.

    python examples/prove.py                    the plans below
    python examples/prove.py dp=2,tp=4 tp=8     plans of your choice

Every rank of a plan runs in this one process; no GPU is needed.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

import fxpar
import fxpar.testing

PLANS = [fxpar.Plan(dp=2), fxpar.Plan(tp=2), fxpar.Plan(dp=2, tp=2), fxpar.Plan(dp=2, tp=4)]


class Tagger(nn.Module):
    """One attention layer and one MLP that label every token: ordinary PyTorch, nothing about parallelism."""

    def __init__(self, vocab=64, hidden=32, heads=4, labels=16):
        super().__init__()
        self.heads = heads
        self.embed, self.norm = nn.Embedding(vocab, hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.head = nn.Linear(hidden, labels)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


torch.manual_seed(0)
batch = dict(tokens=torch.randint(64, (4, 16)), labels=torch.randint(16, (4, 16)))
for plan in [fxpar.Plan.parse(text) for text in sys.argv[1:]] or PLANS:
    # Compares the loss and every gradient; where one differs, the error names the first value that does.
    fxpar.testing.assert_equivalent(Tagger(), plan, batch)
    print(f"{plan}: equal to one device")
