"""Agreement: ranks compare what they are about to run, so that a difference is an error on all of them and never a hang."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator

from fxpar.backends.transport.runtime import Control
from fxpar.errors import FxparError, MismatchError
from fxpar.program import Program

PARTS = ("their inputs", "the mode (training) of submodule {}", "whether parameter {} wants gradients",
         "the parts of the model ({})", "hooks ({})", "attributes that the forward reads ({})", "autocast",
         "what earlier calls left in attributes", "grad mode")
"""What ranks compare of a call, in order; {} is the name of what differs."""


def digest(text: str) -> int:
    """A 62-bit fingerprint."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def agree_on_call(control: Control, key: tuple, names: Callable[[int], list[str]]) -> Callable[[], None]:
    """Start comparing what each rank was called with. What is returned ends it: it raises `MismatchError` on every rank
    unless all are the same.

    key: in the order of `PARTS`. ``names(i)``: of what the values of part i, a tuple, belong to.
    """
    equal = control.compare(digest(repr(key)))

    def settle() -> None:
        if equal():
            return
        everyone = control.exchange([[repr(x) for x in p] if i in (1, 2) else (p, *names(i)) if i in (3, 4, 5) else repr(p)
                                     for i, p in enumerate(key)])
        other = next(r for r, parts in enumerate(everyone) if parts != everyone[0])
        part = next(i for i, pair in enumerate(zip(everyone[0], everyone[other], strict=True)) if pair[0] != pair[1])
        mine, theirs, name = everyone[0][part], everyone[other][part], ""
        if isinstance(mine, list):
            at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), 0)
            mine, theirs, name = mine[at], theirs[at], repr(names(part)[at]) if names(part)[at] else "(the model itself)"
        elif isinstance(mine, tuple):
            name = max(mine, theirs)[1]
            mine, theirs = f"change {mine[0]}", f"change {theirs[0]}"
        raise MismatchError(f"ranks were called differently in {PARTS[part].format(name)}: rank 0 with {mine}, rank {other} with "
                            f"{theirs}; every rank must pass inputs of the same shapes and dtypes to a model in the same state")

    return settle


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
    """Around a compilation, whose program the body appends: if it failed or differs anywhere, all ranks raise."""
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
    if len({text for _, text in everyone}) > 1:
        other = next(r for r, (_, text) in enumerate(everyone) if text != everyone[0][1])
        raise MismatchError(f"ranks captured different programs (rank 0 and rank {other} differ): the model's code, "
                            "configuration, plan or library versions are not the same on every rank")


def fingerprint(program: Program) -> str:
    """A digest of everything that must be the same on every rank (not which GPU each one uses)."""
    text = [str(program.plan), str(program.mesh)]
    for node in program.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        text.append(f"{node.op} {node.name} {target} {node.args} {node.kwargs} {node.meta.get('shows', '')}")
    return hashlib.sha256(re.sub(r", index=\d+|(?<=cuda):\d+", "", "\n".join(text)).encode()).hexdigest()
