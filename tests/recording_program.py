"""What tests/run/test_recording_gpu.py starts on every GPU: a training loop with CUDA graphs, and the same without.

    PYTHONPATH=. torchrun --nproc-per-node=2 tests/recording_program.py dp=2,zero=3 llama 200
    PYTHONPATH=. torchrun --nproc-per-node=2 tests/recording_program.py "dp=2,zero=3;dp=2;tp=2" blocks 60
    PYTHONPATH=. torchrun --nproc-per-node=2 tests/recording_program.py "pp=2,microbatches=4,schedule=1f1b" blocks 60
    PYTHONPATH=. torchrun --nproc-per-node=2 tests/recording_program.py dp=2,zero=3 llama 200 foreach

Batches and learning rates change, gradients are accumulated, two shapes come in turn, evaluations come between, outputs and
gradients are held over a step, and a checkpoint is loaded again. The optimizer is one of `OPTIMIZERS` ("fused", by default), with
and without recordings. Rank 0 prints one JSON line: the largest difference of a loss, whether it was recorded, and bytes. Fewer
than 100 steps have one shape, and no accumulation without communication, so that little is compiled. What does not end shows
where it is.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxpar
from tests.blocks import Blocks, tokens


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1024, max_position_embeddings=256, use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa"))


def gpt2() -> nn.Module:
    """With dropout in all its places."""
    return GPT2LMHeadModel(GPT2Config(n_embd=256, n_head=8, n_layer=3, vocab_size=1024, n_positions=256, use_cache=False))


def blocks() -> nn.Module:
    """Compiled in seconds."""
    return Blocks(1024, 64, 256, 2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda ps: torch.optim.AdamW(ps, 1e-3, fused=True),
    "capturable": lambda ps: torch.optim.AdamW(ps, torch.tensor(1e-3, device="cuda"), fused=True, capturable=True),
    "foreach": lambda ps: torch.optim.AdamW(ps, torch.tensor(1e-3, device="cuda"), foreach=True, capturable=True),
    "number": lambda ps: torch.optim.AdamW(ps, 1e-3, fused=True, capturable=True),
    "radam": lambda ps: torch.optim.RAdam(ps, 1e-3, foreach=True, capturable=True),
}


def batch(seed: int, length: int, replica: Any, rows: int = 4) -> dict[str, Tensor]:
    mine = slice(replica.index * rows, (replica.index + 1) * rows)
    return {name: t[mine].cuda() for name, t in tokens(seed, rows * replica.count, length, 1024).items()}


def trained(model: str, plan: str, steps: int, cuda_graphs: bool, folder: str, kind: str) -> tuple[list[float], str]:
    """The losses of a loop, and whether it was recorded."""
    torch.manual_seed(0)
    net = {"llama": llama, "gpt2": gpt2, "blocks": blocks}[model]().cuda().train()
    rows = torch.zeros(4, 128, dtype=torch.long, device="cuda")
    module = fxpar.parallelize(net, plan, {"input_ids": rows, "labels": rows}, cuda_graphs=cuda_graphs)
    module.seed = 7
    optimizer = OPTIMIZERS[kind](module.parameters())
    # a number that changes in each step is never recorded
    every = 1 if isinstance(optimizer.param_groups[0]["lr"], Tensor) or kind == "fused" else 20
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step // every * every / 50))
    losses: list[Tensor] = []
    held: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 5 != 4)
        if steps >= 100 and step % 7 == 3:
            with module.no_sync():
                module(**batch(1000 + step, 128, module.replica)).loss.backward()
        length = 64 if steps >= 100 and steps * 0.4 < step < steps * 0.7 and step % 2 else 128
        out = module(**batch(step, length, module.replica))
        out.loss.backward()
        if step % 11 == 5:
            module(**batch(3000 + step, length, module.replica)).loss.backward()
        module.clip_grad_norm_(1.0)
        held = [out.logits, [p.grad for p in module.parameters()]] if step % 9 == 2 else []
        optimizer.step()
        schedule.step()
        losses.append(out.loss.detach())
        if step % 10 == 9:
            module.eval()
            losses.append(module.eval_step(**batch(2000 + step, 128, module.replica)).loss)
            module.train()
        if step == steps // 2:
            fxpar.save_checkpoint(folder, module, optimizer)
        if step == steps * 3 // 4:
            fxpar.load_checkpoint(folder, module, optimizer)
    del held
    return torch.stack(losses).tolist(), module.report().cuda_graphs


def main() -> None:
    plans, model, steps, kind = sys.argv[1], sys.argv[2], int(sys.argv[3]), [*sys.argv, "fused"][4]
    torch.use_deterministic_algorithms(True, warn_only=True)
    for plan in plans.split(";"):
        faulthandler.dump_traceback_later(40 if steps < 100 else 300)
        compare(plan, model, steps, kind)
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def compare(plan: str, model: str, steps: int, kind: str) -> None:
    folder = os.environ.get("FXPAR_FOLDER", f"{tempfile.gettempdir()}/fxpar-{os.environ.get('TORCHELASTIC_RUN_ID')}")
    found = {}
    for graphs in (False, True):
        torch.cuda.reset_peak_memory_stats()
        losses, told = trained(model, plan, steps, graphs, f"{folder}/{plan}-{graphs}", kind)
        found[graphs] = losses, torch.cuda.max_memory_reserved()
    off = [abs(a - b) / abs(b) for a, b in zip(found[True][0], found[False][0], strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    if dist.get_rank() == 0:
        print(json.dumps({"plan": plan, "model": model, "optimizer": kind, "off": off[worst], "at": worst,
                          "equal": sum(x == 0 for x in off),
                          "of": len(off), "told": told, "bytes": [found[g][1] for g in (False, True)],
                          "losses": found[True][0][:: max(len(off) // 5, 1)]}), flush=True)


if __name__ == "__main__":
    main()
