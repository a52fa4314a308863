"""step_feed: what a rank of a pipeline takes in a step, as one list of tensors, so that the step can be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxpar import compat
from fxpar.program import Program, Source
from fxpar.run.feed import value_of
from fxpar.run.store import ParameterStore

Key = tuple[str, str]
"""Kind and name of a source."""


class StepFeed:
    """Of the stages that one rank holds.

    programs: theirs. written: names of the buffers that the step writes to. Parameters, buffers and what else is the same in all
    microbatches are in the list once. fixed: which of the list stay where they are, from step to step.
    """

    def __init__(self, programs: Sequence[Program], store: ParameterStore, written: Sequence[str]):
        self.store = store
        self._sources: dict[Key, Source] = {(s.kind, s.name): s for p in programs for s in p.sources if s.kind != "received"}
        self._staying = [s for s in self._sources.values() if s.stays]
        self._written = [name for name in dict.fromkeys(written) if ("buffer", name) not in self._sources]
        self._at: dict[Key, list[int]] = {}
        self._others: dict[Key, Any] = {}
        self.fixed: list[bool] = []

    def __call__(self, microbatches: Sequence[dict[str, Any]], seed: int) -> list[Tensor]:
        """The list. microbatches: what each takes besides parameters and what it receives, by name. seed: what dropout draws
        from."""
        flat: list[Tensor] = []
        self.fixed, self._at, self._others = [], {}, {}
        for key, source in self._sources.items():
            passed = source.kind in ("input", "microbatch")
            of_each = passed and any(m[source.name] is not microbatches[0][source.name] for m in microbatches)
            values = [value_of(source, self.store.places, self.store.device, m, seed)
                      for m in (microbatches if of_each else microbatches[:1])]
            if not isinstance(values[0], Tensor):
                self._others[key] = values[0]
                continue
            self._at[key] = list(range(len(flat), len(flat) + len(values)))
            flat += values
            self.fixed += [source.stays] * len(values)
        self.fixed += [True] * len(self._written)
        return [*flat, *(self.store.tensor(name) for name in self._written)]

    def of_stage(self, program: Program, flat: Sequence[Tensor], microbatches: int) -> list[list[Any]]:
        """The inputs of a stage's program, but for what it receives, for each microbatch. flat: the list that was made last, or
        one like it."""
        keys = [(s.kind, s.name) for s in program.sources if s.kind != "received"]
        places = [self._at.get(key, ()) for key in keys]
        return [[flat[at[i if len(at) > 1 else 0]] if at else self._others[key] for key, at in zip(keys, places, strict=True)]
                for i in range(microbatches)]

    def addresses(self) -> list[int]:
        """Where that is now which stays, in the order of the list; 0 for what is gone."""
        found = [s.value if s.kind == "constant" else self._held(s.name) for s in self._staying]
        found += map(self._held, self._written)
        return [0 if x is None else x.data_ptr() for x in found]

    def _held(self, name: str) -> Tensor | None:
        table, key = self.store.places.get(name, ({}, name))
        found = table.get(key)
        return found if found is None or name not in self.store.layouts else compat.memory(found)
