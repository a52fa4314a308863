"""Agreement: ranks compare what they are about to run, so that a difference is an error on all of them and never a hang."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator

from fxpar.backends.transport.runtime import Control
from fxpar.errors import FxparError, MismatchError
from fxpar.program import Program
from fxpar.sharding.facts import local_value

PARTS = ("their inputs", "the mode (training) of submodule {}", "whether parameter {} wants gradients",
         "the parts of the model ({})", "hooks ({})", "attributes that the forward reads ({})", "autocast",
         "what earlier calls left in attributes", "grad mode")
"""What ranks compare of a call, in order; {} is the name of what differs."""
OF_KIND = (2,)
"""Those that are compared among ranks of one kind, which hold the same parameters."""


def digest(text: str) -> int:
    """A 62-bit fingerprint."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def agree_on_call(control: Control, key: tuple, names: Callable[[int], list[str]]) -> Callable[[], tuple[int, ...]]:
    """Start comparing what each rank was called with. What is returned ends it: it raises `MismatchError` on every rank
    unless all are the same; in what concerns parameters, all of its kind. That it returns of each kind, where there are several,
    as a fingerprint.

    key: in the order of `PARTS`. ``names(i)``: of what the values of part i, a tuple, belong to.
    """
    if control.kinds == 1:
        numbers = control.compare(digest(repr(key)))
    else:
        numbers = control.compare(digest(repr([p for i, p in enumerate(key) if i not in OF_KIND])),
                                  digest(repr([key[i] for i in OF_KIND])))

    def await_agreement() -> tuple[int, ...]:
        if (of_kinds := numbers()) is not None:
            return of_kinds
        everyone = control.exchange([[repr(x) for x in p] if i in (1, 2) else (p, *names(i)) if i in (3, 4, 5) else repr(p)
                                     for i, p in enumerate(key)])
        one, other, part = _difference(control, everyone)
        mine, theirs, name = everyone[one][part], everyone[other][part], ""
        if isinstance(mine, list):
            at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), 0)
            mine, theirs, name = mine[at], theirs[at], repr(names(part)[at]) if names(part)[at] else "(the model itself)"
        elif isinstance(mine, tuple):
            name = max(mine, theirs)[1]
            mine, theirs = f"change {mine[0]}", f"change {theirs[0]}"
        raise MismatchError(
            f"ranks were called differently in {PARTS[part].format(name)}: rank {one} with {mine}, rank {other} with {theirs}; "
            "every rank must pass inputs of the same shapes and dtypes to a model in the same state")

    return await_agreement


def _difference(control: Control, everyone: list[list]) -> tuple[int, int, int]:
    """Two ranks that were to be called alike, and the first part in which they were not."""
    for part in range(len(PARTS)):
        first: dict[int, int] = {}
        for rank, parts in enumerate(everyone):
            one = first.setdefault(control.kind_of(rank) if part in OF_KIND else 0, rank)
            if parts[part] != everyone[one][part]:
                return one, rank, part
    raise AssertionError("ranks differ in nothing")


def agree_on_options(control: Control, **options: str) -> None:
    """Raises `MismatchError` on every rank unless all were given the same."""
    everyone = control.exchange(options)
    for name in options:
        given = [of_rank[name] for of_rank in everyone]
        other = next((r for r, value in enumerate(given) if value != given[0]), None)
        if other is not None:
            raise MismatchError(f"rank 0 was given {name}={given[0]!r} and rank {other} {name}={given[other]!r}: every rank must "
                                "be given the same")


@contextlib.contextmanager
def agree_on_program(control: Control) -> Iterator[list[Program]]:
    """Around a compilation, whose program the body appends: all raise if it failed anywhere, or differs among ranks of a kind."""
    made: list[Program] = []
    try:
        yield made
        mine: tuple[bool, str] = (True, fingerprint(made[0]))
    except Exception as error:
        mine = (False, f"{type(error).__name__}: {error}")
        control.exchange(mine)
        raise
    everyone = control.exchange(mine)
    failed = [(r, text) for r, (ok, text) in enumerate(everyone) if not ok]
    if failed:
        raise FxparError(f"rank {failed[0][0]} could not compile the model: {failed[0][1]}")
    first: dict[int, int] = {}
    for rank, (_, text) in enumerate(everyone):
        one = first.setdefault(control.kind_of(rank), rank)
        if text != everyone[one][1]:
            raise MismatchError(f"ranks captured different programs (rank {one} and rank {rank} differ): the model's code, "
                                "configuration, plan or library versions are not the same on every rank")


def fingerprint(program: Program) -> str:
    """A digest of everything that must be the same on every rank (not which GPU each one uses)."""
    text = [str(program.plan), str(program.mesh)]
    for node in program.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        text.append(f"{node.op} {node.name} {target} {node.args} {node.kwargs} {local_value(node).layout_text}")
    return hashlib.sha256(re.sub(r", index=\d+|(?<=cuda):\d+", "", "\n".join(text)).encode()).hexdigest()
