"""Measures a mixture of experts: Hugging Face's Mixtral under fxpar's plans, and under FSDP2 compiled per layer.

    python benchmarks/experts.py --gpus 2
    python benchmarks/experts.py --gpus 4 --impls dp=4,ep=4 dp=4,ep=4,ep_dispatch=allgather fsdp2
    torchrun --nproc-per-node=2 benchmarks/experts.py --impl dp=2,ep=2      one of them; prints one JSON line

bf16 compute, fp32 master weights and reductions, fused AdamW, gradients clipped to norm 1, the model's own loss without that of
its router. Both run the same model with `experts_implementation="grouped_mm"`. Without a GPU all run over gloo, for trying it out
at tiny sizes (FSDP2 not compiled).
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import time

import torch
import torch.distributed as dist
import transformers
from bench_fxpar import run_steps, write_trace
from processes import launched, start_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

import fxpar

SHAPE = dict(layers=8, hidden=2048, heads=32, kv_heads=8, ffn=3584, experts=8, chosen=2, vocab=32000, seq=4096, mbs=2, steps=8,
             warmup=4)
PEER = "fsdp2"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--gpus", type=int, default=2, help="how many processes to start")
    parser.add_argument("--impls", nargs="+", help=f"plans, or {PEER}; default: with and without expert parallelism")
    parser.add_argument("--impl", help="the one that this process, started by torchrun, is to measure")
    parser.add_argument("--limit", type=int, default=600, help="seconds before a run is given up")
    parser.add_argument("--fp32", action="store_true", help="compute in fp32")
    parser.add_argument("--trace", metavar="FOLDER", help="profile one more step of each; write its time by kernel category")
    return parser.parse_args()


def config(a):
    return MixtralConfig(hidden_size=a.hidden, intermediate_size=a.ffn, num_hidden_layers=a.layers, num_attention_heads=a.heads,
                         num_key_value_heads=a.kv_heads, num_local_experts=a.experts, num_experts_per_tok=a.chosen,
                         vocab_size=a.vocab, max_position_embeddings=a.seq, use_cache=False, output_router_logits=False,
                         tie_word_embeddings=False, attn_implementation="sdpa", experts_implementation="grouped_mm")


def sharded(model, a, device):
    """The model under FSDP2, each layer compiled and a unit of its own."""
    dtype = torch.float32 if a.fp32 else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        if device.type == "cuda":
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def planned(model, a, ids):
    plan = dataclasses.replace(fxpar.Plan.parse(a.impl), outputs="loss", reduce_dtype="fp32",
                               param_dtype=None if a.fp32 else "bf16")
    module = fxpar.parallelize(model, plan, {"input_ids": ids, "labels": ids})
    return module, lambda: module.clip_grad_norm_(1.0)


def measure(a):
    """What one implementation takes, as rank 0 prints it."""
    gpu = torch.cuda.is_available()
    device = start_processes()
    torch.manual_seed(0)
    with device:
        model = MixtralForCausalLM(config(a)).float().train()
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, a.vocab, (a.mbs, a.seq), device=device)
    start = time.perf_counter()
    module, clip = sharded(model, a, device) if a.impl == PEER else planned(model, a, ids)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step():
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    synchronize = torch.cuda.synchronize if gpu else lambda: None
    seconds, _, _ = run_steps(step, 1, synchronize)
    first = time.perf_counter() - start
    more, started, losses = run_steps(step, a.warmup - 1 + a.steps, synchronize)
    seconds += more
    slowest = torch.tensor([statistics.median(seconds[a.warmup:]) * 1e3,
                            torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    step_ms, gib = slowest.tolist()
    if dist.get_rank() == 0:
        name = f"transformers {transformers.__version__} + FSDP2, compile per layer" if a.impl == PEER else f"fxpar {a.impl}"
        print(json.dumps({
            "impl": name, "torch": torch.__version__, "world": dist.get_world_size(), "step_ms": round(step_ms, 1),
            "host_ms": round(statistics.median(started[-a.steps:]) * 1e3, 1),
            "tokens_per_s_per_gpu": round(a.mbs * a.seq / step_ms * 1e3, 1), "peak_mem_gib": round(gib, 2),
            "first_s": round(first, 1), "loss": round(losses[-1], 4),
            "cuda_graphs": "" if a.impl == PEER else module.report().cuda_graphs,
        }), flush=True)  # fmt: skip
    if a.trace:
        write_trace(step, synchronize, gpu, os.path.join(a.trace, re.sub(r"\W+", "_", a.impl) + f"_{dist.get_world_size()}.json"))
    dist.destroy_process_group()


def compare(a):
    """Start each implementation, and print what it measured."""
    dp = f"dp={a.gpus}"
    impls = a.impls or [f"{dp},ep={a.gpus}", f"{dp},ep={a.gpus},ep_dispatch=allgather", f"{dp},zero=3", PEER]
    shape = [f"--{name.replace('_', '-')}={getattr(a, name)}" for name in SHAPE] + ["--fp32"] * a.fp32
    shape += [f"--trace={a.trace}"] if a.trace else []
    for impl in impls:
        print(json.dumps({"impl": impl, **launched(a.gpus, a.limit, __file__, f"--impl={impl}", *shape)}), flush=True)


if __name__ == "__main__":
    arguments = parse_args()
    measure(arguments) if arguments.impl else compare(arguments)
