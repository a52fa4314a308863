"""padding: batches made longer, so that batches of many lengths are calls of few shapes, each of which is compiled once.

What is added is marked as padding: labels of it are ignored, and masks say that nobody attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxpar.errors import InputError, brief

IGNORED = -100
"""The label that PyTorch's cross-entropy ignores unless it is told another one."""
LABELS, MASK = ("label", "labels", "targets"), "mask"
"""How the names of labels, and of masks, end."""


@dataclass(frozen=True)
class Padding:
    """How a batch is made longer; see `pad` for the fields."""

    multiple_of: int = 1
    rows: int | None = None
    dims: Mapping[str, int | None] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    mask: str | None = "attention_mask"

    def __post_init__(self) -> None:
        for name, least in (("multiple_of", self.multiple_of), ("rows", 1 if self.rows is None else self.rows)):
            if type(least) is not int or least < 1:
                raise InputError(f"padding: {name}={brief(least)} must be a positive integer")

    @classmethod
    def of(cls, given: Padding | Mapping[str, Any] | int) -> Padding:
        """What a user gave: the multiple alone, or fields by name."""
        if isinstance(given, Padding):
            return given
        try:
            return cls(**given) if isinstance(given, Mapping) else cls(given)
        except TypeError as error:
            raise InputError(f"padding {brief(given)}: {error}; it takes multiple_of, rows, dims, values and mask") from error

    def lengths(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Name of each sequence -> the length that it is to have, by this batch alone."""
        found = {name: dim for name, value in batch.items() if (dim := self._dim(name, value)) is not None}
        self._check(batch, found)
        return {name: -(-batch[name].shape[dim] // self.multiple_of) * self.multiple_of for name, dim in found.items()}

    def padded(self, batch: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
        """The batch with sequences of these lengths, as many rows as were asked for, and a mask."""
        batch = dict(batch)
        leads = [name for name in lengths if not name.endswith((*LABELS, MASK))]
        if self.mask is not None and self.mask not in batch and leads:
            ids, dim = batch[leads[0]], self._dim(leads[0], batch[leads[0]]) or 0
            rows, length = ids.shape[0], ids.shape[dim]
            batch[self.mask] = torch.ones(rows, length, dtype=torch.int64, device=ids.device)
            lengths = {**lengths, self.mask: lengths[leads[0]]}
        rows = next((batch[name].shape[0] for name in lengths), None)
        out = {name: self._longer(name, batch[name], lengths[name]) if name in lengths else value
               for name, value in batch.items()}
        return out if self.rows is None or rows is None else self._more_rows(out, rows)

    def _dim(self, name: str, value: Any) -> int | None:
        """The dim of a sequence that is padded; None for what is left alone."""
        if name in self.dims or not isinstance(value, Tensor):
            return self.dims.get(name) if isinstance(value, Tensor) else None
        counts = not value.is_floating_point() and not value.is_complex()
        return 1 if value.dim() == 2 and (counts or name.endswith(MASK)) else None

    def _check(self, batch: Mapping[str, Any], found: Mapping[str, int]) -> None:
        """That nothing is left alone which seems to go along a sequence."""
        lengths: dict[int, str] = {}
        for name, at in found.items():
            if batch[name].shape[at] > 1:
                lengths.setdefault(batch[name].shape[at], name)
        for name, value in batch.items():
            if name in found or name in self.dims or not isinstance(value, Tensor):
                continue
            dim = next((d for d in range(1, value.dim()) if value.shape[d] in lengths), None)
            if dim is not None:
                other = lengths[value.shape[dim]]
                raise InputError(f"padding: input {name!r} {list(value.shape)} is as long in dim {dim} as {other!r}, and may "
                                 f"have to be padded along with it; say so, dims={{{name!r}: {dim}}}, or that it is not, "
                                 f"dims={{{name!r}: None}}")

    def _value(self, name: str, value: Tensor) -> float:
        """What is put where nothing was."""
        chosen = self.values.get(name, IGNORED if name.endswith(LABELS) else 0)
        if name.endswith(MASK) and name not in self.values and value.is_floating_point():
            raise InputError(f"padding: mask {name!r} of dtype {value.dtype} may be one to multiply by or one to add; say what "
                             f"masks in it, values={{{name!r}: 0}} or values={{{name!r}: float(\"-inf\")}}")
        if name.endswith(LABELS) and name not in self.values and (value.is_floating_point() or not value.dtype.is_signed):
            raise InputError(f"padding: labels {name!r} of dtype {value.dtype} have no value that a loss ignores; say "
                             f"values={{{name!r}: ...}}, or dims={{{name!r}: None}} if they are no sequence")
        return chosen

    def _longer(self, name: str, value: Tensor, length: int) -> Tensor:
        dim = 1 if name not in self.dims else self.dims[name]
        assert dim is not None
        return _grown(value, dim, length, self._value(name, value))

    def _more_rows(self, batch: dict[str, Any], rows: int) -> dict[str, Any]:
        assert self.rows is not None
        if rows > self.rows:
            raise InputError(f"padding: a batch of {rows} rows is larger than rows={self.rows}")
        along = {n: v for n, v in batch.items() if isinstance(v, Tensor) and v.dim() and v.shape[0] == rows}
        if not any(name.endswith(LABELS) for name in along):
            raise InputError("padding: rows can be added only to a batch with labels, which say that a row does not count; it "
                             f"has {', '.join(map(repr, batch))}")
        # A row that attends to nothing has no softmax: rows of padding attend to themselves.
        fills = {name: 1 if name.endswith(MASK) else self._value(name, value) for name, value in along.items()}
        return {name: _grown(value, 0, self.rows, fills[name]) if name in fills else value for name, value in batch.items()}


def _grown(value: Tensor, dim: int, size: int, fill: float) -> Tensor:
    shape = list(value.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([value, value.new_full(shape, fill)], dim) if shape[dim] else value


def pad(batch: Mapping[str, Any], multiple_of: int = 1, *, length: int = 0, rows: int | None = None,
        dims: Mapping[str, int | None] | None = None, values: Mapping[str, float] | None = None,
        mask: str | None = "attention_mask") -> dict[str, Any]:
    """A batch with longer sequences, so that batches of many lengths have few shapes, each of which is compiled once.

    batch: keyword arguments of a model's forward. Its sequences are its tensors ``[rows, tokens]`` of integers or booleans, and
    those with a name that ends in "mask"; each becomes as long as the next multiple of `multiple_of`, and at least `length`. What
    is added comes last: labels (a name that ends in "label", "labels" or "targets") are -100, which losses ignore, and all else,
    masks among it, is 0. rows: add rows of padding to all inputs that have the batch's rows in dim 0, so that a last, smaller
    batch is as large as the others; their labels are ignored, and they attend to themselves. What looks at several rows at once
    (batch norm, a loss that balances experts) sees them.
    dims: name of an input -> its dim that is the sequence, or None: it is none. values: what is put into inputs, by name.
    mask: a mask of this name, 1 for what was there, is added where there is none. None: it is not, for a causal model, in which
    nothing that counts attends to what comes after it.
    Raises: `InputError`, also for an input of which nobody said whether it is to be padded.
    """
    how = Padding(multiple_of, rows, dims or {}, values or {}, mask)
    least = -(-length // multiple_of) * multiple_of
    return how.padded(batch, {name: max(own, least) for name, own in how.lengths(batch).items()})
