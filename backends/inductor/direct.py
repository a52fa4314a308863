"""direct: gathers and scatters that copies make, and waits for them, called by generated code as Python functions.

A function for one place in the code knows after its first call how large what it makes is, and has the rest done by addresses
(`CopyGroup.gather_at`, `scatter_at`). The members of a bucket are waited for by the first wait for any of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpar import compat
from fxpar.backends.inductor.casts import GATHER_CASTS
from fxpar.backends.transport.copies import CopyGroup
from fxpar.ops.vocabulary import GATHER, SCATTER, WAIT

c10d = torch.ops._c10d_functional

_under_way: dict[int, Bucket] = {}
"""Address of what was started, and is to be waited for -> what it was started with."""


class Bucket:
    """What was started together. It is waited for once, on the stream on which generated code runs."""

    __slots__ = ("work",)

    def __init__(self, work: Any):
        self.work = work

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()


def _await(x: Tensor) -> Tensor:
    """``wait_tensor``, of whatever started it."""
    bucket = _under_way.pop(x.data_ptr(), None)
    if bucket is not None:
        bucket.wait()
        return x
    with compat.below_autograd():
        return WAIT(x)


def _finished(failed: bool) -> None:
    """Raises: AssertionError if something that was started directly has not been waited for: no graph leaves that out."""
    if _under_way:
        left = len(_under_way)
        _under_way.clear()
        if not failed:
            raise AssertionError(f"{left} results of gathers or scatters were not waited for")


Start = Callable[[Any], Any]
"""What starts an operator for its first operand, those after it being known."""


def _at_each_place(make: Callable[..., Start]) -> Callable[[], Callable[..., Any]]:
    """What makes a function for one place in the code. make: is called with the first operands that come to it."""

    def function() -> Callable[..., Any]:
        start: Start | None = None

        def call(first: Any, *more: Any) -> Any:
            nonlocal start
            if start is None:
                start = make(first, *more)
            return start(first)

        return call

    return function


def _gather(operator: Any, several: bool) -> Callable[..., Start]:
    def make(first: Any, size: int, group: str) -> Start:
        found, like = compat.collective_group(group), first if several else [first]
        if not isinstance(found, CopyGroup):
            return lambda given: operator(given, size, group)
        start = _gathering(found, like, [x.dtype for x in like], size, [1] * len(like))
        return start if several else lambda given: start([given])[0]

    return make


def _gather_casts(first: list[Tensor], dtype: torch.dtype, size: int, group: str, counts: list[int]) -> Start:
    found = compat.collective_group(group)
    if not isinstance(found, CopyGroup):
        return lambda given: GATHER_CASTS(given, dtype, size, group, counts)
    return _gathering(found, first, [dtype] * len(first), size, counts)


def _gathering(group: CopyGroup, like: Sequence[Tensor], dtypes: Sequence[torch.dtype], size: int, counts: Sequence[int]
               ) -> Start:
    """Gathers tensors like these in other dtypes, `counts` of them at a time concatenated."""
    kinds = tuple([(x.numel(), dtype) for x, dtype in zip(like, dtypes, strict=True)])
    empty, each = compat.empty_like_code(like[0].device), iter(zip(like, dtypes, strict=True))
    made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
    places: list[tuple[int, int]] = []
    for number, count in enumerate(counts):
        members = list(itertools.islice(each, count))
        (first, dtype), rows = members[0], sum(x.shape[0] for x, _ in members)
        shape = (size * rows, *first.shape[1:])
        made.append((shape, _strides(shape), dtype))
        begins = itertools.accumulate((size * x.numel() * dtype.itemsize for x, _ in members[:-1]), initial=0)
        places += [(number, at) for at in begins]

    def rows_of(out: list[Tensor]) -> list[Tensor]:
        """Where each tensor comes to, a row for each rank."""
        flat = [x.view(-1) for x in out]
        begins = [(flat[i], at // dtype.itemsize, count) for (i, at), (count, dtype) in zip(places, kinds, strict=True)]
        return [x[at : at + size * count].view(size, -1) for x, at, count in begins]

    def start(given: list[Tensor]) -> list[Tensor]:
        out = [empty(*each) for each in made]
        addresses = [x.data_ptr() for x in out]
        work = group.gather_at(kinds, [addresses[i] + at for i, at in places], given, functools.partial(rows_of, out))
        _started(addresses, work)
        return out

    return start


def _scatter(operator: Any, several: bool) -> Callable[..., Start]:
    def make(first: Any, reduction: str, size: int, group: str) -> Start:
        found, like = compat.collective_group(group), first if several else [first]
        if not isinstance(found, CopyGroup):
            return lambda given: operator(given, reduction, size, group)
        shapes = [(x.shape[0] // size, *x.shape[1:]) for x in like]
        made = [(shape, _strides(shape), x.dtype) for shape, x in zip(shapes, like, strict=True)]
        kinds = tuple([(math.prod(shape), dtype) for shape, _, dtype in made])
        empty = compat.empty_like_code(like[0].device)

        def start(given: list[Tensor]) -> list[Tensor]:
            out = [empty(*each) for each in made]
            _started([x.data_ptr() for x in out], found.scatter_at(kinds, out, given))
            return out

        return start if several else lambda given: start([given])[0]

    return make


def _started(addresses: list[int], work: Any) -> None:
    bucket = Bucket(work)
    for address in addresses:
        if address:  # there is something at all
            _under_way[address] = bucket


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])


def _name(operator: Any) -> str:
    return f"{operator.namespace}.{operator.overloadpacket.__name__}"


def register() -> None:
    """Have quick bodies call what is here (see `fxpar.compat.call_directly`)."""
    compat.call_directly(_name(WAIT), lambda: _await)
    compat.call_directly(_name(GATHER_CASTS), _at_each_place(_gather_casts))
    for alone, together in ((GATHER, c10d.all_gather_into_tensor_coalesced), (SCATTER, c10d.reduce_scatter_tensor_coalesced)):
        make = _gather if alone is GATHER else _scatter
        compat.call_directly(_name(alone), _at_each_place(make(alone, several=False)))
        compat.call_directly(_name(together.default), _at_each_place(make(together.default, several=True)))
    compat.when_finished(_finished)
