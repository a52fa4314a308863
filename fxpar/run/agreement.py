"""Agreement: ranks compare what they are about to run, so that a difference is an error on all of them and never a hang."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpar.backends.transport.control import Check, Control, Outcome, digest
from fxpar.errors import FxparError, MismatchError
from fxpar.model import inputs as calls
from fxpar.program import Program
from fxpar.sharding.facts import local_value

PARTS = (
    "their inputs", "the mode (training) of submodule {}", "whether parameter {} wants gradients",
    "the parts of the model ({})", "hooks ({})", "attributes that the forward reads ({})", "autocast",
    "what earlier calls left in attributes", "grad mode", "numbers among the inputs",
    "whether gradients are accumulated (no_sync)", "what dropout draws from (seed, calls)",
    "what was called since the last forward", "how many backward passes there were", "how many calls ended in an error",
    "whether parameters have gradients", "what optimizers did since the last forward",
    "what they still hold of a forward or backward that was recorded (cuda_graphs)",
)
"""What ranks compare of a call, in order; {} is the name of what differs."""
ORDER = (0, 3, 1, 2, *range(4, len(PARTS)))
"""In which they are looked at for a difference: the names of modules and parameters say nothing where the parts differ."""
TRAINED, OF_KIND = 2, (2, 15, 16)
"""What is compared among ranks of one kind, which hold the same parameters: that which a program depends on, and all."""


def agree_on_call(control: Control, name: str, key: tuple, names: Callable[[int], list[str]], checks: Sequence[Check] = (),
                  judge: Callable[[list[Outcome]], None] = lambda outcomes: None) -> Callable[[], tuple[int, ...]]:
    """Start comparing what each rank was called with. What is returned ends it: it raises `MismatchError` on every rank
    unless all are the same; in what concerns parameters, all of its kind. What is trained it returns of each kind, where there
    are several, as a fingerprint.

    name: of the call. key: in the order of `PARTS`. ``names(i)``: of what the values of part i, a tuple, belong to. checks: other
    numbers to compare, whose outcomes `judge` is told on every rank.
    """
    kinds = control.kinds > 1
    numbers = control.compare(digest(repr((name, [p for i, p in enumerate(key) if i not in OF_KIND] if kinds else key))))

    def await_agreement() -> tuple[int, ...]:
        of_kinds: tuple[int, ...] = ()
        alike = numbers()
        if alike and kinds:
            others = Check(control.kind, control.kinds, digest(repr([key[i] for i in OF_KIND[1:]])))
            found, (of_others, *outcomes) = control.compare_parts(digest(repr(key[TRAINED])), [others, *checks])
            of_kinds = found or ()
            alike = found is not None and of_others is not None and None not in of_others
        elif alike and checks:
            _, outcomes = control.compare_parts(0, checks)
        if alike:
            if checks:
                judge(outcomes)
            return of_kinds
        everyone = control.exchange_of(name, ([[repr(x) for x in p] if i in (1, 2) else repr(p) for i, p in enumerate(key)],
                                              [names(i) for i in (3, 4, 5)]))
        one, other, part = _difference(control, [parts for parts, _ in everyone])
        mine, theirs, what = everyone[one][0][part], everyone[other][0][part], ""
        if part in (1, 2):
            at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), 0)
            mine, theirs, what = mine[at], theirs[at], repr(names(part)[at]) if names(part)[at] else "(the model itself)"
        elif part in (3, 4, 5):
            what = everyone[one if int(mine) > int(theirs) else other][1][part - 3][0]
            mine, theirs = f"change {mine}", f"change {theirs}"
        raise MismatchError(
            f"ranks were called differently in {PARTS[part].format(what)}: rank {one} with {mine}, rank {other} with {theirs}; "
            "every rank must pass inputs of the same shapes and dtypes to a model in the same state")

    return await_agreement


def _difference(control: Control, everyone: list[list]) -> tuple[int, int, int]:
    """Two ranks that were to be called alike, and the first part in which they were not."""
    for part in ORDER:
        first: dict[int, int] = {}
        for rank, parts in enumerate(everyone):
            one = first.setdefault(control.kind_of(rank) if part in OF_KIND else 0, rank)
            if parts[part] != everyone[one][part]:
                return one, rank, part
    raise AssertionError("ranks differ in nothing")


def facts(model: nn.Module, example: calls.Call) -> Mapping[str, Any]:
    """What has to be the same of a model on all ranks before it is traced, and of the example of a call. Weights need not be."""
    made: dict[str, Any] = {"torch": torch.__version__, "model": type(model).__qualname__}
    made |= {f"example input {path!r}": _kind(leaf) for path, leaf in calls.leaves(example).items()}
    made["autocast"] = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    made |= {f"mode (training) of submodule {path!r}": module.training for path, module in model.named_modules()}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        tied = first.setdefault(id(p), name)
        made[f"parameter {name!r}"] = f"that of {tied}" if tied != name else f"{_kind(p)}{'' if p.requires_grad else ', frozen'}"
    made |= {f"buffer {name!r}": _kind(b) for name, b in model.named_buffers(remove_duplicate=False)}
    return made


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return leaf if isinstance(leaf, str) else repr(leaf)
    return f"{str(leaf.dtype)[6:]}{list(leaf.shape)}{' on the meta device' if leaf.is_meta else ''}"


@contextlib.contextmanager
def agree_on_program(control: Control) -> Iterator[list[Program]]:
    """Around a compilation, whose program the body appends: all raise if it failed anywhere, or differs among ranks of a kind."""
    made: list[Program] = []
    try:
        with control.watch.busy("compiling"):
            yield made
            mine = (True, fingerprint(made[0]))
    except Exception as error:
        control.exchange((False, f"{type(error).__name__}: {error}"))
        control.watch.all_know()
        raise
    everyone = control.exchange(mine)
    failed = [(r, text) for r, (ok, text) in enumerate(everyone) if not ok]
    if failed:
        control.watch.all_know()
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
