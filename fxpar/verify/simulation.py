"""`fxpar.simulate`: prove, on one machine and without processes, what a plan computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.backends import simulate as simulate_backend
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.transport.base import TRANSPORTS
from fxpar.compiler import Captured, capture, compile_program
from fxpar.errors import EquivalenceError, FxparError, PlanError
from fxpar.model.inputs import Call, canonical, leaves, signature
from fxpar.model.state import State
from fxpar.passes.partition.phases import Boundary, Compute, split_phases
from fxpar.passes.pipeline import Observer
from fxpar.plan import Plan, require_one_of
from fxpar.program import Program
from fxpar.sharding.layout import Tiling, put, take


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


BACKENDS = ("eager", "inductor")
Ranks = Lowered | simulate_backend.Lockstep


class Simulation:
    """A model under a plan, all ranks in this process. Made by `fxpar.simulate`."""

    def __init__(self, model: nn.Module | Captured, plan: Plan | str, example: Any = None, observe: Observer | None = None, *,
                 lowered: bool = False, backend: str = "eager", transport: str = "auto", passes: int | None = None):
        self.plan = Plan.of(plan)
        self.plan.require_supported()
        require_one_of("backend", backend, BACKENDS)
        require_one_of("transport", transport, TRANSPORTS)
        self.captured = model if isinstance(model, Captured) else capture(model, example)
        model = self.captured.model
        if any(getattr(model, name) for name in compat.HOOKS):
            raise PlanError("model", type(model).__name__, "has forward hooks of its own, which run around a parallel module's "
                            "program and not in a simulation", "the model without them")
        self.model, self.observe = model, observe
        self.lowered, self.backend, self.transport, self.passes = lowered or backend == "inductor", backend, transport, passes
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.watch: simulate_backend.Watch | None = None
        self._depends = State(model)
        self._programs: dict[tuple, Program] = {}
        self._stored: dict[str, Tiling] = {}  # the parameters' storage, which the first program decides
        self._ranks: dict[int, Ranks] = {}
        self.program = self._compile(self.captured.call)
        if self.plan.microbatches > 1:
            self.program = self._compile(self.microbatches(self.captured.call)[0])

    def _compile(self, call: Call) -> Program:
        device = self.device.type
        auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (signature(leaves(call)), *self._depends.key(), auto)
        if key not in self._programs:
            if call is self.captured.call and not self._stored:
                program = self.captured.partition(self.plan, observe=self.observe)
            else:
                args, kwargs = call
                program = compile_program(self.model, self.plan, kwargs or args, device=self.device, observe=self.observe,
                                          pinned=self._stored)
            self._programs[key] = program
            self._depends.add(self._programs[key].reads)
            for node, source in self._programs[key].source_of().items():
                if source.kind == "param":
                    self._stored.setdefault(source.name, node.meta["tiling"])
        return self._programs[key]

    def _ranks_of(self, program: Program) -> Ranks:
        if id(program) not in self._ranks:
            self._ranks[id(program)] = Lowered(
                program.mesh, self.plan, self.backend == "inductor", self.transport, self.passes
            ) if self.lowered else simulate_backend.Lockstep(program.mesh)
        return self._ranks[id(program)]

    def step(self, *args: Any, seed: int = 0, **kwargs: Any) -> StepResult:
        """Forward and backward on the *global* batch, over all microbatches of the plan.

        seed: what dropout draws from (same seed, same masks; each microbatch has the next one).
        """
        parts = self.microbatches(canonical(self.model, args, kwargs))
        program = self.program = self._compile(parts[0])
        ranks = self._ranks_of(program)
        kept: Kept | None = None
        if self.lowered and len(parts) > 1 and training_over_replicas(program):
            kept = Kept(program, ranks, self._feeds(program, leaves(parts[0]), seed))
        total: StepResult | None = None
        buffers: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            feeds = self._feeds(program, leaves(part), seed + i, buffers)
            result = self._microbatch(program, ranks, feeds, len(parts), kept, last=i == len(parts) - 1)
            buffers |= result.buffers
            total = result if total is None else _added(total, result)
        assert total is not None
        return total

    def microbatches(self, call: Call) -> list[Call]:
        """The global batch of each microbatch: the n-th part of every replica's rows."""
        n, named = self.plan.microbatches, leaves(call)
        if n == 1:
            return [call]
        program = self._compile(call)
        dims = {s.name: node.meta.get("batch_dim") for node, s in program.source_of().items() if s.kind == "input"}
        replicas = program.mesh.size(*program.mesh.axes("dp"))

        def rows(value: Any, dim: int | None, i: int) -> Any:
            if dim is None or not isinstance(value, Tensor):
                return value
            if value.shape[dim] % (replicas * n):
                raise PlanError("microbatches", n, f"must divide each replica's part of a batch of {value.shape[dim]}",
                                "microbatches=1")
            mine = torch.cat([part.chunk(n, dim)[i] for part in value.detach().chunk(replicas, dim)], dim)
            return mine.requires_grad_(value.requires_grad)

        spec = pytree.tree_structure(call)
        return [pytree.tree_unflatten([rows(v, dims.get(p), i) for p, v in named.items()], spec) for i in range(n)]

    def _microbatch(self, program: Program, ranks: Ranks, feeds: list[list[Any]], count: int, kept: Kept | None,
                    last: bool) -> StepResult:
        if kept is None:
            outs = self._forward(ranks, program.module, feeds)
        else:
            compute = kept.compute(last)
            extra = kept.inputs(compute)
            outs = self._forward(ranks, compute.module, [[*feed, *more] for feed, more in zip(feeds, extra, strict=True)])
        nodes, sinks = program.outputs(), program.tensor_sinks()
        whole = [put([o[i] for o in outs], n.meta["tiling"], n.meta["global"].shape, program.mesh)
                 for i, n in enumerate(nodes)]
        outputs = unflatten(program, whole)
        loss = scalar_of(outputs) / count
        grads, input_grads = self._backward(program, ranks, feeds, outs, loss, whole, kept, last)
        buffers = {s.name: t.detach() for s, t in zip(sinks, whole, strict=True) if s.kind == "buffer"}
        return StepResult(loss.detach(), grads, outputs, input_grads, buffers)

    def _forward(self, ranks: Ranks, module: fx.GraphModule, feeds: list[list[Any]]) -> list[list[Any]]:
        if isinstance(ranks, simulate_backend.Lockstep):
            return ranks.forward(module, feeds, self.watch)
        return ranks.forward(module, feeds)

    def _feeds(self, program: Program, named: dict[str, Any], seed: int,
               updated: dict[str, Tensor] | None = None) -> list[list[Any]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False)) | (updated or {})
        known: dict[str, dict[str, Any]] = {"param": parameters, "buffer": buffers, "input": named}
        feeds: list[list[Any]] = [[] for _ in range(program.mesh.world_size)]
        for node, source in program.source_of().items():
            value = known.get(source.kind, {}).get(
                source.name, torch.tensor(seed) if source.kind == "seed" else source.value)
            for rank, feed in enumerate(feeds):
                if isinstance(value, Tensor):
                    part = take(value.detach(), node.meta["tiling"], program.mesh, rank).clone()
                    if source.kind == "param":
                        part = part.to(program_dtype(node))
                    feed.append(part.contiguous().requires_grad_(source.requires_grad))
                else:
                    feed.append(value)
        return feeds

    def _backward(self, program: Program, ranks: Ranks, feeds: list[list[Any]], outs: list[list[Any]], loss: Tensor,
                  whole: list[Tensor], kept: Kept | None, last: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Differentiate the global loss; every rank must arrive at the same gradient where it holds the same part."""
        if not loss.requires_grad:
            return {}, {}
        wanted = [i for i, t in enumerate(whole) if t.requires_grad]
        cotangents = torch.autograd.grad(loss, [whole[i] for i in wanted], allow_unused=True)
        nodes, n = program.outputs(), range(program.mesh.world_size)
        given = [(i, grad) for i, grad in zip(wanted, cotangents, strict=True) if grad is not None]
        roots = [[out[i] for i, _ in given if out[i].requires_grad] for out in outs]
        seeds = [[take(grad, nodes[i].meta["tiling"], program.mesh, rank).contiguous() for i, grad in given
                  if outs[rank][i].requires_grad] for rank in n]
        wants = [(i, s) for i, s in enumerate(program.sources) if s.requires_grad]
        held = [[] for _ in n] if kept is None or last else kept.held
        found = ranks.backward(roots, seeds, [[*(feeds[r][i] for i, _ in wants), *held[r]] for r in n])
        if kept is not None and not last:
            kept.hold([mine[len(wants):] for mine in found])
        grads: dict[str, Tensor] = {}
        input_grads: dict[str, Tensor] = {}
        placeholders = program.placeholders()
        for k, (i, source) in enumerate(wants):
            own = [mine[k] for mine in found]
            if all(p is None for p in own):
                continue
            parts = [torch.zeros_like(feeds[r][i]) if p is None else p for r, p in enumerate(own)]
            node = placeholders[i]
            shape = node.meta["global"].shape
            total = put(parts, node.meta["tiling"], shape, program.mesh)
            _check_replicas(source.name, parts, total, node, program)
            (grads if source.kind == "param" else input_grads)[source.name] = total
        return grads, input_grads


def training_over_replicas(program: Program) -> bool:
    """Whether something is kept between microbatches (see `fxpar.passes.partition.phases`)."""
    return not program.plan.gathers_each_use and program.mesh.size(*program.mesh.axes("dp")) > 1


class Kept:
    """What ranks keep between the microbatches of a step, as `fxpar.run.steps` keeps it on one rank.

    feeds: local inputs of the program. held: rank -> the inputs of the last graph whose gradients are kept.
    """

    def __init__(self, program: Program, ranks: Ranks, feeds: list[list[Any]]):
        self.plan, self.phases = program.plan, split_phases(program)
        parameters = [i for i, s in enumerate(program.sources) if s.kind == "param"]
        with torch.no_grad():
            self.values = ranks.forward(self.phases.unshard, [[feed[i] for i in parameters] for feed in feeds])
        self.pending: list[dict[Boundary, Tensor]] = [{} for _ in feeds]
        self.held: list[list[Tensor]] = [[] for _ in feeds]

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
            self.held[rank] = [x for (kind, _), x in zip(compute.extra, out[-1], strict=True) if kind == "detached"]
        return out

    def hold(self, grads: list[list[Tensor | None]]) -> None:
        """Add up the gradients of what is `held`."""
        boundaries = self.compute(last=False).boundaries("detached")
        for pending, mine in zip(self.pending, grads, strict=True):
            for boundary, grad in zip(boundaries, mine, strict=True):
                if grad is not None:
                    before = pending.get(boundary)
                    pending[boundary] = grad.to(boundary.dtype) if before is None else before + grad.to(boundary.dtype)


def _added(total: StepResult, result: StepResult) -> StepResult:
    """Losses and gradients of parameters added up; everything else is that of the last microbatch."""
    grads = dict(total.grads)
    for name, grad in result.grads.items():
        grads[name] = grads[name] + grad if name in grads else grad
    return replace(result, loss=total.loss + result.loss, grads=grads)


def program_dtype(node) -> torch.dtype:
    return node.meta["global"].dtype


def _check_replicas(name: str, parts: Iterable[Tensor], total: Tensor, node, program: Program) -> None:
    if not total.numel() or total.isnan().any():  # a model that is not finite is not fxpar's doing
        return
    scale = total.abs().max().item() or 1.0
    for rank, part in enumerate(parts):
        mine = take(total, node.meta["tiling"], program.mesh, rank)
        worst = (mine - part).abs().max().item() if part.numel() else 0.0
        if not worst <= 1e-4 * scale:
            raise EquivalenceError(f"ranks disagree about the gradient of {name} (rank {rank}: off by {worst:.3g} of "
                                   f"{scale:.3g}); this is a bug in fxpar: please report the model and the plan")


def unflatten(program: Program, tensors: list[Any]) -> Any:
    """The user's output structure from the program's flat outputs (buffers left out)."""
    values = iter([t for t, s in zip(tensors, program.tensor_sinks(), strict=True) if s.kind == "output"])
    flat = [s.constant if s.kind == "literal" else next(values) for s in program.sinks if s.kind in ("output", "literal")]
    return pytree.tree_unflatten(flat, program.out_spec)


def simulate(model: nn.Module | Captured, plan: Plan | str, example_inputs: Any = None, *, lowered: bool = False,
             backend: str = "eager", transport: str = "auto") -> Simulation:
    """Every rank of `plan` in this process. `example_inputs`: the global batch, a dict of keyword arguments or a tuple.
    model: may be what `fxpar.capture` made of one and of its inputs.

    The simulation's ``step(**global_batch)`` gives the loss, the outputs and the full gradients, by the same local
    programs and collectives that real ranks would run. lowered: through the forward and backward graphs as the inductor
    backend hands them over (see `fxpar.backends.inductor.lowered`). backend: "eager", or "inductor", which compiles those graphs.
    transport, of lowered graphs: "auto" has parameters and gradients go by copy engines, as on GPUs of one host, where the
    plan stores parameters in parts; "nccl" as between hosts.
    Raises: as `fxpar.parallelize`; `EquivalenceError` where ranks would hang.
    """
    return Simulation(model, plan, example_inputs, lowered=lowered, backend=backend, transport=transport)
