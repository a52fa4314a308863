"""Train a Llama, or a Mixtral, on the Python standard library's own source text, byte by byte, under any plan.

    python examples/train.py                                                  one process
    torchrun --nproc-per-node=4 examples/train.py --plan dp=2,tp=2            four
    torchrun --nproc-per-node=4 examples/train.py --plan dp=2,tp=2 --check    ... and prove them equal to one
    torchrun --nproc-per-node=4 examples/train.py --plan dp=2,pp=2,microbatches=4 --check        a pipeline of two stages
    torchrun --nproc-per-node=4 examples/train.py --plan cp=4 --seq 2048 --packed --check        long sequences, a quarter a rank
    torchrun --nproc-per-node=4 examples/train.py --experts 8 --plan dp=2,tp=2,ep=4 --check      two experts of eight on each

NCCL where there are GPUs, gloo elsewhere.
"""

import argparse
import contextlib
import dataclasses
import time

import torch
import torch.distributed as dist
from common import compare, plan, read_corpus, start_processes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fxpar

VOCAB = 256  # bytes
CHECKED_STEPS = 5
SIZES = {
    "tiny": dict(layers=2, hidden=64, heads=4, kv_heads=2, ffn=176),
    "small": dict(layers=8, hidden=512, heads=8, kv_heads=4, ffn=1408),
    "1b": dict(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192),
    "8b": dict(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", type=plan, default=fxpar.Plan(), help="for example dp=2,tp=2")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    for name in SIZES["tiny"]:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the size's own")
    parser.add_argument("--experts", type=int, default=0, help="so many in each layer, of which a token has two: Mixtral")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8, help="sequences in the global batch")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--packed", action="store_true", help="a sequence is many documents, of which none sees another")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of compute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-mb", type=float, default=4, help="how much text to read")
    parser.add_argument("--check", action="store_true", help="compare with plain PyTorch on one process")
    args = parser.parse_args()
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch % args.plan.dp:
        parser.error(f"--batch {args.batch} must be divisible by dp={args.plan.dp}")
    if args.check and args.dtype != "fp32":
        parser.error("--check compares in fp32: leave --dtype out")
    if args.dtype == "bf16":
        args.plan = dataclasses.replace(args.plan, param_dtype="bf16", reduce_dtype="fp32")
    return args


def draw_batch(corpus, args, step, part=slice(None)):
    """Step `step`'s global batch, the same on every rank, or the sequences of it that `part` selects."""
    generator = torch.Generator().manual_seed(args.seed + step)
    starts = torch.randint(0, len(corpus) - args.seq, (args.batch,), generator=generator)[part]
    tokens = torch.stack([corpus[start : start + args.seq] for start in starts]).long().to(args.device)
    return dict(input_ids=tokens, labels=tokens) | (dict(position_ids=document_places(tokens)) if args.packed else {})


def document_places(tokens):
    """Where in its document each byte is. One begins behind two empty lines, as Python's top-level definitions do."""
    ends = (tokens[:, :-3] == 10) & (tokens[:, 1:-2] == 10) & (tokens[:, 2:-1] == 10) & (tokens[:, 3:] != 10)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = torch.where(torch.nn.functional.pad(ends, (3, 0)), places, 0).cummax(1).values
    return places - first


def build_model(args, meta=False):
    config_class, model_class = (MixtralConfig, MixtralForCausalLM) if args.experts else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=VOCAB, num_hidden_layers=args.layers, hidden_size=args.hidden, intermediate_size=args.ffn,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=args.seq,
        use_cache=False, bos_token_id=None, eos_token_id=None, **({"num_local_experts": args.experts} if args.experts else {}),
    )  # fmt: skip
    torch.manual_seed(args.seed)
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = model_class(config)
    return model if meta else model.to(args.device)


@contextlib.contextmanager
def progress_report(args):
    """Yields report(step, loss, seconds): a bar on a terminal, lines elsewhere, nothing on other ranks."""
    tokens, console = args.batch * args.seq, Console()
    if dist.get_rank() != 0:
        yield lambda step, loss, seconds: None
    elif not console.is_terminal:
        yield lambda step, loss, seconds: print(
            f"step {step + 1:4d}/{args.steps}  loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s", flush=True
        )
    else:
        stats = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s")
        with Progress(BarColumn(), MofNCompleteColumn(), stats, console=console) as bar:
            task = bar.add_task("train", total=args.steps, loss=float("nan"), rate=0.0)
            yield lambda step, loss, seconds: bar.update(task, advance=1, loss=loss, rate=tokens / seconds)


def train_plain(args, corpus):
    """The losses of the first steps of ordinary training: one process, the whole batch, no fxpar."""
    model, losses = build_model(args), []
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    for step in range(min(CHECKED_STEPS, args.steps)):
        loss = model(**draw_batch(corpus, args, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def train_parallel(args, corpus):
    """The losses of every step, trained under the plan. Weights too big for one device start out on meta."""
    meta = args.size in ("1b", "8b") and not args.check
    per_replica = args.batch // args.plan.dp
    example = draw_batch(corpus, args, 0, slice(per_replica))
    model = fxpar.parallelize(build_model(args, meta), args.plan, example)
    if meta:
        model.init_weights(args.seed)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)

    mine = slice(model.replica * per_replica, (model.replica + 1) * per_replica)
    losses = []
    with progress_report(args) as report:
        for step in range(args.steps):
            start = time.perf_counter()
            batch = draw_batch(corpus, args, step, mine)
            if args.plan.microbatches > 1:  # their forwards and backwards take turns; under pp stages run them side by side
                loss = model.train_step(**batch)
            else:
                loss = model(**batch).loss
                loss.backward()
            model.clip_grad_norm_(1.0)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            report(step, losses[-1], time.perf_counter() - start)
    return losses


def main():
    args = parse_args()
    args.device = start_processes()
    try:
        corpus = read_corpus(args.corpus_mb)
        plain = train_plain(args, corpus) if args.check and dist.get_rank() == 0 else []
        dist.barrier()
        losses = train_parallel(args, corpus)
    finally:
        dist.destroy_process_group()
    if plain and not compare(plain, losses):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
