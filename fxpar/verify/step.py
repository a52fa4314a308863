"""step: one step of a simulation: forward and backward of all ranks, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpar.backends import simulate as simulate_backend
from fxpar.backends.inductor.lowered import Lowered
from fxpar.errors import EquivalenceError, FxparError
from fxpar.passes.partition.phases import Boundary, Compute, split_phases
from fxpar.program import Program, Source
from fxpar.sharding.facts import full_value, sharding_at
from fxpar.sharding.layout import Sharding, put, take
from fxpar.sharding.mesh import MICROBATCH, Mesh


@dataclass
class StepResult:
    """What one step computed, as one device would hold it.

    loss: the global loss, or the pseudo-loss (see `scalar_of`). grads: name -> the full gradient of every
    parameter that has one. outputs: the model's own output type, with global tensors. input_grads: path -> gradient of
    every float input that wants one. buffers: name -> the new value of every buffer that the model updated.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    outputs: Any
    input_grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def scalar_of(outputs: Any) -> Tensor:
    """The loss of a model's output: its `.loss`, its only floating scalar, or (for models without one) a pseudo-loss.

    The pseudo-loss is the mean squared distance of every floating output to a fixed, position-dependent target: its
    gradient tells outputs apart, and nothing in it cancels.
    """
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    flat = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    scalars = [t for t in flat if t.dim() == 0]
    if scalars:
        return scalars[0]
    if not flat:
        raise FxparError("the model returns no floating-point tensor to take gradients of")
    targets = (torch.cos(torch.arange(t.numel(), device=t.device, dtype=t.dtype)).view_as(t) for t in flat)
    distances = [(t - target).square().mean() for t, target in zip(flat, targets, strict=True)]
    return sum(distances[1:], distances[0])


SimulatedRanks = Lowered | simulate_backend.Lockstep


class SimulatedStep:
    """One step of a program, on all ranks of its mesh; of all microbatches where the program is that of one.

    named: the global batch, by paths. seed: what dropout draws from.
    """

    def __init__(self, model: nn.Module, program: Program, ranks: SimulatedRanks, named: dict[str, Any], seed: int,
                 watch: simulate_backend.Watch | None = None):
        self.model, self.program, self.ranks, self.watch = model, program, ranks, watch
        self.mesh, self.microbatches = program.mesh, program.microbatches
        self.count = 1 if self.microbatches is None else self.microbatches.count
        self.nodes, self.sinks = program.outputs(), program.tensor_sinks()
        self.placeholder = {id(s): n for n, s in program.source_of().items()}
        self.seed = torch.tensor(seed)
        self.known: dict[str, dict[str, Any]] = {
            "param": dict(model.named_parameters(remove_duplicate=False)),
            "buffer": dict(model.named_buffers(remove_duplicate=False)), "input": named}

    def run(self) -> StepResult:
        """Forward and backward. Every rank must arrive at the same gradient where it holds the same part."""
        before = dict(self.known["buffer"])
        outs, grads = self.passes(self._prologue())
        self.known["buffer"] = before
        full = self._together(outs)
        outputs = unflatten(self.program, full)
        buffers = {s.name: t for s, t in zip(self.sinks, full, strict=True) if s.kind == "buffer"}
        loss = scalar_of(outputs).detach()
        return StepResult(loss, self._gradients("param", grads), outputs, self._gradients("input", grads), buffers)

    def passes(self, passed: dict[str, list[list[Tensor]]]) -> tuple[list[list[list[Tensor]]], list[dict[int, list[Tensor]]]]:
        """Forward and backward of every microbatch: its outputs, rank by rank, and the gradients by the numbers of sources.

        passed: what `_prologue` returns.
        """
        kept: BetweenMicrobatches | None = None
        if isinstance(self.ranks, Lowered) and self.count > 1 and training_over_replicas(self.program):
            kept = BetweenMicrobatches(self.program, self.ranks, self._feeds(0, passed))
        outs: list[list[list[Tensor]]] = []
        grads: list[dict[int, list[Tensor]]] = []
        cotangents: dict[int, Tensor] | None = None
        if self.count > 1:
            cotangents = self._of_a_loss() or self._cotangents(self._forwards(passed))
        for i in range(self.count):
            feeds = self._feeds(i, passed)
            made = self._forward(feeds, kept, last=i == self.count - 1)
            if cotangents is None:
                cotangents = self._cotangents([made])
            grads.append(self._backward(feeds, made, cotangents, i, kept))
            outs.append([[t.detach() for t in mine] for mine in made])
            self._keep_buffers(made)
        return outs, grads

    # ---- inputs ----

    def _feeds(self, i: int, passed: dict[str, list[list[Tensor]]]) -> list[list[Any]]:
        """Rank by rank, what the program takes for a microbatch."""
        feeds: list[list[Any]] = [[] for _ in range(self.mesh.world_size)]
        for source in self.program.sources:
            for rank, feed in enumerate(feeds):
                feed.append(self.value(source, rank, i, passed))
        return feeds

    def value(self, source: Source, rank: int, i: int, passed: dict[str, list[list[Tensor]]]) -> Any:
        """What a rank gives the program for a source in microbatch i."""
        return passed[source.name][i][rank] if source.kind == "microbatch" else self._local(source, rank, i)

    def _local(self, source: Source, rank: int, i: int) -> Any:
        """A rank's part of an input in a microbatch."""
        value = self.known.get(source.kind, {}).get(source.name, self.seed if source.kind == "seed" else source.value)
        if not isinstance(value, Tensor):
            return value
        node = self.placeholder[id(source)]
        sharding, mesh, at = self._rows(source, sharding_at(node), rank, i)
        part = take(value.detach(), sharding, mesh, at).clone()
        if source.kind == "param":
            part = part.to(full_value(node).dtype)
        return part.contiguous().requires_grad_(source.requires_grad)

    def _rows(self, source: Source, sharding: Sharding, rank: int, i: int) -> tuple[Sharding, Mesh, int]:
        """Where a rank's part of an input lies in the global one: its sharding, a mesh, and the rank's number there."""
        if self.microbatches is None or (source.kind, source.name) not in self.microbatches.rows:
            return sharding, self.mesh, rank
        return self.microbatches.rows[source.kind, source.name], self.microbatches.mesh, i * self.mesh.world_size + rank

    def _prologue(self) -> dict[str, list[list[Tensor]]]:
        """Name -> microbatch -> rank -> what the program takes besides."""
        step, n = self.microbatches, self.mesh.world_size
        if step is None:
            return {}
        passed: dict[str, list[list[Tensor]]] = {}
        if step.index is not None:
            passed[step.index] = [[torch.tensor(i)] * n for i in range(self.count)]
        if step.prologue is not None:
            feeds = [[self._local(source, rank, i or 0) for source, i in step.prologue_inputs] for rank in range(n)]
            with torch.no_grad():
                made = simulate_backend.run(step.prologue, self.mesh, feeds)
            passed |= {name: [[mine[place] for mine in made] for place in places] for name, places in step.passed.items()}
        return passed

    def _keep_buffers(self, outs: list[list[Tensor]]) -> None:
        for k in range(len(self.sinks)):
            self.keep_buffer(k, [mine[k] for mine in outs])

    def keep_buffer(self, k: int, parts: list[Tensor]) -> None:
        """If output k, of which the ranks made these parts, is a buffer that the next microbatch takes from this one, keep it."""
        sink, node = self.sinks[k], self.nodes[k]
        if self.microbatches is not None and sink.kind == "buffer" and sink.name in self.microbatches.in_order:
            full = put([p.detach() for p in parts], sharding_at(node), full_value(node).shape, self.mesh)
            self.known["buffer"][sink.name] = full

    # ---- forward ----

    def _forward(self, feeds: list[list[Any]], kept: BetweenMicrobatches | None, last: bool) -> list[list[Tensor]]:
        if isinstance(self.ranks, simulate_backend.Lockstep):
            return self.ranks.forward(self.program.module, feeds, self.watch)
        if kept is None:
            return self.ranks.forward(self.program.module, feeds)
        compute = kept.compute(last)
        extra = kept.inputs(compute)
        return self.ranks.forward(compute.module, [[*feed, *more] for feed, more in zip(feeds, extra, strict=True)])

    def _forwards(self, passed: dict[str, list[list[Tensor]]]) -> list[list[list[Tensor]]]:
        """The outputs of all microbatches, without gradients."""
        before, outs = dict(self.known["buffer"]), []
        with torch.no_grad():
            for i in range(self.count):
                outs.append(simulate_backend.run(self.program.module, self.mesh, self._feeds(i, passed)))
                self._keep_buffers(outs[-1])
        self.known["buffer"] = before
        return outs

    def _together(self, outs: list[list[list[Tensor]]]) -> list[Tensor]:
        """The step's outputs, as one device would have them, from those of each microbatch and rank."""
        full: list[Tensor] = []
        for k, node in enumerate(self.nodes):
            step = self.microbatches
            if step is not None and k in step.output_rows:
                sharding = step.output_rows[k]
                sizes = [n * (self.count if along else 1) for n, along in zip(
                    full_value(node).shape, (any(MICROBATCH in p.axes for p in dim) for dim in sharding), strict=True)]
                full.append(put([mine[k] for made in outs for mine in made], sharding, torch.Size(sizes), step.mesh))
                continue
            parts = [put([mine[k] for mine in made], sharding_at(node), full_value(node).shape, self.mesh)
                     for made in outs]
            full.append(parts[0] if step is None else step.joined(k, parts))
        return full

    # ---- backward ----

    def _of_a_loss(self) -> dict[int, Tensor]:
        """The derivative by the outputs where the loss is one of them: known before anything runs. Else nothing."""
        device = next((p.device for p in self.model.parameters()), None)
        outputs = [torch.zeros(full_value(n).shape, dtype=full_value(n).dtype, device=device) for n in self.nodes]
        loss = scalar_of(unflatten(self.program, outputs))
        return {k: torch.ones_like(loss) for k, out in enumerate(outputs) if out is loss}

    def _cotangents(self, outs: list[list[list[Tensor]]]) -> dict[int, Tensor]:
        """The derivative of the loss by the step's outputs."""
        made = self._together([[[t.detach() for t in mine] for mine in each] for each in outs])
        full = [t.requires_grad_(t.is_floating_point() or t.is_complex()) for t in made]
        loss = scalar_of(unflatten(self.program, full))
        wanted = [k for k, t in enumerate(full) if t.requires_grad]
        found = torch.autograd.grad(loss, [full[k] for k in wanted], allow_unused=True) if loss.requires_grad else []
        return {k: g for k, g in zip(wanted, found, strict=False) if g is not None}

    def cotangent(self, k: int, grad: Tensor, rank: int, i: int) -> Tensor:
        """A rank's part of a derivative by an output, in a microbatch."""
        step = self.microbatches
        if step is not None and k in step.output_rows:
            return take(grad, step.output_rows[k], step.mesh, i * self.mesh.world_size + rank).contiguous()
        part = take(grad, sharding_at(self.nodes[k]), self.mesh, rank).contiguous()
        return part if step is None else part * step.weight(k)

    def _backward(self, feeds: list[list[Any]], outs: list[list[Tensor]], cotangents: dict[int, Tensor], i: int,
                  kept: BetweenMicrobatches | None) -> dict[int, list[Tensor]]:
        """Number of a source -> rank by rank its gradient of one microbatch."""
        n, last = range(self.mesh.world_size), i == self.count - 1
        roots = [[out[k] for k in cotangents if out[k].requires_grad] for out in outs]
        seeds = [[self.cotangent(k, grad, rank, i) for k, grad in cotangents.items() if outs[rank][k].requires_grad]
                 for rank in n]
        if not any(roots):
            return {}
        wants = [k for k, s in enumerate(self.program.sources) if s.requires_grad]
        detached = [[] for _ in n] if kept is None or last else kept.detached
        found = self.ranks.backward(roots, seeds, [[*(feeds[r][k] for k in wants), *detached[r]] for r in n])
        if kept is not None and not last:
            kept.hold([mine[len(wants):] for mine in found])
        grads: dict[int, list[Tensor]] = {}
        for place, k in enumerate(wants):
            own = [mine[place] for mine in found]
            if any(p is not None for p in own):
                grads[k] = [torch.zeros_like(feeds[r][k]) if p is None else p for r, p in enumerate(own)]
        return grads

    def _gradients(self, kind: str, made: list[dict[int, list[Tensor]]]) -> dict[str, Tensor]:
        """The gradients of the sources of a kind, as one device would have them, from those of each microbatch and rank."""
        grads: dict[str, Tensor] = {}
        for k, source in enumerate(self.program.sources):
            each = [mine[k] for mine in made if k in mine]
            if source.kind != kind or not each:
                continue
            node, step = self.placeholder[id(source)], self.microbatches
            sharding, shape = sharding_at(node), full_value(node).shape
            if step is not None and (source.kind, source.name) in step.rows:
                sharding, shape = step.rows[source.kind, source.name], self.known["input"][source.name].shape
                grads[source.name] = put([part for parts in each for part in parts], sharding, shape, step.mesh)
                continue
            parts = [torch.stack(mine).sum(0) for mine in zip(*each, strict=True)] if len(each) > 1 else each[0]
            grads[source.name] = put(parts, sharding, shape, self.mesh)
            _check_replicas(source.name, parts, grads[source.name], sharding, self.mesh)
        return grads


def training_over_replicas(program: Program) -> bool:
    """Whether something is kept between microbatches (see `fxpar.passes.partition.phases`)."""
    return not program.plan.gathers_each_use and program.mesh.size(*program.mesh.axes("dp")) > 1


class BetweenMicrobatches:
    """What ranks keep between the microbatches of a step, as `fxpar.run.steps` keeps it on one rank.

    feeds: local inputs of the program. detached: rank -> the inputs of the last graph whose gradients are kept.
    """

    def __init__(self, program: Program, ranks: SimulatedRanks, feeds: list[list[Any]]):
        self.plan, self.phases = program.plan, split_phases(program)
        parameters = [i for i, s in enumerate(program.sources) if s.kind == "param"]
        with torch.no_grad():
            self.values = ranks.forward(self.phases.unshard, [[feed[i] for i in parameters] for feed in feeds])
        self.pending: list[dict[Boundary, Tensor]] = [{} for _ in feeds]
        self.detached: list[list[Tensor]] = [[] for _ in feeds]

    def compute(self, last: bool) -> Compute:
        return self.phases.compute_and_reduce if last or self.plan.reduces_each_backward else self.phases.compute

    def inputs(self, compute: Compute) -> list[list[Tensor]]:
        """Rank by rank, what the graph takes besides the program's inputs."""
        out: list[list[Tensor]] = []
        for rank, values in enumerate(self.values):
            at = dict(zip(self.phases.boundaries, values, strict=True))
            out.append([])
            for kind, boundary in compute.extra:
                if kind == "unreduced":
                    zero = torch.zeros_like(at[boundary], dtype=boundary.dtype)
                    out[-1].append(self.pending[rank].get(boundary, zero))
                else:
                    out[-1].append(at[boundary].detach().requires_grad_(kind == "detached"))
            self.detached[rank] = [x for (kind, _), x in zip(compute.extra, out[-1], strict=True) if kind == "detached"]
        return out

    def hold(self, grads: list[list[Tensor | None]]) -> None:
        """Add up the gradients of what is `detached`."""
        boundaries = self.compute(last=False).boundaries("detached")
        for pending, mine in zip(self.pending, grads, strict=True):
            for boundary, grad in zip(boundaries, mine, strict=True):
                if grad is not None:
                    before = pending.get(boundary)
                    pending[boundary] = grad.to(boundary.dtype) if before is None else before + grad.to(boundary.dtype)


def _check_replicas(name: str, parts: Iterable[Tensor], total: Tensor, sharding: Sharding, mesh: Mesh) -> None:
    if not total.numel() or total.isnan().any():  # a model that is not finite is not fxpar's doing
        return
    scale = total.abs().max().item() or 1.0
    for rank, part in enumerate(parts):
        mine = take(total, sharding, mesh, rank)
        worst = (mine - part).abs().max().item() if part.numel() else 0.0
        if not worst <= 1e-4 * scale:
            raise EquivalenceError(f"ranks disagree about the gradient of {name} (rank {rank}: off by {worst:.3g} of "
                                   f"{scale:.3g}); this is a bug in fxpar: please report the model and the plan")


def unflatten(program: Program, tensors: list[Any]) -> Any:
    """The user's output structure from the program's flat outputs (buffers left out)."""
    values = iter([t for t, s in zip(tensors, program.tensor_sinks(), strict=True) if s.kind == "output"])
    flat = [s.constant if s.kind == "literal" else next(values) for s in program.sinks if s.kind in ("output", "literal")]
    return pytree.tree_unflatten(flat, program.out_spec)
