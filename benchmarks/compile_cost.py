"""What compiling costs as a model grows: Llama-3 70B's shape at several depths, capture to partition.

    python benchmarks/compile_cost.py
    python benchmarks/compile_cost.py --layers 2 4 --plan tp=4 --json cost.json
    python benchmarks/compile_cost.py --several --layers 80                                  twenty plans after one capture
    python benchmarks/compile_cost.py --graphs --layers 16 32 64 --plan dp=2,zero=3      and what Inductor does before code
    python benchmarks/compile_cost.py --layers 126 --hidden 16384 --heads 128 --ffn 53248 --batch 256
        --plan dp=16,tp=8,pp=8,microbatches=16,outputs=loss                              and the cut into stages: Llama-3 405B

The model is on the meta device and there are no other processes: any machine will do.
"""

import argparse
import json
import pathlib
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar.passes.strategies.stages import cut_stages
from fxpar.report.memory import trace

SHAPE = dict(hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256, seq=8192, batch=2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--plan", default="dp=2,tp=8")
    for name, default in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--graphs", action="store_true", help="also trace forward and backward and run all graph passes")
    parser.add_argument("--several", action="store_true", help="capture once, and partition under each of PLANS")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


def build_meta(args, layers):
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, vocab_size=args.vocab,
        max_position_embeddings=args.seq, use_cache=False, tie_word_embeddings=False,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        tokens = torch.zeros(args.batch, args.seq, dtype=torch.long)  # the global batch
        return LlamaForCausalLM(config), dict(input_ids=tokens, labels=tokens)


def cost(args, layers):
    """Seconds of CPU time by stage, and in total: all of it is one thread, and other work on the machine does not count."""
    model, example = build_meta(args, layers)
    stages, times = {}, [time.process_time()]

    def observe(name, _=None):
        times.append(time.process_time())
        stages[name] = times[-1] - times[-2]

    plan = fxpar.Plan.parse(args.plan)
    program = fxpar.compile_program(model, plan, example, observe=observe)
    if plan.pp > 1:
        cut_stages(program, plan.pp * plan.virtual_stages)
        observe("cut")
    if args.graphs:
        trace(program)
        observe("graphs")
    total = times[-1] - times[0]
    return dict(layers=layers, stages=stages, total_s=total, s_per_layer=total / layers)


PLANS = (
    "dp=2", "tp=2", "tp=4", "tp=8", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "dp=2,tp=2", "dp=2,tp=4", "dp=2,tp=8",
    "dp=2,tp=2,zero=1", "dp=2,tp=4,zero=1", "dp=2,tp=8,zero=1", "dp=2,tp=2,zero=3", "dp=2,tp=4,zero=3", "dp=2,tp=8,zero=3",
    "tp=4,sequence_parallel=false", "tp=8,sequence_parallel=false", "dp=2,tp=8,recompute=full", "dp=2,dp_replicate=2,zero=3",
)  # fmt: skip


def several(args, layers):
    """Seconds of the first plan of PLANS, which captures, of each other one, and of all."""
    model, example = build_meta(args, layers)
    captured, seconds = fxpar.capture(model, example), []
    for plan in PLANS:
        start = time.perf_counter()
        captured.partition(plan)
        seconds.append(time.perf_counter() - start)
    return dict(layers=layers, first_s=seconds[0], others_s=seconds[1:], total_s=sum(seconds))


SHOWN = ("capture", "infer", "place", "partition", "cut", "graphs")


def table_of(rows, plan):
    table = Table(title=f"compile cost in seconds of CPU time, plan {plan}", title_justify="left")
    for heading in ("layers", *SHOWN, "other", "total", "per layer"):
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = [row["stages"].get(stage, 0.0) for stage in SHOWN]
        other = row["total_s"] - sum(seconds)
        cells = (*seconds, other, row["total_s"])
        table.add_row(str(row["layers"]), *(f"{s:.2f}" for s in cells), f"{row['s_per_layer']:.3f}")
    return table


def main():
    args = parse_args()
    cost(args, 1)  # not counted: the first compilation in a process also pays for imports
    rows = []
    if args.several:
        for layers in args.layers:
            row = several(args, layers)
            rows.append(row)
            print(f"{layers} layers: the first plan {row['first_s']:.1f} s, each other one {min(row['others_s']):.1f} to "
                  f"{max(row['others_s']):.1f} s, {len(PLANS)} plans {row['total_s']:.1f} s", flush=True)
    for layers in () if args.several else args.layers:
        rows.append(cost(args, layers))
        print(f"{layers} layers: {rows[-1]['total_s']:.2f} s", flush=True)
    if not args.several:
        Console().print(table_of(rows, args.plan))
    if args.json:
        path = pathlib.Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = dict(plan=args.plan, torch=torch.__version__, rows=rows)
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
