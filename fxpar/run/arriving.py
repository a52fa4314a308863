"""arriving: numbers that are computed where tensors are, and come to the host without that it waits for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_MASK, _ODD = 2**62 - 1, 0x2545F4914F6CDD1D


class Arriving:
    """Integers (tensors of no dims) that are on their way, in their order."""

    def __init__(self, numbers: Sequence[Tensor]):
        self._known = {i: int(n) for i, n in enumerate(numbers) if n.device.type != "cuda"}
        self._coming = [i for i in range(len(numbers)) if i not in self._known]
        self._arrived = torch.empty(0, dtype=torch.int64)
        self._event: torch.cuda.Event | None = None
        if self._coming:
            there = torch.stack([numbers[i] for i in self._coming])
            self._arrived = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._arrived.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(there.device))

    def here(self) -> list[int] | None:
        """None as long as a GPU has not come to them."""
        if self._event is not None and not self._event.query():
            return None
        return self.waited()

    def waited(self) -> list[int]:
        """Once they are here."""
        if self._event is not None:
            self._event.synchronize()
        found = {**self._known, **dict(zip(self._coming, self._arrived.tolist(), strict=True))}
        return [found[i] for i in range(len(found))]


def joined(numbers: Iterable[int]) -> int:
    """One number of 62 bits for several, in their order."""
    return functools.reduce(lambda number, each: (number * _ODD + each) & _MASK, numbers, 1)


@torch.no_grad()
def checksum(t: Tensor) -> Tensor:
    """A sum of the bytes of a tensor, as integers that are weighted by where they are, modulo 2^64."""
    flat = t.contiguous().reshape(-1)
    width = flat.element_size()
    whole = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(width, torch.int64))
    weights = torch.arange(1, whole.numel() + 1, device=whole.device) * 0x1E3779B97F4A7C15
    weights = (weights ^ (weights >> 32)) * 0x3F58476D1CE4E5B9  # not linear: what is moved shows
    return (whole.to(torch.int64) * weights).sum()


def _sums_in_floats(t: Tensor) -> bool:
    return t.is_floating_point() and t.element_size() > 1 and t.numel() > 0


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each the bits of its norm in float32, or of what has none (integers) the checksum: equal for equal tensors, and of
    floating-point numbers without a copy of any."""
    made: dict[int, Tensor] = {}
    for wide in (False, True):
        floats = {i: t for i, t in enumerate(tensors) if _sums_in_floats(t) and (t.dtype is torch.float64) == wide}
        if floats:
            found = torch._foreach_norm(list(floats.values()), 2, dtype=None if wide else torch.float32)
            made |= {i: number_bits(norm) for i, norm in zip(floats, found, strict=True)}
    return [made[i] if i in made else checksum(t) for i, t in enumerate(tensors)]


@torch.no_grad()
def weighted_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each the bits, in float32, of the sum of its elements with weights of their places, the same on every rank: copies of
    one norm that are not the same (in another order, with other signs) have other sums. 0 of what has no norm."""
    weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    made = []
    for t in tensors:
        if not _sums_in_floats(t):
            made.append(torch.zeros((), dtype=torch.int64, device=t.device))
            continue
        if (t.device, t.dtype) not in weights:
            weights[t.device, t.dtype] = _weights(_WIDTH, t.device).to(t.dtype)
        in_row, flat = weights[t.device, t.dtype], t.reshape(-1)
        rows = flat.numel() // _WIDTH
        end = flat[rows * _WIDTH :]
        with torch.autocast(t.device.type, enabled=False):
            total = torch.dot(end, in_row[: end.numel()]).float()
            if rows:
                of_rows = torch.mv(flat[: rows * _WIDTH].view(rows, _WIDTH), in_row).float()
                total = total + torch.dot(of_rows, _weights(rows, t.device))
        made.append(number_bits(total))
    return made


def _weights(count: int, device: torch.device) -> Tensor:
    """Numbers from -1 to 1, as a hash of the place has them."""
    places = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    return (((places ^ (places >> 29)) * 0x3F58476D1CE4E5B9 >> 40) & 0xFFFF).float() / 2**15 - 1


def number_bits(number: Tensor) -> Tensor:
    """The bits of one number in float32."""
    return number.float().reshape(()).view(torch.int32).to(torch.int64)


def norm_of(bits: int) -> float:
    """The norm again, from the bits that `norms` makes of it; or a number from those of `number_bits`."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


PLACES, _BLOCK, _WIDTH = 64, 2**20, 2**12


@torch.no_grad()
def sketch(t: Tensor) -> list[float]:
    """A few numbers, whose distance from those of another tensor of that shape is about the distance of the two tensors: each
    is the sum of some elements with signs that are drawn, the same on every rank."""
    made = torch.zeros(PLACES, dtype=torch.float64, device=t.device)
    for number, block in enumerate(t.detach().reshape(-1).split(_BLOCK)):
        generator = torch.Generator(t.device).manual_seed(number)
        signs = torch.randint(0, 2, (block.numel(),), generator=generator, device=t.device) * 2 - 1
        places = torch.randint(0, PLACES, (block.numel(),), generator=generator, device=t.device)
        made.index_add_(0, places, block.double() * signs)
    return made.tolist()
