"""sight: which keys of a block the queries of a block see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ids:
    """What decides by content who sees whom; each is None, or has a row for every sequence of the batch (or one row for all).

    q [b, lq], k [b, lk]: integers; a query sees the keys of its own segment. valid [b, lk]: booleans; other keys nobody sees.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    valid: Tensor | None = None

    def __bool__(self) -> bool:
        return self.k is not None or self.valid is not None

    def of(self, rows: slice, keys: slice) -> Ids:
        """Those of a part."""
        k, valid = (None if t is None else t[:, keys] for t in (self.k, self.valid))
        return Ids(None if self.q is None else self.q[:, rows], k, valid)

    def with_keys(self, k: Tensor | None, valid: Tensor | None) -> Ids:
        """The same queries and other keys."""
        return Ids(self.q, k, valid)


@dataclass(frozen=True)
class Sight:
    """shift: None, or query i sees no key behind i + shift. window: None, or query i sees no key before i + shift - window + 1
    (with a shift alone). ids: see `Ids`."""

    shift: int | None = None
    window: int | None = None
    ids: Ids = Ids()

    def simplified(self, queries: int, keys: int) -> Sight:
        """The same for blocks of these lengths, without what limits nothing."""
        shift, window = self.shift, self.window
        if shift is not None and window is not None and queries - 1 + shift - window < 0:
            window = None
        if shift is not None and window is None and shift >= keys - 1:
            shift = None
        return replace(self, shift=shift, window=window)

    def reach(self, rows: slice, keys: int) -> slice:
        """The keys, of so many, that any of these queries may see."""
        if self.shift is None:
            return slice(0, keys)
        first = 0 if self.window is None else rows.start + self.shift - self.window + 1
        return slice(max(0, first), max(0, min(keys, rows.stop + self.shift)))

    def mask(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """[b or 1, 1, rows, keys], true where a query sees a key; None if all see all."""
        seen: Tensor | None = None
        if self.shift is not None:
            last = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.shift
            key = torch.arange(keys.start, keys.stop, device=device)
            seen = (key <= last)[None]
            if self.window is not None:
                seen &= key > last - self.window
        ids = self.ids.of(rows, keys)
        if ids.k is not None:
            assert ids.q is not None
            same = ids.q[:, :, None] == ids.k[:, None, :]
            seen = same if seen is None else seen & same
        if ids.valid is not None:
            seen = ids.valid[:, None, :].expand(-1, rows.stop - rows.start, -1) if seen is None else seen & ids.valid[:, None, :]
        return None if seen is None else seen[:, None]
