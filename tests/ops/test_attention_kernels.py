"""Every kernel that attention may run on a GPU, with every mask, under every recompute policy, compiled: ``pytest -m gpu``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxpar
from tests.matrix import pairwise

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
ABLE = {"cudnn": ("bf16",), "flash": ("bf16",), "efficient": ("fp32", "bf16"), "math": ("fp32", "bf16")}
MASKS = ("none", "causal", "padding", "padding and causal", "bias")
RECOMPUTE = ("none", "selective", "full", "0.5")
CASES = [c for c in pairwise([(k, d) for k, dtypes in ABLE.items() for d in dtypes], MASKS, RECOMPUTE, (0.0, 0.3), (64, 24))
         if c[1] in ("none", "causal") or (c[0][0] != "flash" and (c[0][0], c[1]) != ("cudnn", "bias"))]
"""Without what the kernels cannot do: masks (flash), and gradients of a bias (cuDNN)."""


class Attention(nn.Module):
    """Two blocks, so that one of them is made again."""

    def __init__(self, mask: str, dropout: float, width: int = 64, heads: int = 2):
        super().__init__()
        self.mask, self.dropout, self.heads = mask, dropout, heads
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
                                    for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads, 1, 1)) if mask == "bias" else None

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, length, width = x.shape
        mask: Tensor | None = None
        if "padding" in self.mask:
            mask = keep[:, None, None, :].expand(batch, 1, length, length)
        if self.mask == "padding and causal":
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if self.bias is not None:
            place = torch.arange(length, device=x.device)
            mask = (self.bias * (place[None] - place[:, None]).abs() * 0.1).to(x.dtype)[None].expand(batch, -1, -1, -1)
        for layer in self.layers:
            q, k, v = layer["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                                               is_causal=self.mask == "causal")
            x = x + layer["out"](y.transpose(1, 2).reshape(batch, length, width))
        return x.square().mean()


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch)
    loss.backward()
    return loss.detach(), {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().double() for n, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return torch.stack([(a[n] - b[n]).norm() for n in b]).norm().item()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_attention(case: Any):
    (kernel, dtype), mask, recompute, dropout, length = case
    torch.manual_seed(0)
    model = Attention(mask, dropout).cuda()
    keep = torch.arange(length) < torch.tensor([length, length - 3, length - 1, 5])[:, None]
    batch = {"x": torch.randn(4, length, 64).cuda(), "keep": keep.cuda()}
    plan = f"recompute={recompute}" + (",param_dtype=bf16" if dtype == "bf16" else "")
    with sdpa_kernel(KERNELS[kernel]):
        module = fxpar.parallelize(copy.deepcopy(model), plan, batch, backend="inductor")
        have = gradients(module, batch)
    if dropout:
        step = fxpar.simulate(model, "dp=1", batch).step(**batch, seed=module.seed * 1_000_003 + 1)
        want, narrow = (step.loss, {n: g.double() for n, g in step.grads.items()}), None
        half = fxpar.simulate(model, "param_dtype=bf16", batch).step(**batch, seed=module.seed * 1_000_003 + 1)
        narrow = {n: g.double() for n, g in half.grads.items()}
    else:
        with sdpa_kernel(SDPBackend.MATH):
            want = gradients(copy.deepcopy(model), batch)
            narrow = gradients(copy.deepcopy(model).bfloat16(), {"x": batch["x"].bfloat16(), "keep": batch["keep"]})[1]
    size = distance(want[1], {n: torch.zeros_like(g) for n, g in want[1].items()})
    assert distance(have[1], want[1]) <= (1e-5 * size if dtype == "fp32" else 1.5 * distance(narrow, want[1]))
    assert abs(have[0] - want[0]) <= (1e-6 if dtype == "fp32" else 1e-2) * abs(want[0])
