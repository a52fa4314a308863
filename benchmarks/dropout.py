"""Measures models with the dropout that they have by default, under fxpar and as their users train them today, on the same GPUs.

    python benchmarks/dropout.py --gpus 2                         GPT-2 and BERT-large, each under all three; prints a table
    python benchmarks/dropout.py --gpus 1 --impls fxpar written --layers 6      whether the kernels pay, on one GPU
    python benchmarks/dropout.py --gpus 2 --models bert --padding --plan dp=2,tp=1,zero=3,recompute=selective
    python benchmarks/dropout.py --quick                          tiny, on the CPU, fxpar alone: tries the harness only

"fxpar" has the kernels of attention with dropout, "written" does without them, and the peer is Hugging Face's model with FSDP2
and torch.compile, per layer. All compute in bf16, keep weights and reduce
gradients in fp32, step with fused AdamW and clip. Every measurement is a torchrun of this file; its rank 0 prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from processes import start_processes
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

SHAPES = {"gpt2": dict(layers=24, hidden=1600, heads=25, vocab=50257, seq=1024, mbs=8),
          "bert": dict(layers=24, hidden=1024, heads=16, vocab=30522, seq=512, mbs=32)}  # fmt: skip
QUICK = dict(layers=2, hidden=64, heads=4, vocab=256, seq=32, mbs=2)
IMPLS = {"fxpar": "fxpar, attention in kernels", "written": "fxpar, attention written out",
         "peer": "Hugging Face + FSDP2, compile per layer"}  # fmt: skip


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--plan", help="of fxpar (default: dp=GPUS,zero=3)")
    parser.add_argument("--mbs", type=int, help="sequences a GPU")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--limit", type=int, default=600, help="seconds before a run is given up")
    parser.add_argument("--padding", action="store_true", help="pass BERT an attention_mask")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--impls", nargs="+", choices=list(IMPLS), help="default: all; with --quick fxpar's")
    parser.add_argument("--worker", nargs=2, metavar=("IMPL", "MODEL"), help="measure one (under torchrun)")
    args = parser.parse_args()
    args.gpus = 1 if args.quick else args.gpus
    args.plan = args.plan or f"dp={args.gpus},zero=3"
    args.impls = args.impls or list(IMPLS)[: 2 if args.quick else 3]
    return args


# ---- one measurement ----


def shape_of(args, model):
    given = {n: getattr(args, n) for n in ("mbs", "seq", "layers") if getattr(args, n) is not None}
    return (QUICK if args.quick else SHAPES[model]) | given


def build(name, shape, device):
    """The model in fp32, with its own default dropout of 0.1; and the list of its layers."""
    if name == "gpt2":
        config = GPT2Config(vocab_size=shape["vocab"], n_positions=shape["seq"], n_embd=shape["hidden"], n_layer=shape["layers"],
                            n_head=shape["heads"], use_cache=False, attn_implementation="sdpa", bos_token_id=None,
                            eos_token_id=None)  # fmt: skip
        kind = GPT2LMHeadModel
    else:
        config = BertConfig(vocab_size=shape["vocab"], max_position_embeddings=shape["seq"], hidden_size=shape["hidden"],
                            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
                            intermediate_size=4 * shape["hidden"], attn_implementation="sdpa")  # fmt: skip
        kind = BertForMaskedLM
    torch.manual_seed(0)
    with device:
        model = kind(config).float().train()
    return model, model.transformer.h if name == "gpt2" else model.bert.encoder.layer


def batch_of(name, shape, args, rank, device):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, shape["vocab"], (shape["mbs"], shape["seq"]), generator=generator).to(device)
    batch = dict(input_ids=ids, labels=ids)
    if args.padding and name == "bert":
        lengths = torch.randint(shape["seq"] // 2, shape["seq"] + 1, (shape["mbs"], 1), generator=generator)
        batch["attention_mask"] = (torch.arange(shape["seq"]) < lengths).long().to(device)
    return batch


def parallel(impl, model, layers, batch, args):
    """(what is called, what clips its gradients)."""
    if impl != "peer":
        import fxpar
        from fxpar.ops.dropout_attention import use_kernels

        use_kernels(impl == "fxpar")
        fields = [args.plan] if args.quick else [args.plan, "param_dtype=bf16", "reduce_dtype=fp32"]
        module = fxpar.parallelize(model, ",".join(fields), batch)
        return module, module.clip_grad_norm_
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, lambda norm: torch.nn.utils.clip_grad_norm_(model.parameters(), norm)


def measure(impl, name, args):
    cuda = torch.cuda.is_available() and not args.quick
    device = start_processes(cuda)
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    shape = shape_of(args, name)
    model, layers = build(name, shape, device)
    batch = batch_of(name, shape, args, dist.get_rank(), device)
    start = time.perf_counter()
    module, clip = parallel(impl, model, layers, batch, args)
    opt = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    seconds, ready = [], 0.0
    for _ in range(args.warmup + args.steps):
        synchronize()
        dist.barrier()
        begin = time.perf_counter()
        loss = module(**batch).loss
        loss.backward()
        clip(1.0)
        opt.step()
        opt.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - begin)
        ready = ready or time.perf_counter() - start
    figures = [statistics.median(seconds[args.warmup :]), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0]
    worst = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        step, peak = worst.tolist()
        print(json.dumps(dict(impl=impl, model=name, **shape, step_ms=round(step * 1e3, 2), peak_mem_gib=round(peak, 2),
                              tokens_per_s_per_gpu=round(shape["mbs"] * shape["seq"] / step, 1), compile_s=round(ready, 1),
                              loss=round(loss.item(), 4), gpu=torch.cuda.get_device_name() if cuda else "cpu",
                              torch=torch.__version__)), flush=True)  # fmt: skip
    dist.destroy_process_group()


# ---- all of them ----


def run(impl, name, args):
    """The line that a measurement prints, or the end of what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}", __file__,
               *sys.argv[1:], "--worker", impl, name]  # fmt: skip
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = os.environ | {"NCCL_NVLS_ENABLE": "0", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return f"exceeded {args.limit} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"step_ms"' in line]
    return json.loads(lines[-1]) if lines else done.stdout[-3000:]


def show(name, shape, found):
    table = Table(title=f"{name}, {', '.join(f'{n} {v}' for n, v in shape.items())}", title_justify="left")
    for heading in ("", "step ms", "tokens/s/GPU", "peak GiB", "compile s", "loss", "this / fxpar"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    ours = found.get("fxpar")
    for impl, line in found.items():
        title = IMPLS[impl]
        if isinstance(line, str):
            table.add_row(title, "failed")
            continue
        ratio = f"{line['step_ms'] / ours['step_ms']:.3f}" if impl != "fxpar" and isinstance(ours, dict) else ""
        table.add_row(title, f"{line['step_ms']:.1f}", f"{line['tokens_per_s_per_gpu']:,.0f}", f"{line['peak_mem_gib']:.1f}",
                      f"{line['compile_s']:.1f}", f"{line['loss']:.4f}", ratio)  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for line in found.values():
        print(line if isinstance(line, str) else json.dumps(line), flush=True)


def main():
    args = parse_args()
    if args.worker:
        measure(*args.worker, args)
        return
    for name in args.models:
        show(name, shape_of(args, name), {impl: run(impl, name, args) for impl in args.impls})


if __name__ == "__main__":
    main()
