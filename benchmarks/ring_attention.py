"""Attention alone, forward and backward: fxpar's ring over 2 and 4 GPUs, one GPU, and PyTorch's context parallelism.

    torchrun --nproc-per-node=4 benchmarks/ring_attention.py
    torchrun --nproc-per-node=2 benchmarks/ring_attention.py --lengths 32768
    torchrun --nproc-per-node=2 benchmarks/ring_attention.py --cpu          tiny, over gloo: tries the script only

Causal, bf16, 32 heads of queries and 8 of keys, head dim 128, one sequence. For every length and every kernel (cuDNN,
FlashAttention) one GPU's `scaled_dot_product_attention` is timed, and then, over groups of 2, 4 and 8 GPUs, `ring_attention` and
PyTorch's `torch.distributed.tensor.experimental.context_parallel`, which deals out the sequence in zigzag too, with each of its
two ways to move keys. The median of the rounds is taken; of n ranks that of the slowest. A line of JSON for each, and a table of
ratios at the end: the speedup over one GPU, that as a part of n, the ring's milliseconds with a sliding window (`--window`), and
PyTorch's time as a multiple of fxpar's.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the fxpar of this checkout

from fxpar.backends.transport.runtime import GroupRuntime
from fxpar.ops.ring import costs
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.ring.schedule import RingSchedule
from fxpar.ops.runtime import use_runtime
from fxpar.sharding.mesh import BoundMesh, Mesh

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Step = Callable[[], None]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--kernels", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=4096, help="of the ring that is timed with a sliding window, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        args.lengths, args.heads, args.kv_heads, args.head_dim, args.rounds, args.kernels = [256], 4, 2, 16, 2, ["flash"]
        args.window = 64
    return args


def operands(args: argparse.Namespace, length: int, device: torch.device) -> list[Tensor]:
    """q, k, v and the cotangent of the result, as a model has them: heads inside of positions."""
    dtype = torch.float32 if args.cpu else torch.bfloat16
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    made = [torch.randn(1, length, h, args.head_dim, device=device, dtype=dtype).transpose(1, 2) for h in heads]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def differentiated(attend: Callable[[Tensor, Tensor, Tensor], Tensor], args: argparse.Namespace, length: int,
                   device: torch.device) -> Step:
    """Forward and backward."""
    q, k, v, grad = operands(args, length, device)

    def step() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    return step


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For what cannot take fewer heads of keys."""
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=True)


def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ring_attention(q, k, v, ("cp",), causal=True, zigzag=True)


def windowed(window: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The ring of a sliding window, whose work is even without zigzag."""
    return lambda q, k, v: ring_attention(q, k, v, ("cp",), causal=True, window=window)


@contextlib.contextmanager
def torchs(mesh: DeviceMesh, rotate: str, ranks: int) -> Iterator[None]:
    """PyTorch's context parallelism: inside, `scaled_dot_product_attention` takes a rank's part."""
    set_rotate_method(rotate)
    placeholder = torch.zeros(2 * ranks, device=mesh.device_type)  # it wants a tensor to deal out; ours are dealt out
    with context_parallel(mesh, buffers=[placeholder], buffer_seq_dims=[0], no_restore_buffers={placeholder}):
        yield


def seconds(step: Step, device: torch.device, group: dist.ProcessGroup | None, rounds: int) -> float:
    """The median of the rounds, on the slowest rank of the group."""
    found = []
    for number in range(rounds + 2):
        if group is not None:
            dist.barrier(group)
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if number >= 2:
            found.append(time.perf_counter() - start)
    worst = torch.tensor(statistics.median(found), device=device)
    if group is not None:
        dist.all_reduce(worst, dist.ReduceOp.MAX, group)
    return worst.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    most = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return most


def timed(name: str, make: Callable[[], Step], device: torch.device, group: dist.ProcessGroup | None, args: argparse.Namespace,
          about: dict) -> dict:
    """A line of results. What fails is said so: the rest goes on."""
    line = {"name": name, **about}
    peak_gib(device)
    try:
        line["ms"] = 1e3 * seconds(make(), device, group, args.rounds)
        line["peak_gib"] = round(peak_gib(device), 2)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        line["error"] = str(error).splitlines()[0][:200]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return line


def main() -> None:
    args = parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as for everyone else here
    device = torch.device("cpu") if args.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if args.cpu:
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(seconds=300), device_id=device)
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [n for n in (2, 4, 8) if n <= world and world % n == 0]
    lines = []
    for ranks in sizes:
        bound = BoundMesh(Mesh(("replica", "cp"), (world // ranks, ranks)), device.type)
        group, mesh = bound.group(("cp",)), bound.device_mesh["cp"]
        for length in args.lengths:
            schedule = RingSchedule(ranks, length // ranks, length // ranks, causal=True, zigzag=True)
            shapes = [(1, h, length // ranks, args.head_dim) for h in (args.heads, args.kv_heads)]
            work = sum(costs.flops(schedule, shapes[0], shapes[1]))
            workspace = max(costs.workspace_bytes(schedule, shapes[0], shapes[1], shapes[1], torch.bfloat16))
            for kernel in args.kernels:
                with sdpa_kernel(BACKENDS[kernel]) if not args.cpu else contextlib.nullcontext():
                    about = {"gpus": ranks, "tokens": length, "kernel": kernel}
                    for name, many, make in peers(args, bound, mesh, length, ranks, kernel, device):
                        line = timed(name, make, device, group if many else None, args, about)
                        if "ms" in line and many and name != "fxpar window":
                            line["tflops_per_gpu"] = round(work / line["ms"] / 1e9, 1)
                        if "ms" in line and name == "fxpar ring":
                            line["workspace_gib"] = round(workspace / 2**30, 2)
                        lines.append(line)
                        if rank == 0:
                            print(json.dumps(line), flush=True)
    if rank == 0:
        table(lines)
    dist.destroy_process_group()


def peers(args: argparse.Namespace, bound: BoundMesh, mesh: DeviceMesh, length: int, ranks: int, kernel: str,
          device: torch.device) -> Iterator[tuple[str, bool, Callable[[], Step]]]:
    """(name, whether it runs on several ranks, what makes its step) of what is compared."""
    yield "one GPU", False, lambda: differentiated(whole, args, length, device)
    runtime = GroupRuntime(bound)
    with use_runtime(runtime):
        yield "fxpar ring", True, lambda: differentiated(ring, args, length // ranks, device)
        if kernel == "flash":  # the one that knows windows
            yield "fxpar window", True, lambda: differentiated(windowed(args.window), args, length // ranks, device)
    if args.cpu:
        return  # PyTorch's knows GPUs' kernels alone
    for rotate in ("allgather", "alltoall"):
        for name, attend in (("", whole), (", K and V repeated", repeated)):
            with torchs(mesh, rotate, ranks):
                yield f"PyTorch {rotate}{name}", True, lambda attend=attend: differentiated(attend, args, length // ranks, device)


def table(lines: list[dict]) -> None:
    """Ratios: of one GPU's time to fxpar's, and of PyTorch's to fxpar's."""
    of: dict[tuple, dict[str, float]] = {}
    for line in lines:
        if "ms" in line:
            of.setdefault((line["gpus"], line["tokens"], line["kernel"]), {})[line["name"]] = line["ms"]
    print(f"{'GPUs':>4} {'tokens':>7} {'kernel':>6} {'ring ms':>9} {'speedup':>8} {'of n':>6} {'window':>9}  PyTorch / fxpar")
    for (gpus, tokens, kernel), ms in of.items():
        if "fxpar ring" not in ms:
            continue
        mine, one = ms["fxpar ring"], ms.get("one GPU", float("nan"))
        theirs = {name.removeprefix("PyTorch "): t for name, t in ms.items() if name.startswith("PyTorch")}
        slid = ms.get("fxpar window", float("nan"))
        others = ", ".join(f"{name} {t / mine:.2f}" for name, t in theirs.items())
        speedup = one / mine
        print(f"{gpus:>4} {tokens:>7} {kernel:>6} {mine:>9.2f} {speedup:>8.2f} {speedup / gpus:>6.0%} {slid:>9.2f}  {others}")


if __name__ == "__main__":
    main()
