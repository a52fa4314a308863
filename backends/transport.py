"""transport: who moves parameters and gradients: NCCL, or the copy engines of GPUs that see each other's memory."""

from __future__ import annotations

from fxpar.mesh import Axes, Mesh
from fxpar.plan import Plan

TRANSPORTS = ("auto", "nccl")
"""What users choose from: copy engines where they can be (see `copied_axes`), or NCCL alone, as between hosts."""


def copied_axes(transport: str, plan: Plan, mesh: Mesh) -> Axes:
    """The axes along which copy engines are to gather parameters and scatter gradients, one of `TRANSPORTS` chosen: those along
    which the plan stores parameters in parts, if it has both communicated in buckets."""
    buckets = plan.overlap_param_gather and plan.overlap_grad_reduce
    return mesh.axes("zero") if transport == "auto" and buckets else ()
