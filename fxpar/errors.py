"""Every error fxpar raises on purpose.

All derive from `FxparError`. Each says what is wrong, where, and a way out; what it says is also kept as
attributes, for programs. All can be pickled (a worker process can hand one to its parent), which is why those
with several parts keep them as `args` and make the text in `__str__`.
"""

from __future__ import annotations


class FxparError(Exception):
    """Base of all errors that fxpar raises on purpose."""


def brief(value: object) -> str:
    """The `repr` of whatever a user gave, short enough for a message; Python itself refuses to spell very large numbers."""
    try:
        text = repr(value)
    except ValueError:
        return f"<a {type(value).__name__} that is too large to show>"
    return text if len(text) <= 200 else f"{text[:100]}...{text[-20:]}"


class PlanError(FxparError, ValueError):
    """A plan contradicts itself, the world size or the model.

    field: the plan's field, a Megatron flag (it starts with `-`), "args" (of those flags), or "world_size".
    value: what it was.
    requirement: what it must satisfy, as in "must divide dp = 4".
    suggestion: something that works, as in "tp=2", or None where nothing can be said.
    """

    def __init__(self, field: str, value: object, requirement: str, suggestion: str | None = None) -> None:
        super().__init__(field, value, requirement, suggestion)
        self.field, self.value, self.requirement, self.suggestion = field, value, requirement, suggestion

    def __str__(self) -> str:
        kind = "Megatron flag" if self.field.startswith("-") else "plan field"
        text = f"{kind} `{brief(self.field)[1:-1]}`={brief(self.value)}: {self.requirement}"
        return f"{text}; try {self.suggestion}" if self.suggestion and len(self.suggestion) <= 200 else text


class _SourceError(FxparError):
    """An error about one place in the user's model.

    what: is wrong; where: the user's "file:line", or None; way_out: what to change, or None.
    """

    verb = ""

    def __init__(self, what: str, where: str | None = None, way_out: str | None = None) -> None:
        super().__init__(what, where, way_out)
        self.what, self.where, self.way_out = what, where, way_out

    def __str__(self) -> str:
        text = f"{self.verb} {self.what}"
        if self.where:
            text += f" (at {self.where})"
        return f"{text}; {self.way_out}" if self.way_out else text


class CaptureError(_SourceError):
    """The model cannot be captured as a graph; `what` names the thing that could not be."""

    verb = "cannot capture"


class UnsupportedOperator(_SourceError):
    """The model uses an operator for which fxpar knows no sharding rule; `what`, or `op`, is its name."""

    verb = "no sharding rule for operator"

    @property
    def op(self) -> str:
        """The operator's name, as in "aten.unique.default"."""
        return self.what


class InputError(FxparError, ValueError):
    """The inputs given to a call do not fit: their number, names, shapes or dtypes."""


class MismatchError(FxparError):
    """Ranks that must agree do not: in their plan, their program, or the batch of one replica."""


class EquivalenceError(FxparError, AssertionError):
    """The parallel run's values differ from the single-device model's."""


class CheckpointError(FxparError):
    """A checkpoint cannot be written or read; raised on all ranks alike.

    what: is wrong; where: the folder or file; way_out: what to do, or None where nothing can be said.
    """

    def __init__(self, what: str, where: str, way_out: str | None = None) -> None:
        super().__init__(what, where, way_out)
        self.what, self.where, self.way_out = what, where, way_out

    def __str__(self) -> str:
        text = f"checkpoint {self.where}: {self.what}"
        return f"{text}; {self.way_out}" if self.way_out else text
