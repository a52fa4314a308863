"""Agreement: ranks compare what they are about to run, so that a difference is an error on all of them and never a hang."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxpar.backends.transport.control import Check, Control, Outcome, digest
from fxpar.errors import FxparError, MismatchError
from fxpar.model import inputs as calls
from fxpar.program import Program, user_line
from fxpar.run.arriving import checksum
from fxpar.run.updates import steps_in
from fxpar.sharding.facts import local_value

PARTS = (
    "their inputs", "the mode (training) of submodule {}", "whether parameter {} wants gradients",
    "the parts of the model ({})", "hooks ({})", "attributes that the forward reads ({})", "autocast",
    "what earlier calls left in attributes", "grad mode", "numbers among the inputs",
    "whether gradients are accumulated (no_sync)", "what dropout draws from (seed, calls)",
    "what was called since the last forward", "the backward passes since the last forward", "how many calls ended in an error",
    "whether parameter {} has a gradient", "what optimizers did since the last forward",
    "what they still hold of a forward or backward that was recorded (cuda_graphs)",
    "what was trained since the last forward (freeze parameters that no optimizer steps)",
)
"""What ranks compare of a call, in order; {} is the name of what differs."""
OF_MODULES, OF_PARAMETERS, COUNTED, OF_KINDS = (1,), (2, 15), (3, 4, 5), 18
"""Parts that have a value for each submodule, for each parameter, those that count the changes that were seen, and the one that
is compared among ranks of different kinds, if they train anything."""
ORDER = (0, 3, 1, 2, *range(4, len(PARTS)))
"""In which they are looked at for a difference: the names of modules and parameters say nothing where the parts differ."""
NOTHING = "nothing is trained"
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
            trained = Check(control.kind, control.kinds, digest(_trained(key)))
            found, (of_others, of_all, *outcomes) = control.compare_parts(
                digest(repr(key[TRAINED])), [others, trained, *checks])
            of_kinds = found or ()
            assert of_others is not None and of_all is not None  # numbers that all ranks have
            alike = found is not None and None not in of_others and len({*of_all} - {digest(NOTHING)}) < 2
        elif alike and checks:
            _, outcomes = control.compare_parts(0, checks)
        if alike:
            if checks:
                judge(outcomes)
            return of_kinds
        named = {i: names(min(i, TRAINED)) if i in OF_PARAMETERS else names(i) for i in (*OF_MODULES, *OF_PARAMETERS, *COUNTED)}
        raise MismatchError(_told(control, control.exchange_of(name, ([_texts(p) for p in (*key, [_trained(key)])], named))))

    return await_agreement


def _told(control: Control, everyone: list[tuple[list[list[str]], dict[int, list[str]]]]) -> str:
    """What two ranks were called with that should have been called alike. everyone: of each rank parts as texts, and names."""
    one, other, part = _difference(control, [parts for parts, _ in everyone])
    mine, theirs = everyone[one][0][part], everyone[other][0][part]
    at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), min(len(mine), len(theirs)))
    texts = [side[at] if at < len(side) else "nothing more" if at else "nothing" for side in (mine, theirs)]
    what = ""
    if part in COUNTED:
        what = everyone[one if int(texts[0]) > int(texts[1]) else other][1][part][0]
        texts = [f"change {text}" for text in texts]
    elif part in (*OF_MODULES, *OF_PARAMETERS):
        names = everyone[one][1][part]
        what = repr(names[at]) if at < len(names) and names[at] else "(the model itself)"
    return (f"ranks were called differently in {PARTS[part].format(what)}: rank {one} with {texts[0]}, rank {other} with "
            f"{texts[1]}; every rank must pass inputs of the same shapes and dtypes to a model in the same state")


def _trained(key: tuple) -> str:
    """What a rank's program did with what it trains, which the ranks of another pipeline stage are to do, too."""
    if not any(key[TRAINED]):
        return NOTHING
    _, gradients, steps = (key[i] for i in OF_KIND)
    return f"{steps_in(steps)} steps of optimizers, and {'' if any(gradients) else 'no '}gradients now"


def _texts(part: Any) -> list[str]:
    """A part of what is compared, for people: its elements one by one, where it has some."""
    return [repr(each) for each in part] if isinstance(part, tuple | list) else [repr(part)]


def _difference(control: Control, everyone: list[list[list[str]]]) -> tuple[int, int, int]:
    """Two ranks that were to be called alike, and the first part in which they were not."""
    for part in ORDER:
        first: dict[int, int] = {}
        for rank, parts in enumerate(everyone):
            if part == OF_KINDS and parts[part] == _texts([NOTHING]):
                continue
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
        return leaf if isinstance(leaf, str) else calls.described(leaf)
    return f"{str(leaf.dtype)[6:]}{list(leaf.shape)}{' on the meta device' if leaf.is_meta else ''}"


@contextlib.contextmanager
def agree_on_program(control: Control) -> Iterator[list[Program]]:
    """Around a compilation, whose program the body appends: all raise if it failed anywhere, or differs among ranks of a kind."""
    made: list[Program] = []
    try:
        with control.watch.busy("compiling"):
            yield made
            mine = (True, (fingerprint(made[0]), _constants(made[0])))
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
    for rank, (_, found) in enumerate(everyone):
        one = first.setdefault(control.kind_of(rank), rank)
        if found != everyone[one][1]:
            raise MismatchError(_programs_told(control, made[0], one, rank))


def _programs_told(control: Control, program: Program, one: int, other: int) -> str:
    """How the programs of two ranks differ; all ranks call this, each with its own."""
    mine, theirs = (control.exchange(([(line, user_line(node)) for line, node in _lines(program)], _constants(program)))[rank]
                    for rank in (one, other))
    ranks = f"(rank {one} and rank {other} differ"
    at = next((i for i, pair in enumerate(zip(mine[0], theirs[0], strict=False)) if pair[0][0] != pair[1][0]), None)
    if at is None and len(mine[0]) == len(theirs[0]):
        name = next(n for n in (*mine[1], *theirs[1]) if mine[1].get(n) != theirs[1].get(n))
        return (f"ranks hold different values of the tensor {name!r} {ranks}), which the forward reads, and which is no buffer; "
                "have it alike on all, or register it as a buffer: at the start those of rank 0 are taken on all ranks")
    at = min(len(mine[0]), len(theirs[0])) if at is None else at
    texts = [side[0][at][0] if at < len(side[0]) else "nothing more" for side in (mine, theirs)]
    where = next((side[0][at][1] for side in (mine, theirs) if at < len(side[0]) and side[0][at][1]), "")
    texts = [text if len(text) <= 200 else f"{text[:197]}..." for text in texts]
    return (f"ranks captured different programs {ranks}: {texts[0]} and {texts[1]}{', at ' + where if where else ''}): the "
            "model's code, configuration, plan or library versions are not the same on every rank")


def _lines(program: Program) -> Iterator[tuple[str, fx.Node]]:
    """What must be the same of each operator on every rank (not which GPU each one uses)."""
    for node in program.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        line = f"{node.op} {node.name} {target} {node.args} {node.kwargs} {local_value(node).layout_text}"
        yield re.sub(r", index=\d+|(?<=cuda):\d+", "", line), node


def fingerprint(program: Program) -> str:
    """A digest of everything that must be the same on every rank, but for the values of constants."""
    text = [str(program.plan), str(program.mesh), *(line for line, _ in _lines(program))]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _constants(program: Program) -> dict[str, int]:
    """Name -> a checksum, of the tensors that a program reads and that are neither parameters, buffers nor inputs."""
    found = {}
    for source in program.sources:
        value = source.value
        if source.kind == "constant" and type(value) is torch.Tensor and value.numel() and value.device.type in ("cpu", "cuda"):
            found[source.name if source.place is None else str(source.place[1])] = int(checksum(value))
    return found
