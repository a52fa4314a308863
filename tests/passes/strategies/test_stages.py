"""Pipeline stages: run one after the other, forward and backward, they are the plain model, wherever they are cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

import fxpar
from fxpar.backends.eager import lower
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.simulate import Lockstep
from fxpar.compiler import Captured, compile_program
from fxpar.errors import PlanError
from fxpar.model.inputs import leaves
from fxpar.ops.collectives import Alone, typed, use_runtime
from fxpar.passes.partition.phases import split_phases
from fxpar.passes.strategies.stages import Stage, _Depth, cut_stages
from fxpar.plan import Plan
from fxpar.program import Program, module_path
from fxpar.report.dump import readable
from fxpar.report.memory import predict
from fxpar.sharding.layout import put, take
from fxpar.verify.equivalence import Reference, _exact, _first_difference, _frozen
from fxpar.verify.simulation import StepResult, scalar_of, unflatten
from tests import zoo
from tests.harness import RANDOM, Seeded

PLANS = ("dp=2", "tp=2", "dp=2,tp=2,zero=3")


# ---- all ranks of all stages, in one process ----


def run(stages: Sequence[Stage], program: Program, model: nn.Module, inputs: dict[str, Any], lowered: bool = False) -> StepResult:
    """Forward through the stages, backward through them in the opposite order. What is sent is checked against its message."""
    mesh, ranks = program.mesh, range(program.mesh.world_size)
    backends = [Lowered(mesh, program.plan) if lowered else Lockstep(mesh) for _ in stages]
    fed, made, outputs = [], [], {}
    arrives: list[list[Tensor]] = []
    for stage, backend in zip(stages, backends, strict=True):
        received = [[sent[r].detach().requires_grad_(m.requires_grad) for m, sent in zip(stage.receives, arrives, strict=True)]
                    for r in ranks]
        feeds = [[*received[r], *feed(stage.program, model, inputs, r)] for r in ranks]
        outs = backend.forward(stage.program.module, feeds)
        for i, message in enumerate(stage.sends):
            for out in outs:
                assert (tuple(out[i].shape), out[i].dtype, out[i].requires_grad) == (message.shape, message.dtype,
                                                                                     message.requires_grad), message
        arrives = [[out[i] for out in outs] for i in range(len(stage.sends))]
        outputs |= {k: [out[len(stage.sends) + i] for out in outs] for i, k in enumerate(stage.outputs)}
        fed.append(feeds)
        made.append(outs)
    nodes, sinks = program.outputs(), program.tensor_sinks()
    assert sorted(outputs) == list(range(len(nodes)))
    whole = [put(outputs[i], n.meta["tiling"], n.meta["global"].shape, mesh) for i, n in enumerate(nodes)]
    loss = scalar_of(unflatten(program, whole))
    wanted = [i for i, t in enumerate(whole) if t.requires_grad]
    seeds = dict(zip(wanted, torch.autograd.grad(loss, [whole[i] for i in wanted], allow_unused=True), strict=True))
    grads: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}}
    returns: list[list[Tensor]] = []
    for stage, backend, feeds, outs in zip(*(reversed(x) for x in (stages, backends, fed, made)), strict=True):
        tangents = [(i, r, returns[i][r]) for i, m in enumerate(stage.sends) if m.requires_grad for r in ranks]
        tangents += [(len(stage.sends) + i, r, take(seeds[k], nodes[k].meta["tiling"], mesh, r).contiguous())
                     for i, k in enumerate(stage.outputs) if seeds.get(k) is not None for r in ranks]
        tangents = [(i, r, t) for i, r, t in tangents if outs[r][i].requires_grad]
        places = [i for i, s in enumerate(stage.program.sources) if s.requires_grad]
        found = backend.backward([[outs[r][i] for i, at, _ in tangents if at == r] for r in ranks],
                                 [[t for _, at, t in tangents if at == r] for r in ranks],
                                 [[feeds[r][i] for i in places] for r in ranks]) if tangents and places else [[] for _ in ranks]
        returns = [[torch.zeros_like(feeds[r][i]) for r in ranks] for i in range(len(stage.receives))]
        for k, i in enumerate(places if found[0] else []):
            parts = [torch.zeros_like(feeds[r][i]) if found[r][k] is None else found[r][k] for r in ranks]
            source, node = stage.program.sources[i], stage.program.placeholders()[i]
            if source.kind == "received":
                returns[i] = parts
            elif any(found[r][k] is not None for r in ranks):
                grad, sums = put(parts, node.meta["tiling"], node.meta["global"].shape, mesh), grads[source.kind]
                sums[source.name] = sums[source.name] + grad if source.name in sums else grad
    buffers = {s.name: t.detach() for s, t in zip(sinks, whole, strict=True) if s.kind == "buffer"}
    return StepResult(loss.detach(), grads["param"], None, grads["input"], buffers)


def feed(program: Program, model: nn.Module, inputs: dict[str, Any], rank: int) -> list[Any]:
    """What a rank takes besides what it receives."""
    known: dict[str, dict[str, Any]] = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers()),
                                        "input": inputs}
    out: list[Any] = []
    for node, source in program.source_of().items():
        if source.kind == "received":
            continue
        value = torch.tensor(0) if source.kind == "seed" else known.get(source.kind, {}).get(source.name, source.value)
        if isinstance(value, Tensor):
            value = take(value.detach(), node.meta["tiling"], program.mesh, rank).clone().requires_grad_(source.requires_grad)
        out.append(value)
    return out


class Case:
    """A model, captured once for all plans, and what it computes on one device: with the same dropout, if it has any."""

    def __init__(self, name: str):
        self.model, inputs = zoo.build(name)
        self.captured: Captured = fxpar.capture(self.model, inputs)
        self.inputs = leaves(self.captured.call)
        self.programs: dict[str, Program] = {}
        passes: list[tuple[str, Program]] = []
        self.captured.partition("dp=1", observe=lambda pass_, p: passes.append((pass_, _frozen(p))))
        before = {n: b.clone() for n, b in self.model.named_buffers()}
        self.reference: Reference = _exact(self.model, Plan(), self.captured.call, passes, 0)
        with torch.no_grad():
            for n, b in self.model.named_buffers():
                b.copy_(before[n])

    def program(self, plan: str) -> Program:
        if plan not in self.programs:
            self.programs[plan] = self.captured.partition(plan)
        return self.programs[plan]

    def check(self, plan: str, stages: Sequence[Stage], lowered: bool = False) -> None:
        result = run(stages, self.program(plan), self.model, self.inputs, lowered)
        problem = _first_difference(self.reference, result, loss_tolerance=1e-6, gradient_tolerance=1e-5)
        assert problem is None, f"{problem}; {plan}; {[s.program.placeholders()[0].name for s in stages]}"


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def somewhere(program: Program, r: Seeded, count: int) -> list[fx.Node]:
    order = _Depth(program).order
    return [order[i] for i in sorted(r.sample(range(1, len(order)), count - 1))]


MODELS = ("llama", "gpt2", "t5", "resnet", "mlp")


@pytest.mark.parametrize("name", MODELS)
@given(r=RANDOM)
@settings(max_examples=3)
def test_wherever_it_is_cut(name, r):
    plan = r.choice(PLANS)
    made = case(name)
    made.check(plan, cut_stages(made.program(plan), 4, somewhere(made.program(plan), r, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, "dp=2,zero=1", "tp=2,sequence_parallel=false"])
@pytest.mark.parametrize("name", [*MODELS, "llama_tied", "nanogpt", "mixtral", "timm_convnext", "transformer"])
@given(r=RANDOM)
@settings(max_examples=10)
def test_wherever_and_whatever_is_cut(name, plan, r):
    made, count = case(name), r.randint(2, 9)
    made.check(plan, cut_stages(made.program(plan), count, somewhere(made.program(plan), r, count)))


if __name__ == "__main__":
    pytest.main([__file__])
