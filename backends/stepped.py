"""stepped: a program's forward and the two parts of its backward as calls of their own, for several microbatches in flight.

Autograd has no part in it: what a microbatch keeps between calls is in the hands of whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.like import Like
from fxpar.backends.split import Halves, Unsplittable, split_backward, whole_backward
from fxpar.errors import InputError, PlanError
from fxpar.ops.vocabulary import tensor_bytes
from fxpar.pipeline.schedules import PUTS_OFF
from fxpar.plan import Plan
from fxpar.program import user_line

CarriedKind = Literal["saved", "given", "made"]
Running = Callable[[], AbstractContextManager[Any]]
Trace = Callable[[fx.GraphModule, list[Tensor], compat.Cut], compat.TracedForward]


class UsedOnce:
    """Tensors that one microbatch keeps from one call of a `Stepped` to the next, which takes them: once."""

    def __init__(self, owner: Stepped, tensors: list[Tensor]):
        self._owner = owner
        self.tensors: list[Tensor] | None = tensors

    def take(self, owner: Stepped) -> list[Tensor]:
        """Raises: `InputError` if they were taken before, or by another `Stepped`."""
        if self._owner is not owner:
            raise InputError("what a microbatch keeps was given to another program than the one that it was kept by")
        if self.tensors is None:
            raise InputError("what a microbatch keeps was used twice, and may be overwritten: keep it anew, by another forward")
        tensors, self.tensors = self.tensors, None
        return tensors


class SavedForBackward(UsedOnce):
    """What a forward keeps for the backward."""


class SavedForWeightGradients(UsedOnce):
    """What the input gradients leave for the weight gradients."""


@dataclass(frozen=True)
class Carried:
    """A value that a microbatch holds between its input gradients and its weight gradients.

    kind: "saved" by the forward (a parameter, where the weight gradients read one, counts too), "given" as the gradient of an
    output, or "made" by the input gradients. name: that of its node in the backward graph.
    """

    kind: CarriedKind
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass
class _HalfBackward:
    """A half of the backward (see `Half`), ready to run."""

    reads: list[int]
    makes: list[int]
    run: Callable[[list[Any]], Sequence[Any]]


@dataclass
class _Backward:
    """Both halves, None where there is nothing to do, and what they take from outside."""

    first: _HalfBackward | None = None
    second: _HalfBackward | None = None
    seeds: list[Like] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)


class Stepped:
    """A program in steps. Made by the `stepped` of a backend.

    early: the positions of the inputs whose gradients come first. late: those of the others. roots: those of the outputs that
    have a gradient.

    Any number of microbatches may be between their steps, and each may take its next one at any time. Gradients may share
    memory with each other and with those passed in: whoever adds them up does so out of place. They are None where an input
    wants no gradient.
    """

    def __init__(self, early: Sequence[int], late: Sequence[int], keep: list[int], outputs: int, forward: compat.TracedForward,
                 backward: _Backward, running: Running, more: Sequence[Tensor] = ()):
        self.early, self.late, self.roots = tuple(early), tuple(late), tuple(forward.seeds)
        self._keep, self._outputs, self._running, self._more = keep, outputs, running, more
        self._forward, self._backward = forward, backward

    def forward(self, *inputs: Any) -> tuple[list[Any], SavedForBackward]:
        """The outputs for the flat local inputs, and what the backward needs. Autograd records nothing of it."""
        made = self._call(self._forward.run, [*(inputs[i] for i in self._keep), *self._more])
        return made[: self._outputs], SavedForBackward(self, made[self._outputs :])

    def backward(self, saved: SavedForBackward, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all inputs. grads: those of the outputs, None where there is none. `saved` is used up."""
        early, left = self.input_gradients(saved, grads)
        found = dict(zip(self.early, early, strict=True)) | dict(zip(self.late, self.weight_gradients(left), strict=True))
        return [found[i] for i in range(len(found))]

    def pull_back(self, inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all inputs, as `backward` gives them. A program that saves nothing (it is linear) is not run."""
        saved = self.forward(*inputs)[1] if self._forward.saved else SavedForBackward(self, [])
        return self.backward(saved, grads)

    def input_gradients(self, saved: SavedForBackward, grads: Sequence[Tensor | None]
                        ) -> tuple[list[Tensor | None], SavedForWeightGradients]:
        """The gradients of the `early` inputs, and what those of the others need. `saved` is used up."""
        first, second = self._backward.first, self._backward.second
        seeds = self._seeds(grads)
        values = saved.take(self) + seeds
        left = [values[i] for i in second.reads] if second else []
        given = [values[i] for i in first.reads] if first else []
        del values, seeds  # what the first half alone reads is freed while it runs
        found, carried = self._run(first, given, self.early)
        return found, SavedForWeightGradients(self, left + carried)

    def weight_gradients(self, left: SavedForWeightGradients) -> list[Tensor | None]:
        """The gradients of the `late` inputs. `left` is used up."""
        return self._run(self._backward.second, left.take(self), self.late)[0]

    def carried(self) -> list[Carried]:
        """What each microbatch holds between `input_gradients` and `weight_gradients`."""
        return list(self._backward.carried)

    def _seeds(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        if len(grads) != self._outputs:
            raise InputError(f"{len(grads)} gradients were given for {self._outputs} outputs: pass None where there is none")
        for i, grad in enumerate(grads):
            if grad is not None and i not in self.roots:
                raise InputError(f"output {i} depends on no input that wants a gradient, and was given one: pass None")
        return [like.of(grads[i], i) for i, like in zip(self.roots, self._backward.seeds, strict=True)]

    def _run(self, part: _HalfBackward | None, given: list[Tensor], inputs: Sequence[int]
             ) -> tuple[list[Tensor | None], list[Tensor]]:
        """A half's gradients, for `inputs`, and what it made besides."""
        if part is None:
            return [None] * len(inputs), []
        made = self._call(part.run, given)
        grads = {self._keep[k]: grad for k, grad in zip(part.makes, made)}
        return [grads.get(i) for i in inputs], made[len(part.makes) :]

    def _call(self, run: Callable[[list[Any]], Sequence[Any]], given: list[Any]) -> list[Any]:
        with self._running(), compat.as_traced():
            return list(run(given))


def in_steps(plain: fx.GraphModule, example: list[Any], keep: list[int], early: Collection[int], trace: Trace,
             running: Running, plan: Plan, more: Sequence[Tensor] = ()) -> Stepped:
    """The steps of a program.

    plain, keep: of `tensor_inputs_only`. example: all local inputs. early: the positions of those whose gradients come first.
    trace: has AOTAutograd make the graphs, and the backend what runs them. running: around every step. plan: its schedule says
    whether the backward has to be split; where it does not, and cannot be, it is whole. more: what `plain` takes besides, the
    same in every step, and without a gradient.
    Raises: `PlanError` for a backward that has to be split and cannot be, and for a program that writes to its inputs.
    """
    if not {*early} <= {*range(len(example))}:
        raise InputError(f"gradients of inputs {sorted(early)} come first, and there are {len(example)} inputs")
    backward = _Backward()
    first = {k for k, i in enumerate(keep) if i in early}
    given = [*(example[i] for i in keep), *more]

    def cut(graph: fx.GraphModule, like: list[Tensor], saved: int, donated: list[int], make: compat.Make) -> None:
        try:
            halves = split_backward(graph, first)
        except Unsplittable as error:
            if plan.schedule in PUTS_OFF:
                raise PlanError("schedule", plan.schedule, f"must put off gradients of parameters, and cannot: {error.what}",
                                "schedule=1f1b, whose backwards are whole") from error
            halves = whole_backward(graph, first)
        backward.seeds = [Like.traced(x) for x in like[saved:]]
        backward.carried = _carried(halves, saved)
        _make_halves(backward, halves, like, donated, make)

    def traced() -> compat.TracedForward:
        try:
            return trace(plain, given, cut)
        except compat.NotInSteps as error:
            raise _not_in_steps(plain.graph, plan) from error

    try:
        forward = traced()
    except compat.SharedOutputs as shared:
        _own_memory(plain.graph, shared.positions)
        plain.recompile()
        forward = traced()
    outputs: Any = plain.graph.output_node().args[0]
    late = [i for i in range(len(example)) if i not in early]
    return Stepped(list(dict.fromkeys(early)), late, keep, len(outputs), forward, backward, running, more)


def _not_in_steps(graph: fx.Graph, plan: Plan) -> PlanError:
    node = next(n for n in graph.nodes if compat.mutates(n.target) or n.op == "get_attr")
    line = user_line(node)
    does = "writes to an input of its stage" if compat.mutates(node.target) else "is a tensor that no pass has made an input"
    return PlanError("pp", plan.pp, f"has each stage compute forwards and backwards by themselves, and operator {node.target}"
                     f"{f' ({line})' if line else ''} {does}", "pp=1, or an operator that returns what it makes")


def _own_memory(graph: fx.Graph, positions: list[int]) -> None:
    """Have these outputs be copies, in place."""
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(output):
        for i in positions:
            results[i] = graph.call_function(torch.ops.aten.clone.default, (results[i],))
    output.args = (tuple(results),)


def _carried(halves: Halves, saved: int) -> list[Carried]:
    """saved: how many of the backward's inputs are."""
    if halves.second is None:
        return []
    reads, inputs = halves.second.reads, halves.second.module.graph.find_nodes(op="placeholder")
    kinds: list[CarriedKind] = ["saved" if i < saved else "given" for i in reads]
    kinds += ["made"] * len(halves.carried)
    values = [(kind, n.name, n.meta["val"]) for kind, n in zip(kinds, inputs, strict=True)]
    return [Carried(kind, name, tuple(x.shape), x.dtype, tensor_bytes(x)) for kind, name, x in values if isinstance(x, Tensor)]


def _make_halves(backward: _Backward, halves: Halves, like: list[Tensor], donated: list[int], make: compat.Make) -> None:
    """Make both halves ready. like: what the whole backward takes; donated: what of that it may overwrite."""
    first, second = halves.first, halves.second
    made: list[Tensor] = []
    if first is not None:
        carried = [n.meta["val"] for n in halves.carried]
        kept = [x for x in (*carried, *(like[i] for i in (second.reads if second else []))) if isinstance(x, Tensor)]
        still = {compat.storage_of(x) for x in kept}
        free = [k for k, i in enumerate(first.reads) if i in donated and compat.storage_of(like[i]) not in still]
        run, values = make(first.module, [like[i] for i in first.reads], free, len(first.makes))
        backward.first, made = _HalfBackward(first.reads, first.makes, run), values[len(first.makes) :]
    if second is not None:
        free = [k for k, i in enumerate(second.reads) if i in donated]
        run, _ = make(second.module, [*(like[i] for i in second.reads), *made], free, len(second.makes))
        backward.second = _HalfBackward(second.reads, second.makes, run)
