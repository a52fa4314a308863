"""A gather whose parts arrive one by one, so that what is computed with each can start when it is there.

    started = gather_parts(x, ranks, group)        this rank's part is in its place, the others' are under way
    first = next_part(started)                     as `started`, once the part of the next rank has arrived
    whole = next_part(first)                       and of the one after that, in `arrivals`' order; the last one is the gathered x

Each `next_part` returns its operand itself, as `wait_tensor` does. By which way parts travel is the group's business: a
`PartsGroup` has one of its own, any other one exchanges them by an all-to-all for each distance between ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar import compat

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("gather_parts(Tensor x, int ranks, str group) -> Tensor")
_library.define("next_part(Tensor(a!) started) -> Tensor(a!)")
_library.define("await_part(Tensor started) -> ()")
GATHER_PARTS = torch.ops.fxpar.gather_parts.default
NEXT_PART = torch.ops.fxpar.next_part.default
AWAIT_PART = torch.ops.fxpar.await_part.default
"""What `NEXT_PART` does before it returns its operand: how compiled code calls it."""

_under_way: dict[int, deque[Any]] = {}
"""Address of a tensor whose parts are under way -> what is to be waited for, in order."""


class PartsGroup(dist.ProcessGroup):
    """A process group that has a way of its own to gather in parts."""

    def gather_parts(self, parts: Sequence[Tensor], x: Tensor) -> list[dist.Work]:
        """Start to gather: parts[r], of one tensor, becomes rank r's x; this rank's is written at once, in the order of the
        current stream. Returns what is to be waited for, for the other ranks' parts in the order of `arrivals`."""
        raise NotImplementedError


def arrivals(rank: int, ranks: int) -> list[int]:
    """The other ranks in the order in which their parts arrive at `rank`: each rank begins with another one."""
    return [(rank + k) % ranks for k in range(1, ranks)]


def shift_splits(rank: int, ranks: int, distance: int, rows: int) -> tuple[list[int], list[int]]:
    """The sizes of what an all-to-all receives and sends that moves `rows` rows from each rank to the one `distance` before it
    (behind it, if negative)."""
    received, sent = [0] * ranks, [0] * ranks
    received[(rank + distance) % ranks] = sent[(rank - distance) % ranks] = rows
    return received, sent


@torch.library.impl(_library, "gather_parts", "CompositeExplicitAutograd")
def _gather_parts(x: Tensor, ranks: int, group: str) -> Tensor:
    found = compat.collective_group(group)
    x = x.contiguous()
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    parts = out.chunk(ranks)
    if isinstance(found, PartsGroup):
        works = found.gather_parts(parts, x)
    else:
        rank = found.rank()
        parts[rank].copy_(x)
        works = []
        for distance, peer in enumerate(arrivals(rank, ranks), 1):
            splits = shift_splits(rank, ranks, distance, x.shape[0])
            works.append(dist.all_to_all_single(parts[peer], x, *splits, group=found, async_op=True))
    _under_way[out.data_ptr()] = deque(works)
    return out


@torch.library.impl(_library, "next_part", "CompositeExplicitAutograd")
def _next_part(started: Tensor) -> Tensor:
    _await_part(started)
    return started


@torch.library.impl(_library, "await_part", "CompositeExplicitAutograd")
def _await_part(started: Tensor) -> None:
    works = _under_way[started.data_ptr()]
    works.popleft().wait()
    if not works:
        del _under_way[started.data_ptr()]


@torch.library.register_fake("fxpar::gather_parts", lib=_library)
def _fake_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    return x.new_empty(ranks * x.shape[0], *x.shape[1:])


@torch.library.register_fake("fxpar::next_part", lib=_library)
def _fake_next(started: Tensor) -> Tensor:
    return started


@torch.library.register_fake("fxpar::await_part", lib=_library)
def _fake_await(started: Tensor) -> None:
    return None
