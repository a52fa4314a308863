"""replica: which part of the data a rank is to pass in."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, DistributedSampler

from fxpar.run.module import ParallelModule


def sampler(dataset: Dataset[Any], module: ParallelModule, *, shuffle: bool = True, seed: int = 0,
            drop_last: bool = False) -> DistributedSampler[Any]:
    """A sampler for a `DataLoader` that gives every rank its replica's part of the data: the ranks of a replica the same.

    It is PyTorch's `DistributedSampler`, whose defaults give every *rank* another part. dataset: all of the data. module: what
    `fxpar.parallelize` returned, for its replicas. shuffle, seed, drop_last: as there; call its `set_epoch` before each epoch.
    Raises: `TypeError` for another module.
    """
    if not isinstance(module, ParallelModule):
        raise TypeError(f"fxpar.sampler takes what fxpar.parallelize returned, not {type(module).__name__}")
    replica = module.replica
    return DistributedSampler(dataset, replica.count, replica.index, shuffle=shuffle, seed=seed, drop_last=drop_last)
