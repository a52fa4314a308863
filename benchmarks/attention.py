"""Times attention with dropout alone: fxpar's kernels, what programs have without them, and PyTorch's own kernels; one GPU.

    python benchmarks/attention.py               the shapes of GPT-2 and BERT-large, and heads of 128
    python benchmarks/attention.py --tiles       each kernel with every tile below, the fastest first

Time and memory are those of a forward and a backward pass; what a forward keeps for its backward is "kept". PyTorch draws its
dropout from where a thread is, fxpar from where an element is: times are compared, not numbers.
"""

import argparse
import itertools
import pathlib
import sys

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the fxpar of this checkout
from fxpar.ops.dropout_attention import attend, dropout_attention
from fxpar.ops.kernels import flash
from fxpar.ops.kernels.flash import Tiles
from fxpar.ops.rng import dropout_mask

SHAPES = {"gpt2": (8, 25, 1024, 64, True), "bert": (32, 16, 512, 64, False), "128": (4, 16, 2048, 128, True)}
"""Batch, heads, length, head dim, whether it is causal."""
TILES = [Tiles(rows, columns, warps, stages)
         for (rows, columns), warps, stages in itertools.product(
             ((128, 64), (128, 128), (64, 64), (64, 128), (64, 32)), (4, 8), (2, 3))]  # fmt: skip
P, SITE = 0.1, 3


def written_out(q, k, v, seed, causal):
    """As a program has it without the kernels: products around a softmax, compiled."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if causal:
        place = torch.arange(q.shape[2], device=q.device)
        scores = torch.where(place <= place[:, None], scores, float("-inf"))
    weights = torch.softmax(scores, -1)
    kept = dropout_mask(weights, seed, p=P, site=SITE)
    return torch.matmul(torch.where(kept, weights * (1 / (1 - P)), 0.0), v)


def operands(shape, dtype):
    """(queries, keys, values and the gradient of the result, as projections make them; a seed)."""
    b, h, length, d, _ = shape
    made = [torch.randn(b, length, h, d, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)]
    return made, torch.tensor(12345, device="cuda")


def milliseconds(function):
    return triton.testing.do_bench(function, warmup=10, rep=50)


def measured(forward, leaves, grad):
    """(ms forward, ms backward, MiB kept, MiB at the peak)."""
    out = forward()
    times = milliseconds(forward), milliseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    del out
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.grad(out, leaves, grad)
    return *times, kept / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20


def beside_others(name, dtype):
    shape = SHAPES[name]
    (q, k, v, grad), seed = operands(shape, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    functorch.donated_buffer = False  # a backward runs several times
    compiled = torch.compile(written_out)
    ways = {
        "fxpar's kernels": lambda: dropout_attention(*leaves, seed, p=P, site=SITE, is_causal=shape[-1]),
        "written out, compiled": lambda: compiled(*leaves, seed, shape[-1]),
    }
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def pytorch(kernel=kernel):
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(*leaves, dropout_p=P, is_causal=shape[-1])

        ways[f"PyTorch, {kernel.name}"] = pytorch
    table = Table(title=f"{name}: batch, heads, length, head dim, causal = {shape}", title_justify="left")
    for heading in ("", "forward ms", "backward ms", "both", "kept MiB", "peak MiB"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    found = {}
    for way, forward in ways.items():
        try:
            there, back, *memory = found[way] = measured(forward, leaves, grad)
            table.add_row(way, f"{there:.3f}", f"{back:.3f}", f"{there + back:.3f}", *(f"{m:.0f}" for m in memory))
        except RuntimeError as error:
            table.add_row(way, *["-"] * 5)
            print(f"{way}: {str(error).splitlines()[0]}", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if len({"fxpar's kernels", "written out, compiled"} & found.keys()) == 2:
        ours, others = found["fxpar's kernels"], found["written out, compiled"]
        time, memory = sum(ours[:2]) / sum(others[:2]), ours[3] / others[3]
        print(f"{name}: of attention that is written out fxpar's kernels take {time:.2f} of the time, {memory:.2f} of the memory",
              flush=True)  # fmt: skip


def with_tiles(name, dtype):
    shape = SHAPES[name]
    (q, k, v, grad), seed = operands(shape, dtype)
    b, h, length, d, causal = shape
    heads = torch.arange(b * h, device="cuda").view(b, h)
    options = (P, SITE, d**-0.5, causal, 0, 0, length, False)
    out, top, rest = attend(q, k, v, None, seed, heads, *options)
    delta, results = torch.empty_like(top), [torch.empty_like(x) for x in (q, k, v)]
    call = flash.Call(q, k, v, None, seed, heads, *options)
    kernels = {
        "forward": lambda t: flash.forward(call, out, top, rest, t),
        "queries": lambda t: flash.backward_of_queries(call, grad, out, top, rest, delta, results[0], t),
        "keys": lambda t: flash.backward_of_keys(call, grad, top, rest, delta, results[1], results[2], t),
    }
    for of, kernel in kernels.items():
        found = []
        for tiles in TILES:
            try:
                found.append((milliseconds(lambda kernel=kernel, tiles=tiles: kernel(tiles)), tiles))
            except triton.runtime.errors.OutOfResources:
                continue
        chosen = milliseconds(lambda kernel=kernel: kernel(None))
        print(f"{name}, {of}: {chosen:.3f} ms as chosen; " + "; ".join(
            f"{ms:.3f} {t.rows}x{t.columns}, {t.warps} warps, {t.stages} stages"
            for ms, t in sorted(found, key=lambda f: f[0])[:5]), flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    for name in args.shapes:
        (with_tiles if args.tiles else beside_others)(name, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
