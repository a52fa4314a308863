"""Times the kernels of attention with dropout alone, beside PyTorch's own, and with other tiles; one GPU.

    python benchmarks/attention.py               the shapes of GPT-2 and BERT-large, and heads of 128
    python benchmarks/attention.py --tiles       each kernel with every tile below, the fastest first

PyTorch draws its dropout from where a thread is, fxpar from where an element is: times are compared, not numbers.
"""

import argparse
import itertools
import pathlib
import sys

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the fxpar of this checkout
from fxpar.ops.dropout_attention import attend, attend_backward
from fxpar.ops.kernels import flash
from fxpar.ops.kernels.flash import Tiles

SHAPES = {"gpt2": (8, 25, 1024, 64, True), "bert": (32, 16, 512, 64, False), "128": (4, 16, 2048, 128, True)}
"""Batch, heads, length, head dim, whether it is causal."""
TILES = [Tiles(*t) for t in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]


def operands(shape, dtype):
    b, h, length, d, causal = shape
    q, k, v, grad = (torch.randn(b, length, h, d, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4))
    heads = torch.arange(b * h, device="cuda").view(b, h)
    options = (0.1, 3, d**-0.5, causal, 0, 0, length, False)
    return q, k, v, grad, torch.tensor(12345, device="cuda"), heads, options


def milliseconds(function):
    return triton.testing.do_bench(function, warmup=10, rep=50)


def beside_pytorch(shape, dtype):
    q, k, v, grad, seed, heads, options = operands(shape, dtype)
    made = attend(q, k, v, None, seed, heads, *options)
    times = [milliseconds(lambda: attend(q, k, v, None, seed, heads, *options)),
             milliseconds(lambda: attend_backward(grad, q, k, v, None, seed, heads, *made, *options))]  # fmt: skip
    print(f"  fxpar: forward {times[0]:.3f} ms, backward {times[1]:.3f} ms")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(*leaves, dropout_p=0.1, is_causal=shape[-1])
                forward = milliseconds(lambda: F.scaled_dot_product_attention(*leaves, dropout_p=0.1, is_causal=shape[-1]))
                backward = milliseconds(lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True))
            print(f"  PyTorch, {kernel.name}: forward {forward:.3f} ms, backward {backward:.3f} ms")
        except RuntimeError as error:
            print(f"  PyTorch, {kernel.name}: {str(error).splitlines()[0][:100]}")


def with_tiles(shape, dtype):
    q, k, v, grad, seed, heads, options = operands(shape, dtype)
    out, top, rest = attend(q, k, v, None, seed, heads, *options)
    delta, results = torch.empty_like(top), [torch.empty_like(x) for x in (q, k, v)]
    call = flash.Call(q, k, v, None, seed, heads, *options)
    kernels = {
        "forward": lambda t: flash.forward(call, out, top, rest, t),
        "queries": lambda t: flash.backward_of_queries(call, grad, out, top, rest, delta, results[0], t),
        "keys": lambda t: flash.backward_of_keys(call, grad, top, rest, delta, results[1], results[2], t),
    }
    for name, kernel in kernels.items():
        found = []
        for tiles in TILES:
            try:
                found.append((milliseconds(lambda kernel=kernel, tiles=tiles: kernel(tiles)), tiles))
            except triton.runtime.errors.OutOfResources:
                continue
        chosen = milliseconds(lambda kernel=kernel: kernel(None))
        print(f"  {name}: {chosen:.3f} ms as chosen; " + "; ".join(
            f"{ms:.3f} {t.rows}x{t.columns}, {t.warps} warps, {t.stages} stages"
            for ms, t in sorted(found, key=lambda f: f[0])[:6]), flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    for name in args.shapes:
        print(f"{name}: batch, heads, length, head dim, causal = {SHAPES[name]}", flush=True)
        (with_tiles if args.tiles else beside_pytorch)(SHAPES[name], getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
