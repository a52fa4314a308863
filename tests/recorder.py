"""A device for tests of recordings, on CPUs: what it plays back is run again, and all else in the pool overwritten."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxpar import compat


class Played:
    """A `fxpar.run.pool.Plays`. play: None when it is forgotten, with all that it would have played."""

    def __init__(self, device: Pretended, play: Callable[[], None]):
        self.device = device
        self.play: Callable[[], None] | None = play
        device.remembered += 1
        device.there.add(self)

    def __call__(self) -> None:
        assert self.play is not None, "it was forgotten"
        self.play()

    def forget(self) -> None:
        if self.play is not None:
            self.device.remembered -= 1
        self.play = None


class Pretended:
    """A `fxpar.run.pool.Device`. plays, records: how often. remembered: how many recordings were not forgotten. fails: what the
    next one raises. seconds: of host and GPU, and of the GPU that plays back, as they are told. taken: bytes, before and now;
    size: all there are. given_back: how often what is free was. others: those that have
    pools of their own. there: recordings that somebody has, forgotten or not."""

    beside = None

    def __init__(self, seconds: tuple[float, float, float] = (1.0, 1.0, 0.5), taken: tuple[int, int] = (100, 100),
                 size: int = 150):
        self.device = torch.device("cpu")
        self.plays = self.records = self.remembered = 0
        self.fails: Exception | None = None
        self._seconds, self._taken, self._size = seconds, taken, size
        self.given_back = 0
        self._memory: list[list[Tensor]] = []
        self.others: list[Pretended] = []
        self.there: weakref.WeakSet[Played] = weakref.WeakSet()

    def another(self) -> Pretended:
        self.others.append(Pretended(self._seconds, self._taken, self._size))
        return self.others[-1]

    @torch.no_grad()
    def record(self, code: compat.Code, inputs: list[Tensor]) -> tuple[list[Any], Played]:
        given = list(inputs)
        inputs.clear()
        if self.fails is not None:
            raise self.fails
        before = [x.clone() for x in given]
        outs = list(code(list(given)))
        for x, value in zip(given, before, strict=True):  # nothing has run
            if not torch.equal(x, value):
                x.copy_(value)
        in_pool = {compat.storage_of(x) for memory in self._memory for x in memory}
        own = {compat.storage_of(x) for x in given} - in_pool
        there = [_at_its_address(x) for x in given]
        mine = [i for i, x in enumerate(outs) if isinstance(x, Tensor) and compat.storage_of(x) not in own]
        memory = [outs[i] for i in mine]
        self._memory.append(memory)
        self.records += 1
        _spoil(memory)

        def play() -> None:
            self.plays += 1
            made = code(list(there))
            results = [made[i].clone() for i in mine]
            for each in self._memory:
                _spoil(each)
            for to, result in zip(memory, results, strict=True):
                to.copy_(result)

        return outs, Played(self, play)

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float, Callable[[], float]]:
        plays = self.plays
        made, (host, gpu, played) = run(), self._seconds
        return made, host, lambda: gpu if self.plays == plays else played

    def most(self) -> int:
        return self._taken[0]

    def taken(self) -> int:
        return self._taken[1]

    def size(self) -> int:
        return self._size

    def alive(self) -> int:
        return 0

    def give_back(self) -> None:
        self.given_back += 1

    def drawn(self) -> int:
        return torch.default_generator.get_state().sum().item()  # type: ignore[return-value]

    def occupied(self) -> str | None:
        return None


def _at_its_address(x: Tensor) -> Tensor:
    """What a recording has of a tensor, which it does not keep."""
    own = x.untyped_storage()
    storage = compat.storage_at(own.data_ptr(), own.nbytes(), x.device)
    return compat.tensor_in(storage, x.storage_offset(), x.shape, x.stride(), x.dtype)


@torch.no_grad()
def _spoil(memory: list[Tensor]) -> None:
    for x in memory:
        x.fill_(torch.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else -7)
