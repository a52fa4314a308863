"""Predicted and measured peak memory of a rank, plan by plan: Hugging Face's LlamaForCausalLM as it is.

    python benchmarks/memory.py                                        predictions (no GPU, no processes)
    python benchmarks/memory.py > predicted.jsonl
    torchrun --nproc-per-node=2 benchmarks/memory.py --predicted predicted.jsonl      measured, beside them

The training step is that of bench_fxpar.py. Measured with PyTorch's allocator, on the worst rank, after the first step: right
after the optimizer step (parameters and optimizer state), right after the backward pass (and gradients), and at the peak.
Plans run one after the other; one JSON line each, and a table at the end. Plans that do not take all ranks are left out.
"""

import argparse
import dataclasses
import gc
import json
import pathlib
import time

import torch
import torch.distributed as dist
from bench_fxpar import SHAPE, build_module, config_of, replica_batch, slowest, start_processes
from transformers import LlamaForCausalLM

import fxpar

PLANS = [
    "dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "tp=2", "dp=2,recompute=selective", "dp=2,recompute=full",
    "dp=2,zero=3,recompute=selective", "dp=2,zero=3,recompute=full",
]  # fmt: skip
GIB = 2**30


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SHAPE.items():
        if name not in ("steps", "warmup"):
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--plans", nargs="+", default=PLANS, help="mbs is per replica and microbatch")
    parser.add_argument("--param-dtype", default="bf16", help="compute dtype; none: fp32, as the weights")
    parser.add_argument("--reduce-dtype", default="fp32", help="gradient reduction dtype; none: as the weights")
    parser.add_argument("--outputs", default="loss", choices=["loss", "all"])
    parser.add_argument("--backend", default="auto", choices=["auto", "inductor", "eager"])
    parser.add_argument("--meta", action="store_true", help="measure: build on meta, then init_weights(seed)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--predicted", metavar="FILE", help="lines of an earlier run, instead of predicting again")
    return parser.parse_args()


def with_plan(args, text):
    """The arguments as bench_fxpar.py's functions take them."""
    options = dict(outputs=args.outputs, param_dtype=args.param_dtype, reduce_dtype=args.reduce_dtype)
    return argparse.Namespace(**{**vars(args), "plan": dataclasses.replace(fxpar.Plan.parse(text), **options)})


def predict(args):
    """The report's figures, in GiB."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(args)).float().train()
    rows = args.mbs * args.plan.microbatches * args.plan.dp
    tokens = torch.empty(rows, args.seq, dtype=torch.long, device="meta")
    start = time.perf_counter()
    report = fxpar.inspect(model, args.plan, dict(input_ids=tokens, labels=tokens))
    peak, memory = report.peak, report.memory
    between = memory["parameters"] + memory["optimizer"]
    return dict(
        predicted_peak=peak.bytes / GIB, predicted_after_step=between / GIB,
        predicted_after_backward=(between + memory["gradients"]) / GIB, kept=peak.kept / GIB, phase=peak.phase,
        where=peak.where, parts={k: v / GIB for k, v in peak.parts.items()}, predict_s=time.perf_counter() - start,
    )  # fmt: skip


def measure(args, device):
    """What the allocator says, in GiB, on the worst rank."""
    module, _ = build_module(args, device)
    opt = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = replica_batch(args, module, device)
    for i in range(3):
        if args.plan.microbatches > 1:
            loss = module.train_step(**batch)
        else:
            outputs = module(**batch)
            loss = getattr(outputs, "loss", outputs)
            loss.backward()
            del outputs
        del loss
        after_backward = torch.cuda.memory_allocated()
        module.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
        after_step = torch.cuda.memory_allocated()
        if i == 0:
            torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    found = dict(peak=torch.cuda.max_memory_allocated(), after_step=after_step, after_backward=after_backward)
    return {f"measured_{k}": slowest(v, device) / GIB for k, v in found.items()}


def free():
    """Nothing of one plan is left for the next."""
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def shape_of(args):
    return {name: getattr(args, name) for name in SHAPE if hasattr(args, name)}


def earlier(args):
    """plan text -> the line of an earlier run for the same shape and dtypes."""
    lines = pathlib.Path(args.predicted).read_text().splitlines() if args.predicted else []
    made = [json.loads(line) for line in lines if line.startswith("{")]
    return {line["plan"]: line for line in made if line.items() >= shape_of(args).items()}


def table(lines):
    head = ("plan", "predicted", "measured", "ratio", "after step", "measured", "after backward", "measured", "kept")
    names = ("predicted_peak", "measured_peak", "ratio", "predicted_after_step", "measured_after_step",
             "predicted_after_backward", "measured_after_backward", "kept")  # fmt: skip
    rows = [head, *((x["asked"], *(f"{x[n]:.3f}" if n in x else "" for n in names)) for x in lines)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)


def main():
    args = parse_args()
    cuda = torch.cuda.is_available()
    device = start_processes() if cuda else None
    first = not cuda or dist.get_rank() == 0
    known, lines = earlier(args), []
    for text in args.plans:
        chosen = with_plan(args, text)
        if cuda and chosen.plan.world_size != dist.get_world_size():
            continue
        line = dict(asked=text, plan=str(chosen.plan), torch=torch.__version__, **shape_of(args))
        if first:
            line |= known.get(str(chosen.plan)) or predict(chosen)
        if cuda:
            line |= dict(torch=torch.__version__, **measure(chosen, device))
            free()
        if first:
            if cuda:
                line["ratio"] = line["predicted_peak"] / line["measured_peak"]
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
            lines.append(line)
    if first:
        print(table(lines), flush=True)
    if cuda:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
