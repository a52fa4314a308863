"""Measures what a choice of compiled programs does to a step: without and with it, in turns, in the same processes.

    torchrun --nproc-per-node=2 benchmarks/turns.py                   tp=2, its gathers and scatters hidden behind products:
                                                                      off; on, by copy engines; on, by NCCL
    torchrun --nproc-per-node=4 benchmarks/turns.py --trace DIR       tp=4, and what kernels take in one step of each
    torchrun --nproc-per-node=2 benchmarks/turns.py --plan dp=2,zero=3 --variants flat once
                                                                      equal blocks compiled each by itself, or once for all
    torchrun --nproc-per-node=2 benchmarks/turns.py --plan dp=2,ep=2 --experts 8 --ffn 3584 --variants flat once
                                                                      the same of a mixture of experts
    torchrun --nproc-per-node=2 benchmarks/turns.py --quick           tiny, over gloo on CPUs: tries the script only

All variants are modules of the same processes, with the same weights and batch; each takes its turn of a few steps, round after
round, so that a machine's clock and heat are the same for all. Rank 0 prints one JSON line for each, and whether losses agree.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics

import bench_fxpar as bench
import torch
import torch.distributed as dist
from processes import start_processes
from transformers import MixtralConfig, MixtralForCausalLM

import fxpar

VARIANTS = {
    "off": dict(tp_comm_overlap=False),
    "on": dict(tp_comm_overlap=True),
    "on, NCCL": dict(tp_comm_overlap=True, transport="nccl"),
    "flat": dict(blocks="flat"),
    "once": dict(blocks="once"),
}
QUICK = dict(layers=2, hidden=64, heads=4, kv_heads=4, ffn=128, vocab=256, seq=64, mbs=2, steps=2, warmup=1)
AGREE = 1e-3
"""How far apart losses may be, as a part of the first one: products of parts are rounded to bf16 by other kernels."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in bench.SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--plan", help="instead of tp over all GPUs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3])
    parser.add_argument("--rounds", type=int, default=4, help="turns of each variant, of --steps steps")
    parser.add_argument("--cuda-graphs", action="store_true", help="record them where that is faster")
    parser.add_argument("--experts", type=int, default=0, help="Mixtral with so many, two of which take each token")
    parser.add_argument("--fp32", action="store_true", help="compute in fp32, where roundings hardly change who takes a token")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trace", type=pathlib.Path, metavar="DIR", help="profile one more step of each")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def built(name, args, device):
    """The module of a variant, and what does one of its steps."""
    torch.manual_seed(args.seed)
    config = bench.config_of(args)
    with device:
        model = bench.LlamaForCausalLM(config) if not args.experts else MixtralForCausalLM(MixtralConfig(
            **config.to_diff_dict() | dict(num_local_experts=args.experts, experts_implementation="grouped_mm")))
    model.float().train()
    tokens = torch.zeros(args.mbs, args.seq, dtype=torch.long, device=device)
    module = fxpar.parallelize(model, args.plan, dict(input_ids=tokens, labels=tokens), backend="inductor",
                               cuda_graphs="auto" if args.cuda_graphs else False, **VARIANTS[name])
    opt = torch.optim.AdamW(module.parameters(), lr=args.lr, fused=True)
    return module, bench.training_step(args, module, opt, bench.replica_batch(args, module, device))


def turn(step, args, synchronize, cuda):
    """Seconds and losses of the steps of one turn, and bytes that were held besides what was there before."""
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, _, losses = bench.run_steps(step, args.steps, synchronize)
    return seconds, losses, torch.cuda.max_memory_allocated() - before if cuda else 0


def main():
    args = parse_args()
    device = start_processes(False if args.quick else None)
    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    plan = fxpar.Plan.parse(args.plan or f"tp={dist.get_world_size()}")
    args.plan = dataclasses.replace(plan, outputs="loss", **{} if args.fp32 else dict(param_dtype="bf16", reduce_dtype="fp32"))
    made = {name: built(name, args, device) for name in args.variants}
    found = {name: dict(seconds=[], losses=[], held=0) for name in made}
    for name, (_, step) in made.items():
        found[name]["losses"] += bench.run_steps(step, args.warmup, synchronize)[2]
    for _ in range(args.rounds):
        for name, (_, step) in made.items():
            dist.barrier()
            seconds, losses, held = turn(step, args, synchronize, cuda)
            found[name]["seconds"] += seconds
            found[name]["losses"] += losses
            found[name]["held"] = max(held, found[name]["held"])
    apart = {}
    for name, (module, step) in made.items():
        if args.trace:
            args.trace.mkdir(parents=True, exist_ok=True)
            bench.write_trace(step, synchronize, cuda, args.trace / f"{name.replace(', ', '-')}.json")
        row = found[name]
        first = found[args.variants[0]]["losses"]
        apart[name] = max(abs(a - b) for a, b in zip(row["losses"], first, strict=True)) / abs(first[0])
        median = bench.slowest(statistics.median(row["seconds"]), device)
        line = dict(variant=name, plan=str(args.plan), step_ms=round(median * 1e3, 3),
                    step_ms_min=round(min(row["seconds"]) * 1e3, 3), step_ms_max=round(max(row["seconds"]) * 1e3, 3),
                    held_gib=round(bench.slowest(row["held"], device) / 2**30, 3), loss=row["losses"][-1],
                    losses_apart=apart[name], told=module.report().tp_comm_overlap,
                    lowering_s=round(sum(s for part, s in module.report().timings.parts.items() if "lowering" in part), 1),
                    gpu=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__)
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)
    if dist.get_rank() == 0:
        print(json.dumps({"losses_agree": max(apart.values()) <= AGREE, "most_apart": max(apart.values())}), flush=True)
    dist.destroy_process_group()
    if max(apart.values()) > AGREE:
        raise SystemExit("losses differ")


if __name__ == "__main__":
    main()
