"""What tests/ops/ring/test_gpu.py starts on every GPU: ring attention over NCCL, against one GPU.

    torchrun --nproc-per-node=2 tests/ring_program.py

All of `gpu_cases` with every kernel, one after the other, as autograd runs it and compiled by Inductor. Rank 0 prints a line of
JSON per case: {"case", "error" (empty if all is right)}.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxpar import compat
from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.runtime import use_runtime
from fxpar.sharding.mesh import BoundMesh, Mesh
from tests.ring_cases import Case, off

KERNELS = {
    "math fp32": ([SDPBackend.MATH], torch.float32), "efficient fp32": ([SDPBackend.EFFICIENT_ATTENTION], torch.float32),
    "flash bf16": ([SDPBackend.FLASH_ATTENTION], torch.bfloat16), "cudnn bf16": ([SDPBackend.CUDNN_ATTENTION], torch.bfloat16),
    "efficient bf16": ([SDPBackend.EFFICIENT_ATTENTION], torch.bfloat16),
    "any bf16": ([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], torch.bfloat16),
}  # fmt: skip


def gpu_cases(ranks: int) -> Iterator[tuple[str, Case]]:
    """Names and cases, in float32 and on the CPU, equal on all ranks."""
    gen = torch.Generator().manual_seed(11)
    causal, zigzag = {"causal": True}, {"causal": True, "zigzag": True}
    segments, small = ("q_segments", "kv_segments"), {"causal": True, "window": 50}
    kinds: dict[str, tuple[dict, tuple[str, ...]]] = {
        "zigzag": (zigzag, ()), "in order": (causal, ()), "not causal": ({}, ()), "a small window": ({**zigzag, **small}, ()),
        "a small window in order": ({**small, "scale": 0.2}, ()), "a large window": ({**zigzag, "window": 190}, ()),
        "documents": (zigzag, segments), "documents in windows": (small, segments), "padding": (zigzag, ("kv_valid",)),
        "padding, not causal": ({}, ("kv_valid",)),
    }  # fmt: skip
    for name, (settings, ids) in kinds.items():
        for mine, heads, kv, d, e in ((256, 4, 4, 64, 64), (256, 8, 2, 128, 128), (146, 6, 3, 36, 36), (74, 4, 1, 64, 32)):
            length = mine * ranks
            q, k, v = (torch.randn(2, length, h, width, generator=gen).transpose(1, 2) for h, width in (
                (heads, d), (kv, d), (kv, e)))
            documents = (torch.arange(length) // 100)[None] + torch.tensor([[0], [1]]) * (torch.arange(length) > 30)
            valid = torch.arange(length) < torch.tensor([[length], [length // 2 - 7]])
            whole = {"q_segments": documents, "kv_segments": documents.clone(), "kv_valid": valid}
            yield f"{name}, {mine} of {heads}/{kv} x {d}, {e}", Case(ranks, q, k, v, {i: whole[i] for i in ids}, settings)


def tolerance(case: Case, want: list[Tensor]) -> float:
    """What `off` may be: rounding; of 16-bit operands, half as much again as plain products in their dtype lose."""
    return 1e-5 if case.q.dtype == torch.float32 else 1.5 * off(case.whole(case.q.dtype), want)


def step(case: Case, rank: int, compiled: bool) -> list[Tensor]:
    """A rank's part of the result and of the gradients."""
    operands, ids = case.operands(rank), case.ids_of(rank)
    graph = fx.Graph()
    nodes = [graph.placeholder(n) for n in ("q", "k", "v", *ids)]
    made = graph.call_function(ring_attention, (*nodes[:3], ("cp",)), {**dict(zip(ids, nodes[3:], strict=True)), **case.settings})
    graph.output((made,))
    module, given = fx.GraphModule(nn.Module(), graph), [*operands, *ids.values()]
    (out,) = (compat.compile_graph(module, given) if compiled else module)(*given)
    return [out.detach(), *torch.autograd.grad(out, operands, case.cut(case.grad, rank))]


def error_of(case: Case, rank: int, compiled: bool) -> str:
    want = case.whole()
    have = step(case, rank, compiled)
    distance, most = off(have, [case.cut(x, rank) for x in want], of=want), tolerance(case, want)
    return "" if distance <= most else f"rank {rank} is {distance:.2e} off, of {most:.2e}"


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=device)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    bound = BoundMesh(Mesh(("cp",), (ranks,)), "cuda")
    bound.group(("cp",))
    with use_runtime(GroupRuntime(bound)):
        for name, (backends, dtype) in KERNELS.items():
            for number, (kind, case) in enumerate(gpu_cases(ranks)):
                case = case.to(device).to(dtype)
                try:
                    with sdpa_kernel(backends):
                        error = error_of(case, rank, compiled=number % 16 == 1)
                except Exception:
                    error = traceback.format_exc()
                errors: list[str] = [""] * ranks
                dist.all_gather_object(errors, error)
                if rank == 0:
                    print(json.dumps({"case": f"{name}: {kind}", "error": next(filter(None, errors), "")}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
