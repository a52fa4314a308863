"""Grouped products: the operator with its gradients, and mixtures of experts that are compiled with it."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import fxpar
from fxpar.ops.grouped_mm import grouped_mm, grouped_mm_weights, has_kernel
from tests import zoo
from tests.graphs import Halves, calls
from tests.harness import RANDOM

aten = torch.ops.aten


# ---- the operator ----


def reference(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Group by group, by differentiable operators of PyTorch."""
    bounds = [0, *ends.tolist()]
    parts = [x[a:b] @ w for (a, b), w in zip(pairwise(bounds), weights, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - bounds[-1], weights.shape[2])])


def operands(r: Random, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Empty groups, rows in no group, operands that are transposed or parts of others."""
    rows, groups, k, n = r.choice([0, 1, 5, 16]), r.choice([1, 2, 5]), r.choice([1, 3, 8]), r.choice([1, 4, 8])
    gen = torch.Generator().manual_seed(r.getrandbits(31))

    def random(*shape: int) -> Tensor:
        way = r.choice(["plain", "transposed", "part"])
        if way == "transposed":
            return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=gen, dtype=dtype).mT
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=gen, dtype=dtype)[..., :: 2 if way == "part" else 1][
            ..., : shape[-1]]

    ends = torch.tensor(sorted(r.randint(0, rows) for _ in range(groups)), dtype=r.choice([torch.int32, torch.int64]))
    return random(rows, k).requires_grad_(), random(groups, k, n).requires_grad_(), ends


def off(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@settings(max_examples=60)
@given(RANDOM)
def test_equals_a_loop_with_its_gradients(r):
    x, weights, ends = operands(r, torch.float32)
    out, want = grouped_mm(x, weights, ends), reference(x, weights, ends)
    assert off(out, want) < 1e-6
    cotangent = torch.randn_like(want)
    for mine, theirs in zip(torch.autograd.grad(out, (x, weights), cotangent),
                            torch.autograd.grad(want, (x, weights), cotangent), strict=True):
        assert off(mine, theirs) < 1e-6


@settings(max_examples=10)
@given(RANDOM)
def test_gradients_of_gradients(r):
    x, weights, ends = operands(r, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, ends), (x, weights))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, ends), (x, weights))


def test_rows_in_no_group_are_zero_and_get_no_gradient():
    x, weights = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    out = grouped_mm(x, weights, torch.tensor([1, 4]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out[4:].any() and not grad[4:].any() and grad[:4].any()
    assert not grouped_mm_weights(x, out, torch.tensor([0, 4]))[0].any()


def test_a_transposed_parameters_gradient_lies_as_it_does():
    x, parameter = torch.randn(6, 4), torch.randn(2, 3, 4, requires_grad=True)
    grouped_mm(x, parameter.mT, torch.tensor([2, 6])).sum().backward()
    assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("op", [grouped_mm, grouped_mm_weights])
def test_what_pytorch_demands_of_an_operator(op):
    x, y, ends = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True), torch.tensor([0, 2, 5])
    weights = torch.randn(3, 5, 4, requires_grad=True)
    torch.library.opcheck(op, (x, weights.mT, ends) if op is grouped_mm else (x, y, ends))


X, W = torch.ones(4, 3), torch.ones(2, 3, 5)


@pytest.mark.parametrize("args, message", [
    ((X, W, torch.tensor([3, 2])), r"end at \[3, 2\], of 4 rows: the ends must be in order"),
    ((X, W, torch.tensor([3, 5])), r"end at \[3, 5\], of 4 rows"),
    ((X, W, torch.tensor([-1, 4])), r"end at \[-1, 4\]"),
    ((X, W.mT, torch.tensor([2, 4])), r"operands \(4, 3\) torch.float32, \(2, 5, 3\).*do not agree"),
    ((X, W, torch.tensor([4])), "do not agree"),
    ((X, W.double(), torch.tensor([2, 4])), r"\(2, 3, 5\) torch.float64.*do not agree"),
    ((X, W, torch.tensor([2.0, 4.0])), "do not agree"),
])  # fmt: skip
def test_operands_that_do_not_agree(args, message):
    with pytest.raises(ValueError, match=message):
        grouped_mm(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k, n", [(64, 128), (61, 128), (64, 124)])
def test_on_a_gpu(dtype, k, n):
    x, parameter = torch.randn(300, k, device="cuda", dtype=dtype), torch.randn(4, n, k, device="cuda", dtype=dtype)
    x, parameter = x.requires_grad_(), parameter.requires_grad_()
    ends = torch.tensor([100, 100, 200, 201], device="cuda")
    out, want = grouped_mm(x, parameter.mT, ends), reference(x.double(), parameter.mT.double(), ends)
    cotangent = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, parameter), cotangent)
    theirs = torch.autograd.grad(want, (x, parameter), cotangent.double())
    for a, b in zip((out, *mine), (want, *theirs), strict=True):
        assert off(a.double(), b.double()) < {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-3}[dtype]
    assert not out[201:].any() and not mine[0][201:].any() and not mine[1][[1]].any()


# ---- what is captured ----


class Experts(nn.Module):
    def __init__(self, call: Any = F.grouped_mm, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(3, 16, 32, dtype=dtype)), call

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.call(x, self.weight, offs=ends)


def targets(program: fxpar.Program) -> set[Any]:
    return {n.target for n in program.graph.nodes if n.op == "call_function"}


ENDS = torch.tensor([2, 2, 8], dtype=torch.int32)


def by_name(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    return aten._grouped_mm.default(mat2=weights, self=x, offs=offs, out_dtype=x.dtype)


def hugging_faces(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight=weights, offs=offs)


@pytest.mark.parametrize("call", [F.grouped_mm, by_name, hugging_faces])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_are_traced_as_ours_on_the_cpu(call, dtype):
    model, x = Experts(call, dtype), torch.randn(8, 16, dtype=dtype)
    made = targets(fxpar.compile_program(model, "dp=1", (x, ENDS)))
    assert made == {grouped_mm}


@pytest.mark.parametrize("capability, has", [((9, 0), True), ((8, 0), True), ((7, 5), False), (None, True)])
def test_pytorchs_kernel_is_used_where_it_is(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert has_kernel(gpu, torch.bfloat16) == has
    assert not any(has_kernel(gpu, dtype) for dtype in (torch.float16, torch.float32))


def test_other_forms_of_pytorchs_product_are_kept():
    class Weights(nn.Module):
        def forward(self, x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(x.mT, y, offs=ends)

    x, y = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(8, 32, dtype=torch.bfloat16)
    assert aten._grouped_mm.default in targets(fxpar.compile_program(Weights(), "dp=1", (x, y, ENDS)))


# ---- mixtures of experts ----


def stepped(call: Any, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = call(**batch)
    loss = getattr(loss, "loss", loss)
    loss.backward()
    return loss.detach(), {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name, recompute", [
    ("qwen3_moe", "selective"), ("mixtral", "none"), ("mixtral", "full"), ("qwen3_moe", "none")])
def test_compiled_experts_equal_the_model(name, recompute):
    model, batch = zoo.build(name)
    loss, grads = stepped(model, model, batch)
    model, batch = zoo.build(name)
    module = fxpar.parallelize(model, f"dp=1,recompute={recompute}", batch, backend="inductor")
    have, mine = stepped(module, module, batch)
    torch.testing.assert_close(have, loss, rtol=1e-6, atol=0)
    largest = max(g.norm().item() for g in grads.values())
    for n, want in grads.items():
        assert (mine[n] - want).norm() <= 1e-5 * want.norm() + 1e-7 * largest, n


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", None])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_experts_are_grouped_while_they_are_captured(implementation, inside):
    model, batch = zoo.build("mixtral")
    model.config._experts_implementation = implementation
    program = fxpar.compile_program(Wrapped(model) if inside else model, "tp=2", batch)
    assert grouped_mm in targets(program)
    assert model.config._experts_implementation == implementation


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


def test_experts_are_as_they_were_after_a_capture_that_failed():
    model, batch = zoo.build("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(fxpar.FxparError):
        fxpar.compile_program(model, "dp=1", {**batch, "labels": batch["input_ids"][:, :3]})
    assert model.config._experts_implementation == "eager"


def test_an_implementation_that_is_not_known_is_traced():
    called = []

    def mine(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        called.append(module)
        return x * weights.sum(-1, keepdim=True)

    ExpertsInterface.register("mine", mine)
    try:
        model, batch = zoo.build("mixtral")
        model.config._experts_implementation = "mine"
        assert grouped_mm not in targets(fxpar.compile_program(model, "dp=1", batch)) and called
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["mine"]


# ---- what else knows products ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 32)), nn.Parameter(torch.randn(3, 32, 16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return x + grouped_mm(F.silu(grouped_mm(x, self.up, ends)), self.down, ends)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, ends)
        return x.square().mean()


BATCH = {"x": torch.randn(8, 16), "ends": ENDS}


@pytest.mark.parametrize("plan, ranks", [("dp=1", 1), ("tp=2", 2)])
def test_each_row_counts_for_one_group(plan, ranks):
    report = fxpar.inspect(Blocks(), plan, BATCH)
    assert report.flops == (3 * 4 - 1) * 2 * 8 * 16 * 32 // ranks  # four products; the model's input has no gradient
    assert {p.local_shape for p in report.parameters} == {(3, 16, 32 // ranks), (3, 32 // ranks, 16)}


def test_selective_computes_no_grouped_product_again(two_ranks, monkeypatch):
    none, selective, full = (Halves(Blocks(), f"tp=2,recompute={how}", BATCH, monkeypatch)
                             for how in ("none", "selective", "full"))
    assert all(calls(made.forward, "grouped_mm") == 4 for made in (none, selective, full))
    assert calls(none.backward, "grouped_mm") == calls(selective.backward, "grouped_mm") < calls(full.backward, "grouped_mm")
    assert calls(selective.backward, "grouped_mm_weights") == 4
    assert calls(selective.backward, "silu") == 2 > calls(none.backward, "silu")


def test_memory_is_predicted():
    """What is kept for the backward: of each block its input, the first product, and what the second takes."""
    peak = fxpar.inspect(Blocks(), "dp=1,recompute=selective", BATCH).peak
    assert 2 * 8 * (16 + 32) * 4 <= peak.kept <= 2 * 8 * (16 + 32 + 32) * 4 + 2 * 512
