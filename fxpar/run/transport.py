"""transport: by what the programs of a module communicate, decided when its parameters are in their places."""

from __future__ import annotations

from dataclasses import replace

from fxpar import compat
from fxpar.backends.transport import copies
from fxpar.backends.transport.base import NCCL, Transport, copied_axes, parted_axes
from fxpar.ops.collectives import typed
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.run.store import ParameterStore
from fxpar.sharding.facts import local_value


def choose_transport(store: ParameterStore, plan: Plan, wanted: str, program: Program) -> Transport:
    """Copies between GPUs for what copy engines can and may move, by the plan and what the user `wanted` (one of `TRANSPORTS`):
    parameters and gradients over the axes along which the plan stores parts, and the parts of activations that go beside
    products. program: the first one, for sizes. To be called on all ranks."""
    bound, mesh = store.bound, store.mesh
    if not copies.available(store.device) or bound.kinds > 1:
        return NCCL
    chosen = NCCL
    if stored := copied_axes(wanted, plan, mesh):
        sizes = [(count * (plan.param_dtype or p.dtype).itemsize, count * (plan.reduce_dtype or p.dtype).itemsize)
                 for p in store.model.parameters() for count in [mesh.size(*stored) * compat.local_part(p).numel()]]
        parameter, gradient = max((s for s in sizes if s[1] <= copies.LARGEST), key=lambda s: s[1], default=(0, 0))
        chosen = copies.transport_over(bound, stored, store.control, lambda group: copies.on_gpu(group, parameter, gradient))
    if parted := parted_axes(wanted, plan, mesh):
        made = copies.transport_over(bound, parted, store.control,
                                     lambda group: copies.of_parts_on_gpu(group, largest_part(program)))
        chosen = replace(chosen, part_groups=made.copy_groups)
    return chosen


def overlap_told(plan: Plan, compiled: bool, transport: Transport, program: Program) -> str | None:
    """Whether what tensor parallelism gathers and scatters is hidden behind products, by what, or why not; None of a plan that
    has no tensor parallelism and asks for nothing."""
    if plan.tp == 1:
        return "off: without tensor parallelism (tp=1) there is nothing to hide" if plan.tp_comm_overlap else None
    if plan.tp_comm_overlap is False:
        return "off: tp_comm_overlap=False"
    if not plan.shards_sequence:
        return "off: without sequence_parallel activations are summed, and neither gathered nor scattered"
    if not plan.overlaps_tp:
        return 'off: "auto" leaves it off, as it was measured faster for one shape alone'
    if not largest_part(program):
        return "off: nothing of this model is gathered or scattered along tp"
    if not compiled:
        return "off: the eager backend runs one operator after the other"
    return f"on: parts go by {'copy engines' if transport.part_groups else 'the process group'}"


def largest_part(program: Program) -> int:
    """Bytes of the largest part that a rank sends when a value is gathered or scattered along axes of tensor parallelism."""
    found, axes = [0], set(program.mesh.axes("tp"))
    for node in program.graph.nodes:
        made = typed(node)
        if made is not None and made.forward.grows and made.forward.comm is not None and axes.issuperset(made.axes):
            size = local_value(node).bytes
            found.append(size // made.ranks(program.mesh) if made.gathers else size)
    return max(found)
