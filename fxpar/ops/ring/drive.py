"""drive: what runs a generator that asks for transfers: over a process group, or those of all ranks in lock step.

A generator yields a `RingTransfer`, and is sent a handle at once; it yields the handle, and is sent what arrived.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Asking = Generator[Any, Any, T]
"""A generator that yields transfers and handles, and returns a T."""


@dataclass(frozen=True)
class RingTransfer:
    """Bytes that leave: `sent[i]` of them, in order, for rank i; `received[i]` arrive from it."""

    payload: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @classmethod
    def onwards(cls, payload: Tensor, rank: int, ranks: int) -> RingTransfer:
        """All of it to the next rank, and as much from the one before."""
        def only(index: int) -> tuple[int, ...]:
            return tuple(payload.numel() if i == index % ranks else 0 for i in range(ranks))

        return cls(payload, only(rank + 1), only(rank - 1))


def over_group(asking: Asking[T], group: Any) -> T:
    """Run it as a rank of `group`. On GPUs a transfer runs on the group's own stream while the kernels that follow compute."""
    answer: Any = None
    while True:
        try:
            asked = asking.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        if isinstance(asked, RingTransfer):
            arriving = asked.payload.new_empty(sum(asked.received))
            work = dist.all_to_all_single(arriving, asked.payload, list(asked.received), list(asked.sent), group, async_op=True)
            answer = work, arriving, asked.payload
        else:
            work, answer, _ = asked
            work.wait()


def lock_step(asking: Sequence[Asking[T]]) -> list[T]:
    """Run those of all ranks of a group, each to its next request before any goes on. Raises: AssertionError where they ask for
    different things."""
    answers: list[Any] = [None] * len(asking)
    while True:
        asked, results = [], []
        for each, answer in zip(asking, answers, strict=True):
            try:
                asked.append(each.send(answer))
            except StopIteration as done:
                results.append(done.value)
        kinds = {isinstance(a, RingTransfer) for a in asked}
        assert not (asked and results) and len(kinds) <= 1, "ranks ask for different things"
        if results:
            return results
        if isinstance(asked[0], RingTransfer):
            answers = _delivered(asked)
        else:
            answers = asked


def _delivered(transfers: Sequence[RingTransfer]) -> list[Tensor]:
    """What arrives at every rank."""
    parts = [t.payload.split(list(t.sent)) for t in transfers]
    arrived = [torch.cat([part[to] for part in parts]) for to in range(len(transfers))]
    for to, transfer in enumerate(transfers):
        assert transfer.received == tuple(part[to].numel() for part in parts), "a rank expects what is not sent"
    return arrived
