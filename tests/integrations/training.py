"""A small language model, rows whose labels are many or few, and the loops of several libraries over them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxpar
from fxpar.verify.equivalence import GRADIENT_TOLERANCE, LOSS_TOLERANCE, NOISE

ROWS, BATCH = 48, 8


def build(dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, attention_dropout=dropout, bos_token_id=None, eos_token_id=None))


def rows(count: int = ROWS) -> list[dict[str, Tensor]]:
    """Counting from somewhere, with anything from one label to all that are asked for."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for start, hidden in torch.randint(0, 13, (count, 2), generator=generator).tolist():
        ids = (torch.arange(16) * (1 + start % 2) + start) % 32
        made.append({"input_ids": ids, "labels": torch.where(torch.arange(16) < hidden, -100, ids)})
    return made


def batch(of: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in of]) for name in of[0]}


def parallel(model: Any, plan: str) -> Any:
    return fxpar.parallelize(model, plan, batch(rows()[: BATCH // fxpar.Plan.parse(plan).dp]))


def as_torchrun(rank: int) -> None:
    """What libraries ask the environment for, of a rank whose process group is there."""
    world = torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT="29999", GROUP_RANK="0", TORCHELASTIC_RUN_ID="test")


def weights(folder: Path) -> dict[str, Tensor]:
    """What `from_pretrained` makes of a folder."""
    from transformers import LlamaForCausalLM

    return dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())


def same_lines(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """What was logged is equal: norms as gradients are everywhere, all else (losses, scores, rates) as losses are."""
    assert [line.keys() for line in got] == [line.keys() for line in want]
    for mine, of_one in zip(got, want):
        for name, value in of_one.items():
            rtol = GRADIENT_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            torch.testing.assert_close(mine[name], value, rtol=rtol, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def same_change(got: dict[str, Tensor], want: dict[str, Tensor], before: dict[str, Tensor] | None = None) -> None:
    """Weights have moved alike, as closely as gradients agree everywhere. They moved by sums of gradients: the optimizer was SGD.

    before: where they began; None: those of `build()`.
    Adam would divide each element by its own size, so that those which are zero but for rounding move by as much as others, and
    those of two right runs differently.
    """
    before = dict(build().named_parameters()) if before is None else before
    assert got.keys() == want.keys()
    moved = {name: (want[name] - before[name]).norm() for name in want}
    largest = max(moved.values())
    assert largest > 0
    for name, size in moved.items():
        apart = (got[name] - want[name]).norm()
        assert apart <= GRADIENT_TOLERANCE * size + NOISE * largest, (name, apart / size)
