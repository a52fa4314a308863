"""state: what the programs of a model depend on besides their inputs, compared at every call.

Compared are the parts of the model (submodules and parameters, by identity, and the kind of every buffer), their modes and
which parameters are trained, hooks of modules, and the attributes that the forward looked at when it was captured (see
`fxpar.model.reads`).
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import call, is_
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.model.reads import CONTAINERS, MISSING, Reads, Slot, content, same

TRAINED, PARTS = 2, 3
"""Where in the key of a program it says which parameters are trained, and the number of the model's parts is."""

KNOWN = 32
"""States of hooks and of attributes that are told apart from new ones."""


class State:
    """The state of a model: `key` is equal where programs may be shared.

    Parts, hooks and attributes are numbers in it, which count the changes that were seen: the same on ranks that saw the same.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.changed = ["as it was captured first"] * 3
        self._count = [0, 0, 0]
        self._hooks: list[tuple[list[Any], int]] = []
        self._slots: list[Slot] = []
        self._getters: list[Any] = []
        self._names: list[str] = []
        self._seen: list[_SlotValues] = []
        self._look()

    def key(self) -> tuple:
        """(modes, what is trained and of which dtype, parts, hooks, attributes)"""
        self._parts_or_look()
        modes = tuple([module.training for module in self.modules])
        trained = tuple(compat.want_gradients(self._parameters))
        return modes, trained, self._count[0], self._hook_number(), self._attribute_number()

    def have_gradients(self) -> tuple[bool, ...]:
        """Which of the parameters have one now."""
        return tuple([g is not None for g in compat.gradients(self._parameters)])

    def names(self, part: int) -> list[str]:
        """Of the submodules (0) or parameters (1) of `key`; of others what changed last."""
        if part == 0:
            return list(self._paths)
        if part == 1:
            return [f"{path}.{key}".strip(".") for path, m in zip(self._paths, self.modules, strict=True)
                    for key, p in m._parameters.items() if p is not None]
        return [self.changed[part - 2]]

    def add(self, reads: Reads) -> None:
        """A program was captured that looked at these attributes, as they are now. What was captured before looked at none of
        those that are new: to it, their value of now is as good as any."""
        kept = [i for i, s in enumerate(self._slots) if not reads.leaves_out(s)]
        if len(kept) < len(self._slots):
            self._slots = [self._slots[i] for i in kept]
            for seen in self._seen:
                seen.keep(kept)
        known = {(id(s.holder), s.name) for s in self._slots}
        new = [s for s in reads.slots(self.model) if (id(s.holder), s.name) not in known]
        values = [s.get(s.name, MISSING) for s in new]
        self._slots += new
        self._getters, self._names = [s.get for s in self._slots], [s.name for s in self._slots]
        for seen in self._seen:
            seen.extend(values)

    # ---- parts ----

    def _look(self) -> None:
        self._paths, self.modules = map(list, zip(*self.model.named_modules(), strict=True))
        self._tables = [t for m in self.modules for t in (m._modules, m._parameters)]
        self._buffers = [m._buffers for m in self.modules]
        self._hook_tables = [t for m in self.modules for t in compat.hooks(m)]
        self._parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        self._parts = self._parts_now()
        self._dtypes = compat.dtypes(self._parameters)
        self._kinds = self._kinds_now()

    def _parts_now(self) -> tuple[list[int], list[str], list[Any]]:
        tables = self._tables
        return list(map(len, tables)), list(chain.from_iterable(tables)), list(chain.from_iterable(map(dict.values, tables)))

    def _kinds_now(self) -> tuple[list[Any], list[Any]]:
        buffers = list(chain.from_iterable(map(dict.values, self._buffers)))
        return buffers, [None if b is None else (b.shape, b.dtype, b.layout) for b in buffers]

    def _parts_or_look(self) -> None:
        lengths, names, values = self._parts
        now = self._parts_now()
        if now[0] != lengths or now[1] != names or not all(map(is_, now[2], values)) or \
                compat.dtypes(self._parameters) != self._dtypes:
            alike = now[:2] == (lengths, names) and _alike(values, now[2])
            paths = set(self.names(0) + self.names(1))
            self._look()
            if alike:
                return
            differ = sorted(paths.symmetric_difference(self.names(0) + self.names(1))) or sorted(
                {n for n, a, b in zip(now[1], now[2], values, strict=False) if a is not b}) or ["the dtype of parameters"]
            self._change(0, f"changed: {', '.join(differ[:4])}")
            self._slots, self._getters, self._names, self._seen = [], [], [], []
            return
        buffers = list(chain.from_iterable(map(dict.values, self._buffers)))
        if len(buffers) != len(self._kinds[0]) or not all(map(is_, buffers, self._kinds[0])):
            before, self._kinds = self._kinds[1], self._kinds_now()
            if self._kinds[1] != before:
                self._change(0, "a buffer was exchanged for one of another shape, dtype or layout")

    def _change(self, part: int, text: str) -> int:
        self._count[part] += 1
        self.changed[part] = text
        return self._count[part]

    # ---- hooks and attributes ----

    def _hook_number(self) -> int:
        hooks: list[Any] = []
        if any(self._hook_tables):
            for i, table in enumerate(self._hook_tables):
                hooks += (i, *table.values()) if table else ()
        for values, number in self._hooks:
            if len(values) == len(hooks) and all(map(same, values, hooks)):
                return number
        number = 0
        if self._hooks:
            on = [path or "the model itself" for path, m in zip(self._paths, self.modules, strict=True) if any(compat.hooks(m))]
            number = self._change(1, f"hooks are on {', '.join(on[:4]) or 'no module'}")
        self._hooks = [(hooks, number), *self._hooks[: KNOWN - 1]]
        return number

    def _attribute_number(self) -> int:
        values = list(map(call, self._getters, self._names, repeat(MISSING)))
        for i, seen in enumerate(self._seen):
            if seen.match(values):
                if i:
                    self._seen.insert(0, self._seen.pop(i))
                    self.changed[2] = self._difference(self._seen[1], values)
                return seen.number
        number = 0
        if self._seen:
            number = self._change(2, self._difference(self._seen[0], values))
        self._seen = [_SlotValues(values, number), *self._seen[: KNOWN - 1]]
        return number

    def _difference(self, seen: _SlotValues, values: list[Any]) -> str:
        texts = [f"{s.text}: {_short(a)}, then {_short(b)}" for s, a, b in zip(self._slots, seen.values, values, strict=True)
                 if not same(a, b) and s.name]
        inside = [self._slots[i].text for i, was in seen.inside if content(values[i]) != was]
        return "; ".join(texts[:4]) or f"what is inside of {', '.join(inside[:4])}"


def _alike(before: list[Any], now: list[Any]) -> bool:
    """Whether parts differ in parameters alone that took the place of others laid out like them, tied as those were."""
    first: tuple[dict[int, int], dict[int, int]] = {}, {}
    for i, (a, b) in enumerate(zip(before, now, strict=True)):
        if first[0].setdefault(id(a), i) != first[1].setdefault(id(b), i):
            return False
        if a is not b and not (isinstance(a, DTensor) and isinstance(b, DTensor) and a.shape == b.shape and a.dtype == b.dtype
                               and a.device_mesh == b.device_mesh and a.placements == b.placements):
            return False
    return any(a is not b for a, b in zip(before, now, strict=True))


class _SlotValues:
    """Values of all slots, as they once were, and the number of that state."""

    def __init__(self, values: list[Any], number: int):
        self.values: list[Any] = []
        self.number = number
        self.inside: list[tuple[int, Any]] = []
        self.extend(values)

    def extend(self, values: list[Any]) -> None:
        start = len(self.values)
        self.values += values
        self.inside += [(start + i, content(v)) for i, v in enumerate(values) if isinstance(v, (Tensor, *CONTAINERS))]

    def keep(self, which: list[int]) -> None:
        """Forget the values of all other slots."""
        at = {i: k for k, i in enumerate(which)}
        self.values = [self.values[i] for i in which]
        self.inside = [(at[i], was) for i, was in self.inside if i in at]

    def match(self, values: list[Any]) -> bool:
        if not all(map(is_, self.values, values)):
            inside = {i for i, _ in self.inside}
            if not all(same(a, b) or (i in inside and type(a) is type(b) and not isinstance(a, Tensor))
                       for i, (a, b) in enumerate(zip(self.values, values, strict=True))):
                return False
        return all(content(values[i]) == was for i, was in self.inside)


def _short(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
