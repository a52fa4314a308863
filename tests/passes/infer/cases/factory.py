"""Random arguments for operators that make tensors."""

from __future__ import annotations

import torch

from fxpar.ops.random import drawn
from tests.harness import Gen
from tests.passes.infer.cases.registry import CASES, case

aten = torch.ops.aten

CASES |= {
    aten.arange.default: lambda g: ((g.n(),), {}),
    aten.arange.start: lambda g: ((2, 2 + g.n()), {}),
    aten.arange.start_step: lambda g: ((1, 1 + 2 * g.n(), 2), {}),
    aten.linspace.default: lambda g: ((0, 1, g.n()), {}),
    aten.linspace.Tensor_Tensor: lambda g: ((g.constant(g.f()), g.constant(g.f()), g.n()), {}),
    aten.linspace.Tensor_Scalar: lambda g: ((g.constant(g.f()), 2, g.n()), {}),
    aten.linspace.Scalar_Tensor: lambda g: ((2, g.constant(g.f()), g.n()), {}),
    aten.logspace.default: lambda g: ((0, 1, g.n()), {}),
    aten.logspace.Tensor_Tensor: lambda g: ((g.constant(g.f()), g.constant(g.f()), g.n()), {}),
    aten.logspace.Tensor_Scalar: lambda g: ((g.constant(g.f()), 2, g.n()), {}),
    aten.logspace.Scalar_Tensor: lambda g: ((2, g.constant(g.f()), g.n()), {}),
    aten.eye.default: lambda g: ((g.n(),), {}),
    aten.eye.m: lambda g: ((g.n(), g.n()), {}),
    aten.scalar_tensor.default: lambda g: ((3,), {}),
    aten.tril_indices.default: lambda g: ((g.n(), g.n()), {}),
    aten.triu_indices.default: lambda g: ((g.n(), g.n()), {}),
    aten.hann_window.default: lambda g: ((g.n(),), {}),
    aten.hann_window.periodic: lambda g: ((g.n(), False), {}),
    aten.full.default: lambda g: ((g.shape(0, 3), 2.5), {}),
    aten.zeros.default: lambda g: ((g.shape(0, 3),), {}),
    aten.ones.default: lambda g: ((g.shape(0, 3),), {"dtype": torch.int64}),
    aten.empty.memory_format: lambda g: ((g.shape(0, 3),), {}),
    aten.new_full.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3), 2), {}),
    aten.new_zeros.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {}),
    aten.new_ones.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {"dtype": torch.int64}),
    aten.new_empty.default: lambda g: ((g.f(*g.shape()), g.shape(0, 3)), {}),
    aten.empty_permuted.default: lambda g: (([g.n(), g.n()], [1, 0]), {}),
    aten.empty_strided.default: lambda g: (([4, 6], [1, 4]), {}),
    aten.new_empty_strided.default: lambda g: ((g.f(*g.shape()), [4, 6], [1, 4]), {}),
}


@case(drawn)
def random(g: Gen):
    kind = g.pick("uniform", "normal", "exponential", "integer")
    dtype = torch.int64 if kind == "integer" else g.pick(torch.float64, torch.float32)
    options = {"kind": kind, "site": g.r.randint(0, 5), "dtype": dtype, "device": torch.device("cpu")}
    return (g.shape(0, 3), torch.tensor(g.r.randint(0, 2**40))), options
