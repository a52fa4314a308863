"""experts: what expert parallelism asks of a model. That experts are split is a preference of `place`."""

from __future__ import annotations

from torch import fx

from fxpar.errors import PlanError
from fxpar.ops.grouped_mm import grouped_mm
from fxpar.passes.infer.rules.experts import parts_of
from fxpar.passes.place.experts import regions_of
from fxpar.program import Program, user_line
from fxpar.sharding.factors import Dim, extent, leaves
from fxpar.sharding.facts import dims_of, global_value

WAY_OUT = ("ep=1, or experts whose weights are one parameter with a dim for them, multiplied by torch.nn.functional.grouped_mm "
           "with rows sorted by expert, or by einsum or bmm with a dim for experts")


def check_experts(program: Program) -> Program:
    """Refuse experts that the ranks of ep cannot share.

    Takes: an inferred program, which stays as it is. Raises: `PlanError` for a model without experts, where ep does not divide
    their number, and where an operator between sorting rows by expert and putting them back does not treat each by itself.
    """
    ep = program.plan.ep
    if ep == 1:
        return program
    found = False
    for region in regions_of(program).values():
        experts, _ = parts_of(region.rows)
        if any(f in region.whole for f in leaves(experts)):
            _refuse(ep, "splits experts, whose rows are kept together by an operator", region.sort)
        if experts:
            found = True
            _divides(ep, experts, region.sort)
    for node in program.graph.nodes:
        if node.target is grouped_mm and global_value(node).spec is not None:
            _refuse(ep, "splits experts, and a product of rows in groups is none that was found to be of rows that are sorted by "
                    "expert and put back", node)
    for node, source in program.source_of().items():
        for dim in dims_of(node) if source.kind == "param" else ():
            experts = tuple(f for f in leaves(dim) if f.role == "experts")
            if experts:
                found = True
                _divides(ep, experts, node)
    if not found:
        raise PlanError("ep", ep, "splits experts, and this model has none that was found", WAY_OUT)
    return program


def _divides(ep: int, experts: Dim, node: fx.Node) -> None:
    first = leaves(experts)[0].size
    if first % ep:
        near = next(n for n in range(min(ep, first), 0, -1) if first % n == 0 and ep % n == 0)
        where = user_line(node)
        raise PlanError("ep", ep, f"must divide the number of experts, {extent(experts)}" + (f" ({where})" if where else ""),
                        f"ep={near}")


def _refuse(ep: int, why: str, node: fx.Node) -> None:
    where = user_line(node)
    raise PlanError("ep", ep, why + (f" ({where})" if where else ""), WAY_OUT)
