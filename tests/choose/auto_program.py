"""A step under the plan that `plan="auto"` takes, on every rank: ``torchrun -m tests.choose.auto_program``."""

from __future__ import annotations

import json

import torch

import fxpar
from tests.choose.models import WIDTH, Blocks

ROWS = 4


def whole() -> torch.Tensor:
    """The batch of two replicas."""
    return torch.randn(2 * ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def main() -> None:
    torch.manual_seed(0)
    module = fxpar.parallelize(Blocks(), "auto", (torch.empty(ROWS, WIDTH),), backend="eager")
    loss = module(whole().chunk(module.replica.count)[module.replica])
    loss.backward()
    gradient = next(iter(module.parameters())).grad.full_tensor().sum().item()
    print(json.dumps([str(module.plan), loss.item(), gradient]), flush=True)


if __name__ == "__main__":
    main()
