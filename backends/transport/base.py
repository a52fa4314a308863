"""transport: who moves parameters and gradients: NCCL, or the copy engines of GPUs that see each other's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxpar.plan import Plan
from fxpar.sharding.mesh import Axes, Mesh

TRANSPORTS = ("auto", "nccl")
"""What users choose from: copy engines where they can be (see `copied_axes`), or NCCL alone, as between hosts."""

BLOCKS = ("auto", "once", "flat")
"""How the equal blocks of a deep model are compiled: each class of them once, or all in one graph; "auto": once where at most
a fifth of the operators is left to compile."""

BUCKET_BYTES, REDUCTION_BYTES = 128 * 2**20, 160 * 2**20
"""The most that parameters gathered, and gradients reduced, in one bucket have."""


@dataclass(frozen=True)
class Transport:
    """Which process group moves the parameters and gradients of each group; what graph passes ask.

    copy_groups: name of a group -> the name of the group over the same ranks whose collectives are copies by copy engines (see
    `fxpar.backends.transport.copies`). A group that has none moves everything itself. places: name of a group over which
    activations are gathered and scattered in parts, beside products (see `fxpar.backends.inductor.tp_overlap`) -> this rank's
    number in it. part_groups: such a name -> that of the group whose copies move the parts.
    """

    copy_groups: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    part_groups: Mapping[str, str] = field(default_factory=dict)

    def copies(self, group: str) -> bool:
        """Whether copy engines gather parameters and scatter gradients over this group."""
        return group in self.copy_groups

    def group(self, group: str) -> str:
        """The name of the group that gathers parameters and scatters gradients over this one."""
        return self.copy_groups.get(group, group)

    def part_group(self, group: str) -> str:
        """The name of the group that moves parts of activations over this one."""
        return self.part_groups.get(group, group)


NCCL = Transport()
"""No copy engines; every process group (NCCL's on GPUs) moves everything itself."""


def parted_axes(transport: str, plan: Plan, mesh: Mesh) -> Axes:
    """The axes along which copy engines are to move parts of activations, one of `TRANSPORTS` chosen."""
    return mesh.axes("tp") if transport == "auto" and plan.overlaps_tp else ()


def copied_axes(transport: str, plan: Plan, mesh: Mesh) -> Axes:
    """The axes along which copy engines are to gather parameters and scatter gradients, one of `TRANSPORTS` chosen: those along
    which the plan stores parameters in parts, if it has both communicated in buckets."""
    buckets = plan.overlap_param_gather and plan.overlap_grad_reduce
    return mesh.axes("zero") if transport == "auto" and buckets else ()
