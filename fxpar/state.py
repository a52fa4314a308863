"""state: what the programs of a model depend on besides their inputs, compared at every call.

Compared are the parts of the model (submodules and parameters, by identity, and the kind of every buffer), their modes and which
parameters are trained, hooks of modules, and the attributes that the forward looked at when it was captured (`fxpar.reads`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from operator import call, is_
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.errors import InputError
from fxpar.feed import Place
from fxpar.mesh import Mesh
from fxpar.passes.layout import Tiling
from fxpar.program import Program
from fxpar.reads import CONTAINERS, MISSING, Reads, Slot, content, same
from fxpar.storage import placements

MOST = 32
"""Programs that are kept of one model."""

MANY = 8
"""Programs of one model, beyond which it is said what they differ in."""

PARTS = 3
"""Where in the key of a program the number of the model's parts is."""

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
        self._seen: list[_Values] = []
        self._look()

    def key(self) -> tuple:
        """(modes, what is trained and of which dtype, parts, hooks, attributes)"""
        self._parts_or_look()
        modes = tuple([module.training for module in self.modules])
        trained = tuple(compat.want_gradients(self._parameters))
        return modes, trained, self._count[0], self._hook_number(), self._attribute_number()

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
        return buffers, [None if b is None else (b.shape, b.dtype) for b in buffers]

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
                self._change(0, "a buffer was exchanged for one of another shape or dtype")

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
        self._seen = [_Values(values, number), *self._seen[: KNOWN - 1]]
        return number

    def _difference(self, seen: _Values, values: list[Any]) -> str:
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


class _Values:
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


def places(model: nn.Module, before: Mapping[str, Place], tilings: dict[str, Tiling], mesh: Mesh) -> dict[str, Place]:
    """Where the parameters and buffers of a model are whose parts have changed; `tilings` of parameters that were moved is
    completed.

    before: where they were. Raises: `InputError` for a parameter that was put in and has no layout.
    """
    names = {id(table[key]): name for name, (table, key) in before.items()
             if name in tilings and isinstance(table.get(key), DTensor)}
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        for key, p in module._parameters.items():
            name = f"{path}.{key}".strip(".")
            found[name] = module._parameters, key
            tiles = tilings.get(names.get(id(p), name))
            if p is not None and (tiles is None or not isinstance(p, DTensor) or p.dim() != len(tiles)
                                  or list(p.placements) != placements(tiles, mesh)):
                raise InputError(
                    f"parameter {name!r} was put into the model after it was made parallel: it is not laid out over the ranks; "
                    "change the model first, and call fxpar.parallelize on the plain model (fxpar.save_checkpoint and "
                    "fxpar.load_checkpoint carry what was trained over)")
            if p is not None and tiles is not None:
                tilings[name] = tiles
        found |= {f"{path}.{key}".strip("."): (module._buffers, key) for key in module._buffers}
    return found


def least_used(programs: Mapping[tuple, Program], compiled: Iterable[tuple]) -> tuple:
    """The key of the program that was not used for longest. compiled: keys of what runs them (theirs and one more), least
    recently used first."""
    used = {key[:-1]: i for i, key in enumerate(compiled)}
    return min(programs, key=lambda key: used.get(key, -1))


def note(count: int, new: tuple, old: tuple, changed: list[str]) -> str:
    """What to say where `count` programs of one model were captured. new, old: keys of two. changed: `State.changed`."""
    inputs = [f"input {a[0]!r} ({_plain(b)}, then {_plain(a)})" for a, b in zip(new[0], old[0], strict=False) if a != b]
    words = {1: "the mode of submodules", 2: "which parameters are trained", 3: f"the parts of the model ({changed[0]})",
             4: changed[1], 5: f"an attribute that the forward reads ({changed[2]})", 6: "autocast",
             7: "what earlier calls left in attributes"}
    what = inputs[:4] + [text for i, text in words.items() if new[i] != old[i]] or ["which inputs are given"]
    kept = f" The {MOST} used last are kept; others are captured again when they are called." if count == MOST else ""
    return (f"{count} programs of this model were captured, each of which took as long as the first; the newest differs from the "
            f"one before in {', '.join(what)}. What is computed with, and changes often, is a tensor that is passed in, or a "
            f"buffer, better than a Python value.{kept}")


def _plain(part: tuple) -> str:
    return f"{part[2]} {list(part[1])}" if len(part) > 2 else str(part[1])
