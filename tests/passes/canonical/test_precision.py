"""Mixed precision: parameters computed in another dtype, gradients summed in a third, and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.backends import simulate
from fxpar.ops import collectives
from fxpar.sharding.facts import full_value, local_value

aten = torch.ops.aten
HALF = 2.0**-8
"""Relative rounding of bfloat16. A value of these models is rounded a handful of times: 4 roundings are allowed."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.down(F.gelu(self.norm(self.up(x)))).float(), target)


def net() -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(16, 16), "target": torch.randint(8, (16,))}


def dtypes(program: fxpar.program.Program, target: object) -> set[torch.dtype]:
    """Of what the global values were that an operator made."""
    return {full_value(n).dtype for n in program.graph.nodes if n.target is target and local_value(n).full is not None}


def is_half(t: Tensor) -> bool:
    return torch.equal(t.bfloat16().to(t.dtype), t)


@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,tp=2"])
def test_half_precision_compute_is_close_to_the_plain_half_model(plan):
    model, batch = net()
    step = fxpar.simulate(model, f"{plan},param_dtype=bf16", batch).step(**batch)
    half = net()[0].bfloat16()
    loss = half(batch["x"].bfloat16(), batch["target"])
    loss.backward()
    assert step.loss.item() == pytest.approx(loss.item(), rel=4 * HALF)
    for name, p in half.named_parameters():
        error = (step.grads[name] - p.grad.float()).norm() / p.grad.float().norm()
        assert step.grads[name].dtype is torch.float32 and error < 4 * HALF, name


def test_casts_are_in_the_program_and_parameters_stay_wide():
    model, batch = net()
    program = fxpar.compile_program(model, "dp=2,param_dtype=bf16", batch)
    assert dtypes(program, aten.linear.default) == dtypes(program, aten.layer_norm.default) == {torch.bfloat16}
    kept = {s.name: full_value(n).dtype for n, s in program.source_of().items() if s.kind == "param"}
    assert set(kept.values()) == {torch.float32} and kept.keys() == dict(model.named_parameters()).keys()
    casts = [n for n in program.graph.nodes if n.target is aten.to.dtype and n.args[1] is torch.bfloat16]
    assert len(casts) >= len(kept)


@pytest.mark.parametrize("options, summed", [
    ("param_dtype=bf16", torch.float32),
    ("param_dtype=bf16,reduce_dtype=fp32", torch.float32),
    ("param_dtype=bf16,reduce_dtype=bf16", torch.bfloat16),
    ("reduce_dtype=bf16", torch.bfloat16),
    ("", torch.float32),
])  # fmt: skip
def test_gradients_are_summed_over_ranks_in_the_reduction_dtype(options, summed):
    model, batch = net()
    plan = ",".join(["dp=2", *filter(None, [options])])
    simulation = fxpar.simulate(model, plan, batch)
    found = set()

    def watch(node, values):
        if node.target is collectives.vary:
            found.add(node.args[2] if len(node.args) > 2 else values[0].dtype)

    simulation.watch = watch
    grads = simulation.step(**batch).grads
    assert found == {summed}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(map(is_half, grads.values())) == (summed is torch.bfloat16)


@pytest.mark.parametrize("plan, gathered, summed", [
    ("dp=2,zero=3,param_dtype=bf16", torch.bfloat16, torch.float32),
    ("dp=4,dp_replicate=2,zero=1,param_dtype=bf16", torch.bfloat16, torch.float32),
    ("dp=2,zero=3,param_dtype=bf16,reduce_dtype=bf16", torch.bfloat16, torch.bfloat16),
    ("dp=2,zero=2,reduce_dtype=bf16", torch.float32, torch.bfloat16),
    ("dp=2,tp=2,zero=3,param_dtype=bf16", torch.bfloat16, torch.float32),
])  # fmt: skip
def test_what_ranks_send_of_parameters_and_their_gradients(monkeypatch, plan, gathered, summed):
    model, batch = net()
    sent: dict[str, list[torch.dtype]] = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
    for kind, seen in sent.items():
        real = simulate._COMM[kind]

        def watched(xs: list[Tensor], real: Any = real, seen: list[torch.dtype] = seen) -> list[Tensor]:
            seen += [x.dtype for x in xs if x.dim()]
            return real(xs)

        monkeypatch.setitem(simulate._COMM, kind, watched)
    simulation, received = fxpar.simulate(model, plan, batch), set()
    stored = [n for n in simulation.program.placeholders() if local_value(n).stored is not None]
    gathers = [n for n in simulation.program.graph.nodes if local_value(n).unshard]
    simulation.watch = lambda node, values: received.add(values[0].dtype) if node in gathers else None
    simulation.step(**batch)
    assert len(gathers) == len(stored) > 3 and received == {gathered}
    if "tp" not in plan:  # there activations are gathered and scattered, too
        groups = fxpar.Plan.parse(plan).dp  # each rank's part
        assert sent["all_gather"] == [gathered] * len(gathers) * groups
        assert sent["reduce_scatter"] == [summed] * len(gathers) * groups
        assert set(sent["all_reduce"]) == ({summed} if "replicate" in plan else set())


def test_a_module_trains_wide_parameters():
    model, batch = net()
    module = fxpar.parallelize(model, "param_dtype=bf16", batch)
    before = module.up.weight.to_local().clone()
    module(**batch).backward()
    assert {p.dtype for p in module.parameters()} == {p.grad.dtype for p in module.parameters()} == {torch.float32}
    torch.optim.SGD(module.parameters(), lr=1e-5).step()
    moved = module.up.weight.to_local() - before
    assert 0 < moved.abs().max() < HALF * before.abs().max()  # less than bfloat16 could hold


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=3", "dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=3"])
def test_a_narrow_sum_of_gradients_does_not_touch_the_forward(plan):
    model, batch = net()
    loss = model(**batch)
    loss.backward()
    step = fxpar.simulate(model, f"{plan},reduce_dtype=bf16", batch).step(**batch)
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        error = (step.grads[name] - p.grad).norm() / p.grad.norm()
        assert 1e-5 < error < 4 * HALF or is_half(p.grad), name


def test_half_precision_models_keep_half_precision_parameters():
    model, batch = net()
    batch["x"] = batch["x"].bfloat16()
    step = fxpar.simulate(model.bfloat16(), "dp=2", batch).step(**batch)
    assert {g.dtype for g in step.grads.values()} == {torch.bfloat16}


@pytest.mark.parametrize("plan", ["dp=2", "tp=2"])
def test_autocast_around_the_call_is_the_plain_models_autocast(plan):
    model, batch = net()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)
        simulation = fxpar.simulate(model, plan, batch)
    loss.backward()
    assert dtypes(simulation.program, aten.linear.default) == {torch.bfloat16}
    assert any(n.target is aten.to.dtype and n.args[1] is torch.bfloat16 for n in simulation.program.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16):
        step = simulation.step(**batch)
    assert step.loss.dtype is loss.dtype and step.loss.item() == pytest.approx(loss.item(), rel=4 * HALF)
    for name, p in model.named_parameters():
        error = (step.grads[name] - p.grad).norm() / p.grad.norm()
        assert step.grads[name].dtype is p.grad.dtype and error < 4 * HALF, name
    assert simulation.step(**batch).loss.item() == pytest.approx(model(**batch).item(), rel=1e-6)  # again without


def test_a_module_captures_again_under_autocast():
    model, batch = net()
    module = fxpar.parallelize(model, "dp=1", batch)
    wide = module(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(**batch)
        want = net()[0](**batch)
    assert narrow.item() != wide.item()
    assert narrow.item() == pytest.approx(want.item(), rel=HALF)
    assert module(**batch).item() == wide.item()


@pytest.mark.parametrize("options", ["param_dtype=bf16", ""])
def test_a_gradient_is_summed_where_its_parameter_is_used(options):
    """In the backward pass its sum then starts as soon as it is there."""
    model, batch = net()
    program = fxpar.compile_program(model, ",".join(["dp=2", *filter(None, [options])]), batch)
    order = [n for n in program.graph.nodes if n.target in (collectives.vary, aten.linear.default)]
    kinds = ["linear" if n.target is aten.linear.default else "vary" for n in order]
    assert kinds.index("linear") < len(kinds) - 1 - kinds[::-1].index("vary") < len(kinds) - 1
