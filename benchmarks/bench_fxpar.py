"""Measures one plan: Hugging Face's LlamaForCausalLM as it is, parallelized by fxpar, one process a GPU.

    torchrun --nproc-per-node=2 benchmarks/bench_fxpar.py --plan tp=2
    torchrun --nproc-per-node=2 benchmarks/bench_fxpar.py --plan dp=2 --trace trace.json

bf16 compute, fp32 master weights and reductions, fused AdamW, the model's own loss. Rank 0 prints one JSON
line. Without a GPU it runs over gloo, for trying it out at tiny sizes.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import re
import statistics
import time
from collections import defaultdict

import torch
import torch.distributed as dist
import transformers
from processes import start_processes
from torch.autograd import DeviceType
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar

SHAPE = dict(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256, seq=8192, mbs=2, steps=8, warmup=4)

STEP = "fxpar_step"

# Kernel (on CPU: operator) names by what they do; the first match counts. Inductor names a fused pointwise
# kernel after all that went into it, attention and matmuls nearby included, so that those come first.
CATEGORIES = {
    "other": r"^triton_(?!tem)",
    "nccl": r"nccl|symm_mem|^memcpy (ptop|dtod)|barrier_kernel|multimem|one_shot_all|two_shot_all|gloo|c10d",
    "attention": r"flash|fmha|sdpa|attention|attn",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|triton_tem_.*mm|::\w*mm\b",
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--plan", default="dp=1", help="for example tp=2; mbs is per replica and microbatch")
    parser.add_argument("--param-dtype", default="bf16", help="compute dtype; none: fp32, as the weights")
    parser.add_argument("--reduce-dtype", default="fp32", help="gradient reduction dtype; none: as the weights")
    parser.add_argument("--backend", default="auto", choices=["auto", "inductor", "eager"])
    parser.add_argument("--cuda-graphs", default="auto", choices=["auto", "True", "False"])
    parser.add_argument("--capturable", action="store_true", help="an optimizer whose step may be recorded, too")
    parser.add_argument("--blocks", default="auto", choices=["auto", "once", "flat"], help="how equal blocks are compiled")
    parser.add_argument("--meta", action="store_true", help="build on meta, then init_weights(seed)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of one GPU")
    parser.add_argument("--trace", metavar="FILE", help="profile one more step; write its time by kernel category")
    args = parser.parse_args()
    dtypes = dict(param_dtype=args.param_dtype, reduce_dtype=args.reduce_dtype)
    args.plan = dataclasses.replace(fxpar.Plan.parse(args.plan), outputs="loss", **dtypes)
    return args


def config_of(args):
    return LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, vocab_size=args.vocab,
        max_position_embeddings=args.seq, use_cache=False, tie_word_embeddings=False,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def build_module(args, device):
    """The model in fp32 on `device` (or meta, filled afterwards) under the plan, and how long that took."""
    torch.manual_seed(args.seed)
    with torch.device("meta") if args.meta else device:
        model = LlamaForCausalLM(config_of(args)).float().train()
    tokens = torch.zeros(args.mbs * args.plan.microbatches, args.seq, dtype=torch.long, device=device)
    example = dict(input_ids=tokens, labels=tokens)
    start = time.perf_counter()
    graphs = {"True": True, "False": False}.get(args.cuda_graphs, "auto")
    module = fxpar.parallelize(model, args.plan, example, backend=args.backend, cuda_graphs=graphs, blocks=args.blocks)
    seconds = time.perf_counter() - start
    if args.meta:
        module.init_weights(args.seed)
    return module, seconds


def replica_batch(args, module, device):
    """This replica's part of one fixed random global batch."""
    rows = args.mbs * args.plan.microbatches
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(0, args.vocab, (rows * args.plan.dp, args.seq), generator=generator)
    tokens = tokens[module.replica * rows : (module.replica + 1) * rows].to(device)
    return dict(input_ids=tokens, labels=tokens)


def training_step(args, module, opt, batch):
    """A function that does one whole step and returns its loss."""

    def step():
        if args.plan.pp > 1 or args.plan.microbatches > 1:
            loss = module.train_step(**batch)
        else:
            outputs = module(**batch)
            loss = getattr(outputs, "loss", outputs)
            loss.backward()
        module.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def run_steps(step, count, synchronize):
    """Seconds, those of them that the host takes to start a step, and loss of each of `count` steps."""
    seconds, started, losses = [], [], []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        loss = step()
        started.append(time.perf_counter() - start)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds, started, losses


def flops_per_token(args):
    """Model FLOPs, forward and backward, with causal attention counted once per pair that attends."""
    head_dim = args.hidden // args.heads
    attention = args.hidden * head_dim * (2 * args.heads + 2 * args.kv_heads)
    matmul_params = args.layers * (attention + 3 * args.hidden * args.ffn) + args.hidden * args.vocab
    return 6 * matmul_params + 6 * args.layers * args.hidden * args.seq


def slowest(value, device):
    """The largest of all ranks' values."""
    value = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


# ---- the profile of one step ----


def write_trace(step, synchronize, cuda, path):
    """Runs one step on every rank; rank 0 profiles it and writes a summary."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if cuda else [activity.CPU]
    first = dist.get_rank() == 0
    profiler = torch.profiler.profile(activities=activities) if first else contextlib.nullcontext()
    dist.barrier()
    with profiler:
        with torch.profiler.record_function(STEP):
            step()
        synchronize()
    if first:
        events = profiler.events()
        summary = summarize(kernel_intervals(events, cuda), cuda)
        start = next(e.time_range.start for e in events if e.name == STEP and e.device_type == DeviceType.CPU)
        summary["first_kernel_after_ms"] = (min(e.time_range.start for e in events if e.device_type == DeviceType.CUDA
                                                and not e.is_user_annotation) - start) / 1e3 if cuda else None
        pathlib.Path(path).write_text(json.dumps(summary, indent=2) + "\n")


def kernel_intervals(events, cuda):
    """(name, start, end) in microseconds of every kernel; on CPU of every operator's own time."""
    if cuda:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        return [(e.name, e.time_range.start, e.time_range.end) for e in kernels]
    own = [(e.name, e.time_range.start, e.self_cpu_time_total) for e in events if not e.is_user_annotation]
    return [(name, start, start + duration) for name, start, duration in own]


def category(name):
    return next((kind for kind, pattern in CATEGORIES.items() if re.search(pattern, name.lower())), "other")


def summarize(intervals, cuda):
    """Total time and count by category, the time when only communication ran, and the longest kernels."""
    total, count, by_name = defaultdict(float), defaultdict(int), defaultdict(lambda: [0.0, 0])
    for name, start, end in intervals:
        total[category(name)] += end - start
        count[category(name)] += 1
        by_name[name][0] += end - start
        by_name[name][1] += 1
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:30]
    summary = dict(total_ms={k: round(total[k] / 1e3, 3) for k in CATEGORIES}, count=count)
    if cuda:
        busy = covered(intervals)
        compute = covered([i for i in intervals if category(i[0]) != "nccl"])
        span = max(end for *_, end in intervals) - min(start for _, start, _ in intervals)
        summary |= dict(span_ms=span / 1e3, exposed_nccl_ms=(busy - compute) / 1e3, idle_ms=(span - busy) / 1e3)
    rows = [dict(name=n[:160], kind=category(n), ms=round(t / 1e3, 3), count=c) for n, (t, c) in longest]
    return summary | dict(longest=rows)


def covered(intervals):
    """How much time at least one of the intervals covers."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure(args, device):
    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    module, build_seconds = build_module(args, device)
    lr = torch.tensor(args.lr, device=device) if args.capturable else args.lr
    opt = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True,
                            capturable=args.capturable)
    step = training_step(args, module, opt, replica_batch(args, module, device))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    warm_seconds, _, losses = run_steps(step, max(args.warmup, 1), synchronize)
    dist.barrier()
    seconds, started, more = run_steps(step, args.steps, synchronize)
    losses += more
    memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
    if args.trace:
        write_trace(step, synchronize, cuda, args.trace)
    report = module.report()
    parts = {part: round(spent, 2) for part, spent in report.timings.parts.items()}
    return build_seconds, warm_seconds[0], seconds, started, losses, memory, report.cuda_graphs, parts


def result(args, device, build_seconds, first_seconds, seconds, started, losses, memory, graphs, parts):
    """The line that is printed; every rank must call this, as it takes the slowest rank's figures."""
    world, plan = dist.get_world_size(), args.plan
    median = slowest(statistics.median(seconds), device)
    parallelize_s, first_s = slowest(build_seconds, device), slowest(first_seconds, device)
    memory = [slowest(value, device) / 2**30 for value in memory]
    batch = args.mbs * plan.microbatches * plan.dp
    tokens = batch * args.seq / median
    flops = tokens * flops_per_token(args) / world
    return dict(
        impl=f"fxpar, transformers {transformers.__version__} unmodified", plan=str(plan),
        backend=args.backend, torch=torch.__version__, world=world,
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{name: getattr(args, name) for name in SHAPE}, gbs=batch, meta=args.meta,
        step_ms=round(median * 1e3, 3), step_ms_min=round(min(seconds) * 1e3, 3),
        step_ms_max=round(max(seconds) * 1e3, 3), host_ms=round(statistics.median(started) * 1e3, 3), cuda_graphs=graphs,
        tokens_per_s=round(tokens, 1),
        tokens_per_s_per_gpu=round(tokens / world, 1), tflops_per_gpu_causal=round(flops / 1e12, 2),
        mfu_causal=round(flops / (args.peak_tflops * 1e12), 4),
        peak_mem_gib=round(memory[0], 3), peak_reserved_gib=round(memory[1], 3),
        parallelize_s=round(parallelize_s, 2), first_s=round(first_s, 2),
        compile_s=round(parallelize_s + first_s, 2),  # what a user waits for the end of the first step
        parts=parts,
        loss=round(losses[-1], 6), first_loss=round(losses[0], 6), last_loss=round(losses[-1], 6),
    )  # fmt: skip


def main():
    args = parse_args()
    device = start_processes()
    try:
        line = result(args, device, *measure(args, device))
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
