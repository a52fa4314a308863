"""Measures what goes by before the first step is done: cold, started again with what was compiled on disk, and a second shape.

    python benchmarks/start.py --gpus 2 --model llama1b --layers 16 64
    python benchmarks/start.py --gpus 2 --model gpt2 bert-large --plan dp=2
    python benchmarks/start.py --gpus 2 --model llama1b --layers 16 --peer bench_hf.py      and a script that compiles per layer
    python benchmarks/start.py --gpus 2 --model tiny --layers 2                             on CPUs, over gloo
    python benchmarks/start.py --gpus 2 --model tiny-bert tiny-gpt2 --layers 12             the same, with dropout in every layer
    python benchmarks/start.py --gpus 2 --model llama1b --layers 16 64 --blocks once flat
    torchrun --nproc-per-node=2 benchmarks/start.py --one --model llama1b --layers 16       one start; prints one JSON line

Every row is processes of their own: of the first the folder of compiled graphs is empty, the second finds what the first left.
Times are rank 0's, from `parallelize` to the end of the first step, of which `parts` are those of `report().timings`; imports and
the making of the model are left out. On CPUs the backend is Inductor, too, and CPU seconds are what to look at. A peer takes the
arguments of the peers of this folder's README, and prints one JSON line with the seconds of its first step in `first_s`.
"""

import argparse
import json
import tempfile
import time

import torch
import torch.distributed as dist
from processes import launched, start_processes
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxpar

LLAMA = dict(use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa")
MODELS = {
    "llama1b": (16, 8192, 2, lambda n: LlamaForCausalLM(LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=n, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, **LLAMA))),
    "gpt2": (24, 1024, 4, lambda n: GPT2LMHeadModel(GPT2Config(
        n_embd=1024, n_head=16, n_layer=n, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))),
    "bert-large": (24, 512, 8, lambda n: BertForMaskedLM(BertConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=n, num_attention_heads=16))),
    "tiny": (2, 64, 2, lambda n: LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=n, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=256, **LLAMA))),
    "tiny-bert": (2, 64, 2, lambda n: BertForMaskedLM(BertConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=n, num_attention_heads=8, vocab_size=256))),
    "tiny-gpt2": (2, 64, 2, lambda n: GPT2LMHeadModel(GPT2Config(
        n_embd=64, n_head=8, n_layer=n, vocab_size=256, n_positions=64, use_cache=False))),
}  # fmt: skip
"""Name -> layers, tokens of a row, rows of a replica, and the model with so many layers."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama1b"])
    parser.add_argument("--layers", type=int, nargs="+", help="default: those of the model")
    parser.add_argument("--plan", help="default: dp=N,zero=3")
    parser.add_argument("--gpus", type=int, default=2, help="how many processes to start")
    parser.add_argument("--peer", metavar="SCRIPT", help="also start this, with --compile layer, cold and warm (llama1b)")
    parser.add_argument("--limit", type=int, default=900, help="seconds before a start is given up")
    parser.add_argument("--blocks", nargs="+", choices=["auto", "once", "flat"], default=["auto"],
                        help="how equal blocks are compiled; several are started one after the other")
    parser.add_argument("--fp32", action="store_true", help="compute in fp32")
    parser.add_argument("--one", action="store_true", help="this process, started by torchrun, is one rank of one start")
    return parser.parse_args()


def start(a):
    """One start, as rank 0 prints it."""
    gpu, (layers, seq, rows, build) = torch.cuda.is_available(), MODELS[a.model[0]]
    layers = a.layers[0] if a.layers else layers
    device = start_processes()
    torch.manual_seed(0)
    with device:
        model = build(layers).float().train()
    plan = fxpar.Plan.parse(a.plan or f"dp={dist.get_world_size()},zero=3")
    if not a.fp32 and gpu:
        plan = fxpar.Plan.parse(f"{plan},param_dtype=bf16,reduce_dtype=fp32")

    def batch(tokens):
        ids = torch.randint(0, 256, (rows, tokens), device=device)
        return {"input_ids": ids, "labels": ids}

    module = optimizer = None
    out = {}
    dist.barrier(dist.new_group(backend="gloo"))  # no rank waits for another one that is still making its model
    for name, tokens in (("first", seq), ("second shape", seq // 2)):
        wall, cpu = time.perf_counter(), time.process_time()
        if module is None:
            module = fxpar.parallelize(model, plan, batch(tokens), backend="inductor", blocks=a.blocks[0])
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        loss = module(**batch(tokens)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        out[name] = {"seconds": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2),
                     "parts": {part: round(spent, 2) for part, spent in module.report().timings.parts.items()}}
    if dist.get_rank() == 0:
        print(json.dumps({"impl": f"fxpar {plan}", "model": a.model[0], "layers": layers, "blocks": a.blocks[0],
                          "torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu",
                          "world": dist.get_world_size(), **out}), flush=True)
    dist.destroy_process_group()


def compare(a):
    """Start each model twice, and the peer, and print what they measured."""
    for model in a.model:
        for layers in a.layers or MODELS[model][:1]:
            impls = [(__file__, ["--one", f"--model={model}", f"--layers={layers}", f"--blocks={blocks}",
                                 *(["--plan", a.plan] if a.plan else []), *["--fp32"] * a.fp32]) for blocks in a.blocks]
            if a.peer and model == "llama1b":
                impls.append((a.peer, [f"--layers={layers}", "--compile=layer", "--steps=1", "--warmup=1"]))
            for script, arguments in impls:
                with tempfile.TemporaryDirectory() as cache:
                    for state in ("cold", "warm"):
                        line = launched(a.gpus, a.limit, script, *arguments, TORCHINDUCTOR_CACHE_DIR=cache,
                                        TRITON_CACHE_DIR=f"{cache}/triton")
                        print(json.dumps({"start": state, **line}), flush=True)


if __name__ == "__main__":
    args = parse_args()
    start(args) if args.one else compare(args)
