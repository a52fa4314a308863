"""kernels: PyTorch's attention kernels as one form: a block of queries, a block of keys, and the log-sum-exp beside the result.

    forward(q, k, v, seen, scale)                  -> out [b, h, lq, e], lse [b, h, lq] (float32; of float64 operands, float64)
    backward(grad, q, k, v, out, lse, seen, scale) -> dq, dk, dv

q [b, h, lq, d], k [b, kv, lk, d], v [b, kv, lk, e]; kv divides h. The backward is told the result and the log-sum-exp over *all*
keys, of which k and v are a part: its results are what these keys contribute. `Seen` says which keys a query sees; of queries
that see none, forward may return anything, and backward returns nothing that is not 0 if their lse is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


@dataclass(frozen=True)
class Seen:
    """causal: query i sees the keys up to i (lq is lk). band: (left, right), query i sees the keys i + lk - lq - left ..
    i + lk - lq + right. mask: [b or 1, 1, lq, lk], true where it sees a key. At most one of them."""

    causal: bool = False
    band: tuple[int, int] | None = None
    mask: Tensor | None = None


ALL = Seen()
Forward = Callable[[Tensor, Tensor, Tensor, Seen, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Seen, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class BlockKernel:
    name: str
    forward: Forward
    backward: Backward


def accumulates_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results for `dtype` are merged and gradients added up."""
    return torch.promote_types(dtype, torch.float32)


def choose(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> BlockKernel:
    """The kernel for operands and a `Seen` without a mask: the one that `scaled_dot_product_attention` would take; else the first
    that can do it of those that users allow (``torch.nn.attention.sdpa_kernel``)."""
    if q.device.type == "cuda" and q.dtype != torch.float64:
        found = FLASH if seen.band is not None else _preferred(padded(q), padded(k), padded(v), seen.causal, scale)
        if found is not None:
            return found
    return for_masks(q, v)


def for_masks(q: Tensor, v: Tensor) -> BlockKernel:
    """The kernel for operands like these and a mask."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return CPU
    efficient = q.device.type == "cuda" and q.dtype != torch.float64 and torch.backends.cuda.mem_efficient_sdp_enabled()
    return EFFICIENT if efficient else MATH


def _preferred(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> BlockKernel | None:
    """What `scaled_dot_product_attention` would take, if it is one of those that take fewer heads of keys."""
    try:
        choice = aten._fused_sdp_choice.default(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    except RuntimeError:  # users allow no kernel that it could take
        return None
    if choice == SDPBackend.CUDNN_ATTENTION.value:  # asked of operands without gradients, it allows more than its backward takes
        return CUDNN if q.shape[-1] == v.shape[-1] <= 128 else None
    return FLASH if choice == SDPBackend.FLASH_ATTENTION.value else None


def takes_bands(q: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel that takes a band and no mask for it."""
    return (q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= 256
            and torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(q.device) >= (8, 0))


# ---- what kernels want of their operands ----


def padded(x: Tensor) -> Tensor:
    """With zeros up to a head dim that is a multiple of 8, the elements of a head side by side."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else _side_by_side(x)


def _side_by_side(x: Tensor) -> Tensor:
    """With the elements of a head side by side, as kernels want it, which `scaled_dot_product_attention` alone checks."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _widened(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """Of kernels that want such head dims, those that take any."""
    def widened_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = forward(padded(q), padded(k), padded(v), seen, scale)
        return out[..., : v.shape[-1]], lse

    def widened_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                         scale: float) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = backward(padded(grad), padded(q), padded(k), padded(v), padded(out), lse.contiguous(), seen, scale)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    return widened_forward, widened_backward


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[b, kv, l, d] -> [b, heads, l, d]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(x: Tensor, heads: int) -> Tensor:
    """The conjugate of `_repeated`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2, dtype=accumulates_in(x.dtype))


def _bias(seen: Seen, q: Tensor, keys: int, heads: int) -> Tensor | None:
    """A mask as what is added to scores; its rows begin at multiples of 16 elements."""
    if seen.mask is None:
        return None
    shape = seen.mask.shape
    bias = q.new_zeros(*shape[:3], -(-keys // 16) * 16)[..., :keys].masked_fill_(~seen.mask, -math.inf)
    return bias.expand(q.shape[0], heads, -1, -1)


# ---- CPU ----


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        *map(_side_by_side, (q, k, v)), 0.0, seen.causal, attn_mask=_bias(seen, q, k.shape[2], 1), scale=scale)
    return out, lse


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                  scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *map(_side_by_side, (grad, q, k, v, out)), lse.contiguous(), 0.0, seen.causal,
        attn_mask=_bias(seen, q, k.shape[2], 1), scale=scale)
    return dq, dk, dv


CPU = BlockKernel("cpu", _cpu_forward, _cpu_backward)


# ---- FlashAttention: no masks ----


def _window(seen: Seen) -> dict[str, Any]:
    left, right = (-1, -1) if seen.band is None else seen.band
    return {"window_size_left": left, "window_size_right": right}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward.default(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, q.shape[2], k.shape[2], 0.0, seen.causal, False, scale=scale,
        **_window(seen))
    return out.transpose(1, 2), lse.masked_fill(lse == math.inf, -math.inf)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    state, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))  # of dropout, which there is not
    dq, dk, dv = aten._flash_attention_backward.default(
        *(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse, None, None, q.shape[2], k.shape[2], 0.0, seen.causal, state,
        unused, scale=scale, **_window(seen))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


FLASH = BlockKernel("flash", *_widened(_flash_forward, _flash_backward))


# ---- cuDNN ----


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, seen.causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward.default(
        grad, q, k, v, out, lse.unsqueeze(-1), seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, seen.causal,
        scale=scale)
    return dq, dk, dv


CUDNN = BlockKernel("cudnn", *_widened(_cudnn_forward, _cudnn_backward))


# ---- memory-efficient attention: masks, and as many heads of keys as of queries ----


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(
        q, _repeated(k, heads), _repeated(v, heads), _bias(seen, q, k.shape[2], heads), True, 0.0, seen.causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                        scale: float) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv = q.shape[1], k.shape[1]
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # of it, the kernel takes it for granted that heads lie side by side
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)  # as the forward returns it
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
        grad, q, _repeated(k, heads), _repeated(v, heads), _bias(seen, q, k.shape[2], heads), out, lse, seed, offset, 0.0,
        [True, True, True, False], seen.causal, scale=scale)
    return dq, _summed(dk, kv), _summed(dv, kv)


EFFICIENT = BlockKernel("efficient", *_widened(_efficient_forward, _efficient_backward))


# ---- plain products, in float32 at least ----


def _scores(q: Tensor, k: Tensor, seen: Seen, scale: float) -> Tensor:
    """[b, kv, h / kv, lq, lk], of queries [b, kv, h / kv, lq, d]."""
    scores = torch.matmul(q, k.unsqueeze(2).mT) * scale
    if seen.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores if seen.mask is None else scores.masked_fill(~seen.mask.unsqueeze(2), -math.inf)


def _grouped(x: Tensor, kv: int) -> Tensor:
    return x.to(accumulates_in(x.dtype)).unflatten(1, (kv, -1))


def _math_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    wide = accumulates_in(q.dtype)
    scores = _scores(_grouped(q, k.shape[1]), k.to(wide), seen, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp_() @ v.to(wide).unsqueeze(2)
    return out.flatten(1, 2), lse.squeeze(-1).flatten(1, 2)


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen,
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    wide, kv = accumulates_in(q.dtype), k.shape[1]
    q, grad, out, lse = (_grouped(x, kv) for x in (q, grad, out, lse.unsqueeze(-1)))
    k, v = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)
    weights = (_scores(q, k.squeeze(2), seen, scale) - lse).exp_()
    dv = (weights.mT @ grad).sum(2)
    ds = weights.mul_(grad @ v.mT - (grad * out).sum(-1, keepdim=True)).mul_(scale)
    return (ds @ k).flatten(1, 2), (ds.mT @ q).sum(2), dv


MATH = BlockKernel("math", _math_forward, _math_backward)
