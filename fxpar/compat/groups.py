"""What PyTorch knows of the process groups of a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


@functools.cache
def before_groups_end(tell: Callable[[ProcessGroup], None]) -> None:
    """Have ``tell(group)`` called before a process group is shut down or aborted, whoever asks for it."""
    for name in ("shutdown", "abort"):
        setattr(ProcessGroup, name, _told(getattr(ProcessGroup, name), tell))


def _told(end: Callable[..., None], tell: Callable[[ProcessGroup], None]) -> Callable[..., None]:
    @functools.wraps(end)
    def told(group: ProcessGroup) -> None:
        tell(group)
        end(group)

    return told
