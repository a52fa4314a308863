"""`fxpar.simulate`: prove, on one machine and without processes, what a plan computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpar.backends import simulate as backend
from fxpar.compiler import Observer, compile_program
from fxpar.errors import EquivalenceError, FxparError
from fxpar.inputs import Call, canonical, example_call, leaves, signature
from fxpar.passes.layout import put, take
from fxpar.plan import Plan
from fxpar.program import Program


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


class Simulation:
    """A model under a plan, all ranks in this process. Made by `fxpar.simulate`."""

    def __init__(self, model: nn.Module, plan: Plan | str, example: Any, observe: Observer | None = None):
        plan = Plan.of(plan)
        plan.require_supported()
        self.model, self.plan, self.observe = model, plan, observe
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.watch: backend.Watch | None = None
        self._programs: dict[tuple, Program] = {}
        self.program = self._compile(example_call(model, example))

    def _compile(self, call: Call) -> Program:
        device = self.device.type
        auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (signature(leaves(call)), self.model.training, auto)
        if key not in self._programs:
            args, kwargs = call
            self._programs[key] = compile_program(self.model, self.plan, kwargs or args, device=self.device,
                                                  observe=self.observe)
        return self._programs[key]

    def step(self, *args: Any, seed: int = 0, **kwargs: Any) -> StepResult:
        """Forward and backward on the *global* batch. seed: what dropout draws from (same seed, same masks)."""
        call = canonical(self.model, args, kwargs)
        program = self.program = self._compile(call)
        feeds = self._feeds(program, leaves(call), seed)
        outs = backend.run(program.module, program.mesh, feeds, self.watch)
        nodes, sinks = program.outputs(), program.tensor_sinks()
        whole = [put([o[i] for o in outs], n.meta["tiling"], n.meta["global"].shape, program.mesh)
                 for i, n in enumerate(nodes)]
        outputs = unflatten(program, whole)
        loss = scalar_of(outputs)
        grads, input_grads = self._backward(program, feeds, outs, nodes, loss, whole)
        buffers = {s.name: t.detach() for s, t in zip(sinks, whole, strict=True) if s.kind == "buffer"}
        return StepResult(loss.detach(), grads, outputs, input_grads, buffers)

    def _feeds(self, program: Program, named: dict[str, Any], seed: int) -> list[list[Any]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
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
                    feed.append(part.requires_grad_(source.requires_grad))
                else:
                    feed.append(value)
        return feeds

    def _backward(self, program, feeds, outs, nodes, loss, whole):
        """Differentiate the global loss; every rank must arrive at the same gradient where it holds the same part."""
        if not loss.requires_grad:
            return {}, {}
        flat = [t for t in whole if t.requires_grad]
        cotangents = torch.autograd.grad(loss, flat, allow_unused=True)
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        for whole_grad, index in zip(cotangents, [i for i, t in enumerate(whole) if t.requires_grad], strict=True):
            if whole_grad is None:
                continue
            for rank, out in enumerate(outs):
                if out[index].requires_grad:
                    roots.append(out[index])
                    seeds.append(take(whole_grad, nodes[index].meta["tiling"], program.mesh, rank).contiguous())
        wants = [(i, s) for i, s in enumerate(program.sources) if s.requires_grad]
        flat_inputs = [feed[i] for i, _ in wants for feed in feeds]
        found = torch.autograd.grad(roots, flat_inputs, seeds, allow_unused=True)
        grads: dict[str, Tensor] = {}
        input_grads: dict[str, Tensor] = {}
        placeholders, n = program.placeholders(), program.mesh.world_size
        for k, (i, source) in enumerate(wants):
            own = found[k * n : (k + 1) * n]
            if all(p is None for p in own):
                continue
            parts = [torch.zeros_like(feeds[r][i]) if p is None else p for r, p in enumerate(own)]
            node = placeholders[i]
            shape = node.meta["global"].shape
            total = put(parts, node.meta["tiling"], shape, program.mesh)
            _check_replicas(source.name, parts, total, node, program)
            (grads if source.kind == "param" else input_grads)[source.name] = total
        return grads, input_grads


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
    flat = [s.constant if s.kind == "literal" else next(values) for s in program.sinks if s.kind != "buffer"]
    return pytree.tree_unflatten(flat, program.out_spec)


def simulate(model: nn.Module, plan: Plan | str, example_inputs: Any = None) -> Simulation:
    """Every rank of `plan` in this process. `example_inputs`: the global batch, a dict of keyword arguments or a tuple.

    The simulation's ``step(**global_batch)`` gives the loss, the outputs and the full gradients, by the same local
    programs and collectives that real ranks would run.
    """
    return Simulation(model, plan, example_inputs)
