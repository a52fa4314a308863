"""edges: what gradients mean where tensors enter a parallel module and leave it.

Inside of a program a gradient is that of the global objective. Outside, where plain PyTorch computes with a replica's rows, it is
that of the replica's own loss, of which the global one is the mean over the dp replicas, as in DDP: dp times as much. Tensors go
through `Edges.leave` on their way out and through `Edges.enter` on their way in, and gradients are scaled on the way back, so
that whatever is computed between two modules, after the last or by the last, parameters get the gradients of one device.

What the user made is found behind an input by a walk through the autograd graph, up to the outputs of parallel modules:

    =====================================  ==================================================================
    behind an input of a replica's rows    its gradient
    =====================================  ==================================================================
    outputs of parallel modules            the replica's, theirs if it is asked for, too
    parameters of plain modules            the replica's: the mean over replicas is that of one device (DDP)
    other tensors that require grad
      ``.grad`` after a backward           of the global objective: the rows of one device's gradient
      what ``torch.autograd.grad`` returns the derivative of the very number that it was asked for
    =====================================  ==================================================================
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.errors import InputError
from fxpar.ops.runtime import Runtime
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.sharding.facts import full_value, local_value, sharding_at
from fxpar.sharding.mesh import BoundMesh

OutputKind = Literal["part", "alike", "loss"]
"""Of an output: this replica's part; the same on all replicas; the same, and a number computed from the batch."""


class _Scaled(torch.autograd.Function):
    """``x * there``, whose gradients are scaled by `back`; theirs in turn by `there`, as a gradient penalty has it."""

    @staticmethod
    def forward(ctx, x: Tensor, there: float, back: float) -> Tensor:
        ctx.factors = back, there
        return x * there

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Scaled.apply(grad, *ctx.factors), None, None


class _Leave(torch.autograd.Function):
    """An output of a program -> what the user gets. The walk from later inputs ends here.

    One for each output: a gradient of one is none of the others, whose parameters keep a ``.grad`` of None.
    """

    @staticmethod
    def forward(ctx, out: Tensor, crossing: Crossing, kind: OutputKind, begins: Callable[[], None]) -> Tensor:
        ctx.crossing, ctx.kind, ctx.begins = crossing, kind, begins
        return out.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.begins()
        if isinstance(grad, DTensor):  # of what was computed with parameters, too
            if ctx.crossing.edges.plan.pp > 1:
                raise InputError(f"a loss of {ctx.crossing.edges.name} was computed along with parameters under pp="
                                 f"{ctx.crossing.edges.plan.pp}, where a rank has those of its own stages alone: the number is "
                                 "another one on each rank; write loss + module.sum_over_parameters(lambda name, p: 0.01 * "
                                 "p.square().sum()), or have the model's forward compute it")
            grad = grad.full_tensor()
        if torch.is_grad_enabled() and ctx.crossing.edges.once:
            edges = ctx.crossing.edges
            raise InputError(f"a second derivative of {edges.name} (create_graph=True), under plan {edges.plan}: a backward that "
                             "was compiled, or makes values again, cannot be derived; use parallelize(backend=\"eager\") and a "
                             "plan with zero<=2 and recompute=none")
        return ctx.crossing.back(ctx.kind, grad), None, None, None


class _Enter(torch.autograd.Function):
    """A replica's rows that the user passes -> input of a program."""

    @staticmethod
    def forward(ctx, x: Tensor, crossing: Crossing, origin: _Origin) -> Tensor:
        ctx.crossing, ctx.origin = crossing, origin
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        scale, replicas = ctx.crossing.scale(ctx.origin), ctx.crossing.edges.replicas
        return grad if scale == 1 and not torch.is_grad_enabled() else _Scaled.apply(grad, scale, scale / replicas), None, None


@dataclass
class _Origin:
    """What lies behind an input, in the autograd graph: the nodes of outputs of parallel modules, and those of leaves."""

    path: str
    outputs: list[Any] = field(default_factory=list)
    parameters: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)


@dataclass
class Crossing:
    """One call of a module. mixed: plain operators used its losses along with a replica's rows."""

    edges: Edges
    mixed: bool = False
    _seeds: tuple[int, set[str]] = (-1, set())

    @property
    def seeds(self) -> set[str]:
        """What the backward pass under way began with, here or further on: "loss", "part" or both."""
        now = compat.backward_pass()
        if self._seeds[0] != now:
            self._seeds = now, set()
        return self._seeds[1]

    def back(self, kind: OutputKind, grad: Tensor) -> Tensor:
        """The gradient of an output, from outside to inside."""
        edges = self.edges
        self.seeds.add("part" if kind == "part" else "loss")
        if kind == "loss" and not self.mixed:
            edges.tell(grad)
        if edges.replicas == 1:
            return grad
        if kind == "part":
            return _Scaled.apply(grad, 1 / edges.replicas, 1.0)
        if kind == "alike" or self.mixed:
            return edges.runtime.all_reduce((grad / edges.replicas).contiguous(), edges.axes)
        return grad

    def scale(self, origin: _Origin) -> float:
        """Of the gradient of an input, in the backward pass under way, from inside to outside."""
        outputs = [node for node in origin.outputs if compat.fate(node) != "left out"]
        tensors = {compat.fate(node) for node in origin.tensors} - {"left out"}
        if outputs or any(compat.fate(node) != "left out" for node in origin.parameters):
            if tensors and self.edges.replicas > 1:
                raise InputError(
                    f"input {origin.path!r} of {self.edges.name} was computed from tensors that require grad along with outputs "
                    "of a parallel module or parameters of a plain one, whose gradients count otherwise under "
                    f"dp={self.edges.replicas}; ask for the tensors' gradients alone (torch.autograd.grad), detach() them, or "
                    "make them nn.Parameters")
            for node in outputs:
                node.crossing.seeds.update(self.seeds & {"loss"})
            return self.edges.replicas
        if "accumulated" in tensors:
            return 1
        if len(self.seeds) > 1 and self.edges.replicas > 1:
            raise InputError(
                f"the derivative with respect to input {origin.path!r} of {self.edges.name} was asked for of a number that adds "
                "a loss of the model (the global batch's) to one computed outside (this replica's); ask for that of each by "
                "itself")
        return self.edges.replicas if self.seeds == {"part"} else 1


class Edges:
    """The edges of one parallel module; `name` and `plan` are for messages. once: its backward cannot be derived again. tell: is
    called with the gradient of a loss that a backward pass comes with."""

    def __init__(self, name: str, plan: Plan, bound: BoundMesh, runtime: Runtime, once: bool,
                 tell: Callable[[Tensor], None] = lambda grad: None):
        mesh, self.once, self.tell = bound.mesh, once, tell
        self.name, self.plan, self.runtime, self._bound = name, plan, runtime, bound
        dp = mesh.strategies.get("dp", ())
        self.axes = tuple(a for a in dp if mesh.size(a) > 1)
        self.replicas = mesh.size(*dp)
        self.parts = tuple(mesh.index(rank, dp) for rank in range(mesh.world_size))
        self._programs: dict[int, tuple[Program, dict[str, bool], tuple[OutputKind, ...]]] = {}
        self._warned = False

    def enter(self, program: Program, named: dict[str, Any]) -> tuple[dict[str, Any], Crossing]:
        """Path -> what the user passed, as the program takes it.

        Raises: `InputError` where an input comes from a module that splits the batch over other ranks, or where rows of a replica
        became a value that all replicas are to have in common.
        """
        crossing = Crossing(self)
        if len(self.parts) == 1 or not torch.is_grad_enabled():
            return named, crossing
        passed = dict(named)
        for path, leaf in named.items():
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                split = self._of(program)[0].get(path)
                if split is not None:
                    origin = self._checked(_origin(path, leaf), split)
                    passed[path] = _Enter.apply(leaf, crossing, origin) if split else leaf
        return passed, crossing

    def leave(self, program: Program, outs: Any, crossing: Crossing, begins: Callable[[int], None]) -> list[Any]:
        """The program's outputs, as the user gets them. begins: is told the number of one that a backward pass begins with."""
        if not torch.is_grad_enabled():
            return list(outs)
        sinks, kinds = program.tensor_sinks(), self._of(program)[1]
        return [_Leave.apply(out, crossing, kind, functools.partial(begins, number))
                if sink.kind in ("output", "attribute") and out.requires_grad else out
                for number, (out, sink, kind) in enumerate(zip(outs, sinks, kinds, strict=True))]

    def leave_loss(self, loss: Tensor) -> Tensor:
        """A loss that no program's graph is behind, as the user gets it."""
        return _Leave.apply(loss, Crossing(self), "loss", tuple) if loss.requires_grad else loss

    def drop(self, program: Program) -> None:
        """The program will not be run again."""
        self._programs.pop(id(program), None)

    def _of(self, program: Program) -> tuple[dict[str, bool], tuple[OutputKind, ...]]:
        """Which inputs of a program are split over replicas, and the kinds of its outputs."""
        if id(program) not in self._programs:
            inputs = {s.name: self._split(n) for n, s in program.source_of().items()
                      if s.kind == "input" and local_value(n).sharding is not None}
            fed = {n for n, s in program.source_of().items() if s.kind == "input"}
            for node in program.graph.nodes:
                if any(n in fed for n in node.all_input_nodes):
                    fed.add(node)
            kinds: list[OutputKind] = ["part" if self._split(n) else "loss" if n in fed and full_value(n).dim() == 0 else "alike"
                                 for n in program.outputs()]
            if self.axes:
                self._bound.group(self.axes)
            self._programs[id(program)] = program, inputs, tuple(kinds)
        return self._programs[id(program)][1:]

    def _split(self, node: Any) -> bool:
        return any(a in self.axes for dim in sharding_at(node) for part in dim for a in part.axes)

    def _checked(self, origin: _Origin, split: bool) -> _Origin:
        for node in origin.outputs:
            maker: Edges = node.crossing.edges
            if maker.parts != self.parts:
                raise InputError(
                    f"input {origin.path!r} of {self.name} (plan {self.plan}) comes from {maker.name} (plan {maker.plan}), which "
                    "has other ranks pass the same part of the batch; try plans with the same dp and the same order of ranks for "
                    "both, or detach() the tensor and gather it yourself")
            if node.kind == "part" and not split and self.replicas > 1:
                raise InputError(
                    f"input {origin.path!r} of {self.name} has no batch dim, so that all dp={self.replicas} replicas are to "
                    f"pass the same, but it was computed from a replica's part of the outputs of {maker.name}; compute it "
                    "inside of one of the modules, or name its batch dim in Plan(batch_dims)")
            node.crossing.mixed |= node.kind == "loss"
        if origin.parameters and self.replicas > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"input {origin.path!r} of {self.name} was computed with {len(origin.parameters)} parameters of no parallel "
                "module: their gradients are those of this replica's loss; average them over the replicas (as "
                "DistributedDataParallel does), or parallelize their module too", stacklevel=2)
        return origin


def with_full_outputs(named: dict[str, Any]) -> dict[str, Any]:
    """Outputs of parallel modules that tp splits, as full tensors."""
    if not any(isinstance(leaf, DTensor) for leaf in named.values()):
        return named
    return {path: DTensor.full_tensor(leaf) if isinstance(leaf, DTensor) else leaf for path, leaf in named.items()}


def _origin(path: str, x: Tensor) -> _Origin:
    origin = _Origin(path)
    pending, seen = {get_gradient_edge(x).node}, set()
    while pending:
        node = pending.pop()
        seen.add(node)
        if isinstance(getattr(node, "crossing", None), Crossing) and hasattr(node, "kind"):
            origin.outputs.append(node)
        elif (leaf := getattr(node, "variable", None)) is not None:
            own = isinstance(leaf, nn.Parameter) and leaf is not x
            (origin.parameters if own else origin.tensors).append(node)
        else:
            pending |= {after for after, _ in node.next_functions if after is not None} - seen
    return origin
