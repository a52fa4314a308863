"""A small model and its batches, for tests of recordings: a table, blocks with dropout, and a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput


class Block(nn.Module):
    def __init__(self, width: int, between: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, between), nn.Linear(between, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.silu(self.up(self.norm(x)))))


class Blocks(nn.Module):
    """Its head comes behind a batch norm, which has buffers."""

    def __init__(self, words: int, width: int, between: int, count: int):
        super().__init__()
        self.table, self.blocks = nn.Embedding(words, width), nn.ModuleList([Block(width, between) for _ in range(count)])
        self.scale, self.head = nn.BatchNorm1d(width), nn.Linear(width, words)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.scale(x.transpose(1, 2)).transpose(1, 2))
        return CausalLMOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def tokens(seed: int, rows: int, length: int, words: int) -> dict[str, Tensor]:
    """A batch for it, or for any causal model of so many words."""
    ids = torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}
