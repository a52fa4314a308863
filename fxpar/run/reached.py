"""reached: what a backward pass comes to. On one device other parameters get no gradient, and no optimizer moves them.

A backward that was traced (a plan that makes values again, a backend that compiles) is one function of the gradients of all
outputs: it takes zeros for an output that no loss was computed from, and gives zeros to the parameters behind it alone. Autograd,
where it runs a program's operators one by one, leaves these parameters out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.passes.partition.phases import Boundary
from fxpar.program import Program

DETACH = torch.ops.aten.detach.default


class Reached:
    """Of calls of one program: the outputs that the backward pass under way began with, and what they depend on.

    traced: the program's backward is one function.
    """

    def __init__(self, program: Program, traced: bool):
        self.traced, self._behind = traced, _behind(program)
        self._parameters = {s.name: self._behind[n] for n, s in program.source_of().items() if s.kind == "param"}
        self._began = -1, 0

    def of_another_call(self) -> Reached:
        """The same of another call, whose gradients come back by themselves."""
        made = copy.copy(self)
        made._began = -1, 0
        return made

    def note(self, output: int) -> None:
        """The backward pass under way has a gradient of this output."""
        now = compat.backward_pass()
        self._began = now, (self._began[1] if self._began[0] == now else 0) | 1 << output

    def of_parameters(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the program's parameters, and None for those that the pass did not come to."""
        return self._only(grads, list(self._parameters.values()))

    def of_boundaries(self, grads: Sequence[Tensor | None], boundaries: Sequence[Boundary]) -> list[Tensor | None]:
        """The same of the gradients of values at these boundaries."""
        return self._only(grads, [self._behind[b.node] for b in boundaries])

    def reduces(self, boundary: Boundary) -> bool:
        """Whether the pass reduces what was left unreduced at this boundary."""
        outputs = self._outputs()
        behind = self._parameters[boundary.source.name] if self.traced else self._behind[boundary.node]
        return outputs is None or bool(behind & outputs)

    def _only(self, grads: Sequence[Tensor | None], behind: Sequence[int]) -> list[Tensor | None]:
        outputs = self._outputs()
        if outputs is None or not self.traced:
            return list(grads)
        return [grad if of & outputs else None for grad, of in zip(grads, behind, strict=True)]

    def _outputs(self) -> int | None:
        """As the bits of a number; None where nobody told, as in the stages of a pipeline."""
        began, outputs = self._began
        return outputs if began == compat.backward_pass() else None


def _behind(program: Program) -> dict[fx.Node, int]:
    """Node -> the outputs that have a gradient for it, as the bits of a number."""
    behind = dict.fromkeys(program.graph.nodes, 0)
    for i, out in enumerate(program.outputs()):
        behind[out] |= 1 << i
    for node in reversed(program.graph.nodes):
        if node.op != "output" and node.target is not DETACH:
            for used in node.all_input_nodes:
                behind[used] |= behind[node]
    return behind
