"""What PyTorch knows of the process groups of a process."""

from __future__ import annotations

from typing import Any

import torch.distributed.distributed_c10d as c10d
from torch.distributed import ProcessGroup


def default_store() -> Any:
    """The store that the processes met at, through a connection of its own: one that waits holds up nobody else."""
    store: Any = c10d._get_default_store()
    return store.clone()


def process_groups() -> list[ProcessGroup]:
    """All process groups that this process is a member of, whoever made them."""
    return [group for group in list(c10d._world.pg_map) if isinstance(group, ProcessGroup)]
