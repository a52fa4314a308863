"""Agreement: ranks compare what they are about to run, so that a difference is an error on all of them and never a hang."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from fxpar.backends.runtime import Control
from fxpar.errors import FxparError, MismatchError
from fxpar.program import Program


def digest(text: str) -> int:
    """A 62-bit fingerprint."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def agree_on_call(control: Control, key: Any) -> Callable[[], None]:
    """Start comparing the signature that each rank was called with. What is returned ends it: it raises `MismatchError` on
    every rank unless all are the same."""
    equal = control.compare(digest(repr(key)))

    def settle() -> None:
        if equal():
            return
        everyone = control.exchange(repr(key[0]))
        first = everyone[0]
        other = next((r for r, k in enumerate(everyone) if k != first), 0)
        raise MismatchError(f"ranks were called differently: rank 0 with {first}, rank {other} with {everyone[other]}; every "
                            "rank must pass inputs of the same shapes and dtypes, in the same mode")

    return settle


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
