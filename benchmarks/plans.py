"""What the cost model predicts of plans, beside what is measured: the table by which to judge `fxpar.suggest`.

    python benchmarks/plans.py               measures ten plans of two models on the 2 or 4 GPUs of this host (about 4 minutes)
    python benchmarks/plans.py --recorded    beside what RESULTS.md has measured already; no GPU is needed

Each plan is one run of bench_fxpar.py; plans of two GPUs run side by side on four. Under the table: how far predictions are
off, and for how many pairs of plans of one model, whose measured times for a row of the batch are more than 10% apart, the
order is right.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar.choose.suggest import likely_cluster

HERE = pathlib.Path(__file__).parent
NARROW = dict(layers=4, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256, seq=8192, mbs=2)
WIDE = dict(layers=2, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000, seq=8192, mbs=1)
PLANS = {
    "narrow": (NARROW, ["dp=2", "dp=2,zero=3", "tp=2", "pp=2,microbatches=8", "dp=4,zero=3", "dp=2,tp=2,zero=1"]),
    "wide": (WIDE, ["dp=2,zero=3,recompute=full", "tp=2", "dp=2,pp=2,zero=1,microbatches=8", "tp=4"]),
}
"""Name of a model -> its shape, and the plans that are measured."""

ONE = {**NARROW, "layers": 16}
EIGHT = dict(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, seq=8192, mbs=1)
RECORDED = [
    ("1B", ONE, "tp=2", 173.6), ("1B", ONE, "dp=2", 308.8), ("1B", ONE, "dp=2,zero=3", 302.3),
    ("1B", ONE, "pp=2,microbatches=8", 1318.9), ("1B", ONE, "pp=2,microbatches=8,schedule=zbv,virtual_stages=2", 1257.9),
    ("1B, 4 layers", NARROW, "tp=2", 63.8), ("1B, 4 layers", NARROW, "dp=2", 118.2),
    ("1B, 4 layers", NARROW, "dp=2,zero=3", 111.9),
    ("8B", EIGHT, "dp=2,zero=3,recompute=selective", 825.4),
]
"""Model, shape, plan, milliseconds of a step on two H200s: the tables of RESULTS.md."""
MARGIN = 0.1
"""How far apart measured times must be for their order to count."""


@dataclasses.dataclass
class Row:
    """A plan of a model. predicted, measured: milliseconds of a step; rows: of the batch of one."""

    model: str
    plan: str
    rows: int
    predicted: float
    measured: float


def predict(shape, text, cluster):
    """Milliseconds of a step, and the rows of its batch."""
    plan = dataclasses.replace(fxpar.Plan.parse(text), param_dtype="bf16", reduce_dtype="fp32", outputs="loss")
    config = LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], vocab_size=shape["vocab"],
        max_position_embeddings=shape["seq"], use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).train()
    rows = shape["mbs"] * plan.microbatches * plan.dp
    tokens = torch.zeros(rows, shape["seq"], dtype=torch.long, device="meta")
    report = fxpar.inspect(model, plan, dict(input_ids=tokens, labels=tokens), cluster=cluster)
    return report.step.time().seconds * 1e3, rows


def start(shape, text, gpus):
    """A run of bench_fxpar.py on these GPUs."""
    sizes = [word for name, value in shape.items() for word in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}",
               str(HERE / "bench_fxpar.py"), "--plan", text, "--steps", "6", "--warmup", "4", *sizes]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "NCCL_NVLS_ENABLE": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process):
    """Milliseconds of a step; None where the run failed."""
    out, _ = process.communicate(timeout=300)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])["step_ms"] if lines and process.returncode == 0 else None


def rounds(gpus):
    """Which plans run at one time: two of two GPUs on four, else one."""
    work = [(name, shape, text, fxpar.Plan.parse(text).world_size) for name, (shape, texts) in PLANS.items() for text in texts]
    small = [each for each in work if each[3] == 2]
    at_once = max(1, gpus // 2)
    yield from (small[i:i + at_once] for i in range(0, len(small), at_once))
    yield from ([each] for each in work if each[3] == 4 and gpus >= 4)


def measured(gpus, cluster):
    for together in rounds(gpus):
        running = [(name, shape, text, start(shape, text, range(world * i, world * (i + 1))))
                   for i, (name, shape, text, world) in enumerate(together)]
        guesses = [predict(shape, text, cluster) for _, shape, text, _ in running]
        for (name, _, text, process), (guess, rows) in zip(running, guesses, strict=True):
            milliseconds = finish(process)
            if milliseconds is None:
                print(f"{name} {text}: the run failed", file=sys.stderr)
            else:
                yield Row(name, text, rows, guess, milliseconds)


def recorded():
    for name, shape, text, milliseconds in RECORDED:
        guess, rows = predict(shape, text, "dgx-h200")
        yield Row(name, text, rows, guess, milliseconds)


def judged(rows):
    """How far off predictions are, and whether they order plans as measurements do."""
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if a.model == b.model]
    apart = [(a, b) for a, b in pairs if abs(a.measured / a.rows / (b.measured / b.rows) - 1) > MARGIN]
    right = sum((a.measured / a.rows < b.measured / b.rows) == (a.predicted / a.rows < b.predicted / b.rows) for a, b in apart)
    worst = max(abs(row.predicted / row.measured - 1) for row in rows)
    return [f"largest error {worst:.0%}", f"the order of {right} of {len(apart)} pairs more than {MARGIN:.0%} apart is right"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recorded", action="store_true", help="predict what RESULTS.md has measured, and measure nothing")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not args.recorded and gpus < 2:
        parser.error("needs two GPUs, better four; --recorded needs none")
    cluster = "dgx-h200" if args.recorded else likely_cluster(torch.device("cuda", 0))
    print(f"cluster {cluster}\n\n| model | plan | rows | predicted ms | measured ms | predicted / measured |\n"
          "| --- | --- | --- | --- | --- | --- |", flush=True)
    made = []
    for row in recorded() if args.recorded else measured(min(gpus, 4), cluster):
        made.append(row)
        print(f"| {row.model} | `{row.plan}` | {row.rows} | {row.predicted:.1f} | {row.measured:.1f} | "
              f"{row.predicted / row.measured:.2f} |", flush=True)
    print("", *judged(made), sep="\n")


if __name__ == "__main__":
    main()
