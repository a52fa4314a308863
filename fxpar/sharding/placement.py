"""What `place` and `zero` decide: values beside the inferred program, which stays as it is for other plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxpar.sharding.layout import Layout


@dataclass
class Placement:
    """How one operator runs.

    at: the factor each mesh axis splits while it runs. layout: what its (first) output keeps.
    pending: axis -> "sum" | "max", still to be resolved after it. scatter: of those, the axes resolved onto a factor.
    varies: axes that the operator does not split, but along which all that use its output differ: what rearranges a
    parameter takes it in as they would, so that its gradient is summed where it is stored.
    """

    at: Layout
    layouts: list[Layout]
    pending: dict[str, str] = field(default_factory=dict)
    scatter: Layout = field(default_factory=dict)
    varies: tuple[str, ...] = ()


@dataclass
class Placements:
    """What a plan makes of an inferred program, by the nodes of that program.

    operators: how each operator runs. layouts: of every value, mesh axis -> factor; a list where an operator has several
    outputs; None while a parameter's is not decided. preferred: of parameters, on which factors the axes of ZeRO lie in what
    uses them first. stored: of parameters, and of the casts that follow them, what they are stored in, where that is in more
    parts than they are used in.
    """

    operators: dict[fx.Node, Placement] = field(default_factory=dict)
    layouts: dict[fx.Node, Any] = field(default_factory=dict)
    preferred: dict[fx.Node, Layout] = field(default_factory=dict)
    stored: dict[fx.Node, Layout] = field(default_factory=dict)

    def storage(self, node: fx.Node) -> Layout:
        """The layout that a parameter is stored in, or any other value kept in."""
        return self.stored[node] if node in self.stored else self.layouts[node]
