"""What the passes pass on: a `Program`, one flat FX graph plus what its inputs and outputs mean.

Every pass is a function ``(program, ...) -> program``. The graph is functional ATen in PyTorch's
training IR (before decomposition), every parameter, buffer, constant and input is a placeholder, and
the output is one flat tuple. `Program.sources` and `Program.sinks` say, in order, what each of those
is to the user's model, so that no pass has to parse names.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from fxpar.model.reads import Reads
from fxpar.plan import Plan
from fxpar.sharding.layout import Sharding
from fxpar.sharding.mesh import Mesh, from_plan, in_time

if TYPE_CHECKING:
    from fxpar.sharding.placement import Placements

SourceKind = Literal["param", "buffer", "constant", "input", "seed", "microbatch", "received"]


@dataclass(slots=True)
class Source:
    """One placeholder of the graph.

    kind: what it is; "seed" is the int64 scalar that counter-based dropout draws from, "microbatch" what a step passes to each of
        its microbatches (see `Microbatches`), "received" a value that the pipeline stage before sends (see
        `fxpar.passes.strategies.stages`).
    name: the parameter's or buffer's fully qualified name (for a tied parameter the first one, as
        `named_parameters` reports it), the input's path ("input_ids", "0"), or the name of what is received.
    value: the global tensor as captured: real for buffers and constants, fake for the rest; of what is received, one rank's.
    storage_dtype: the dtype it is kept in, where that differs from the dtype it is computed in.
    place: of a constant, the table and key where an attribute of the model holds it, looked up at every call.
    """

    kind: SourceKind
    name: str
    value: torch.Tensor
    requires_grad: bool = False
    storage_dtype: torch.dtype | None = None
    place: tuple[Any, Any] | None = None

    @property
    def stays(self) -> bool:
        """Whether its tensor is the same in every call, as long as nobody moves it."""
        return self.kind in ("param", "buffer") or (self.kind == "constant" and self.place is None)


@dataclass(slots=True)
class Sink:
    """One element of the output tuple: a leaf of the user's output, a buffer's new value, or a tensor that the forward stores in
    an attribute (see `Program.writes`); of a pipeline stage also what it sends to the next. While capturing, also the mark of a
    tensor hook.

    name: the buffer's or attribute's name, or the output's path.
    constant: for a leaf that is no tensor (None, a number): the value itself; it has no graph output.
    """

    kind: Literal["output", "buffer", "literal", "attribute", "mark", "sent"]
    name: str
    constant: Any = None


Join = Literal["sum", "mean", "same", "rows"]
"""What an output of a step is to those of its microbatches: their sum, their mean, the last of them, or their rows together."""


@dataclass
class Microbatches:
    """What a program of one microbatch is to the step of `count` microbatches that it was made for.

    mesh: the mesh with the axis of microbatches. rows: kind and name of a source -> its sharding on that mesh, in which each
        replica's rows lie together and its microbatches follow one another. output_rows: the same, of tensor outputs by
        their number.
    prologue: computes, from the replica's whole batch, what all microbatches are passed; None where that is nothing. It takes the
        sources in `prologue_inputs`: (source, None), or (source, i) for its part in microbatch i.
    passed: name of a source of kind "microbatch" -> for each microbatch the place of its value among what the prologue computes.
    index: the name of the source that takes the microbatch's number, if there is one.
    joins: for each tensor output, how the step's follows. in_order: the buffers that each microbatch takes from the one before;
        the others are computed alike by all microbatches from what they were before the step.
    exact: for each tensor output, whether it is that of the whole batch; else something that it was computed from uses a sum over
        the batch in a way that is not linear, and sees `count` times this microbatch's part of it.
    """

    count: int
    mesh: Mesh
    rows: dict[tuple[str, str], Sharding]
    output_rows: dict[int, Sharding]
    prologue: fx.GraphModule | None
    prologue_inputs: list[tuple[Source, int | None]]
    passed: dict[str, list[int]]
    index: str | None
    joins: list[Join]
    in_order: frozenset[str]
    exact: list[bool]

    def weight(self, output: int) -> float:
        """What an output of one microbatch counts in the step's."""
        return 1.0 if self.joins[output] == "sum" else 1 / self.count

    def joined(self, output: int, parts: list[torch.Tensor]) -> torch.Tensor:
        """An output of the step that holds no rows, from those of its microbatches."""
        join = self.joins[output]
        if join == "same" or (join == "mean" and not parts[0].is_floating_point()):
            return parts[-1]
        total = torch.stack(parts).sum(0)
        return total if join == "sum" else total / self.count


@dataclass
class Program:
    """A model, captured, with everything the passes have found out about it.

    reads: what of the model's attributes, and of the values of its buffers, the program was made of.
    writes: what the forward stores in attributes; they name the sinks of kind "attribute" by their number.
    placements: what the plan makes of the graph, by its nodes; made by `place`, and read where the local program is built, and in
        the report under cp. They hold the inferred graph: programs that a module keeps are without, where nothing reads them.
    microbatches: of a program that runs one of a step's microbatches: the step.
    """

    module: fx.GraphModule
    sources: list[Source]
    sinks: list[Sink]
    out_spec: TreeSpec
    plan: Plan
    mesh: Mesh
    training: bool
    notes: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    reads: Reads = field(default_factory=Reads)
    writes: list[Any] = field(default_factory=list)
    placements: Placements | None = None
    microbatches: Microbatches | None = None

    def under(self, plan: Plan) -> Program:
        """The same inferred program under another plan. Both share the graph, which no pass behind `infer` changes."""
        return replace(self, plan=plan, mesh=in_time(from_plan(plan), plan.microbatches),
                       sources=[copy.copy(s) for s in self.sources], sinks=list(self.sinks), notes=list(self.notes),
                       tied=dict(self.tied), timings=dict(self.timings), placements=None)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def source_of(self) -> dict[fx.Node, Source]:
        return dict(zip(self.placeholders(), self.sources, strict=True))

    def outputs(self) -> list[fx.Node]:
        """The graph's outputs, in the order of the sinks that are not literals."""
        args: Any = self.graph.output_node().args
        return list(args[0])

    def tensor_sinks(self) -> list[Sink]:
        return [s for s in self.sinks if s.kind != "literal"]

    def note(self, text: str) -> None:
        """Record something the report must say (once)."""
        if text not in self.notes:
            self.notes.append(text)


def made_from(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes, and all that they are made of."""
    found, todo = set(nodes), list(nodes)
    while todo:
        more = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(more)
        todo += more
    return found


def value_of(node: fx.Node) -> Any:
    """The (fake) tensor, or tuple of tensors, that `node` holds in the single-device program."""
    return node.meta.get("val")


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__))
_STANDARD = os.path.dirname(os.__file__) + os.sep
_LIBRARY = (_TORCH, _HERE + os.sep, *(os.path.realpath(os.path.join(_HERE, name)) + os.sep for name in ("passes", "backends")))
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


@functools.cache
def is_library_file(path: str) -> bool:
    """Whether a line of this file is torch's, fxpar's or the standard library's, and not the user's."""
    return path.startswith(_LIBRARY) or (path.startswith(_STANDARD) and "-packages" not in path)


def user_line(node: fx.Node) -> str:
    """``file:line  code`` of the user's model (not of torch's modules) that made this value, "" where it is not known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    frames = [f for f in frames if not is_library_file(f[0])] or [f for f in frames if f[0].startswith(_TORCH)]
    if not frames:
        return ""
    file, line, _, code = frames[-1]
    return f"{file}:{line}  {code.strip()}"


def module_path(node: fx.Node, key: str = "nn_module_stack") -> str:
    """The path of the submodule that made this value ("model.layers.0.mlp"), "" for the root. key: under which its ``meta`` has
    the modules."""
    stack = node.meta.get(key)
    if not stack:
        return ""
    path = next(reversed(list(stack.values())))[0]
    return re.sub(r"^L__self___?|^L\['self'\]\.?", "", path)


def block_path(node: fx.Node, key: str = "nn_module_stack") -> str:
    """The outermost member of a list of modules that made this value ("model.layers.0"), "" outside of all of them. key: see
    `module_path`."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", module_path(node, key))
    return found[0] if found else ""


def copy_provenance(new: fx.Node, old: fx.Node) -> None:
    """`new` stands where `old` stood: it keeps the user's line and module."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
