"""Measures what recording forward and backward (CUDA graphs) does where steps are short, and what peers take.

    python benchmarks/graphs.py --cells 24x1024-512                          a cell: off, on, and no peer
    python benchmarks/graphs.py --cells 1b-2048-zero3 --peers DIR            and FSDP2 with a compiled loss
    python benchmarks/graphs.py --cells tiny-512-zero3 --graphs auto         over gloo on CPUs, to try the script out
    python benchmarks/graphs.py --cells 24x1024-512-dp --graphs auto --capturable    and with an optimizer that is recorded, too
    python benchmarks/graphs.py --list                                       what cells there are

Every row is processes of their own, which run benchmarks/bench_fxpar.py, or a peer's script (README.md says which). The rows of a
cell are run one after the other on the same GPUs; where there are more GPUs, other cells beside them. "host" is the time in which
the host starts a step, "kernels" that in which the GPU has something to do, in a step that is profiled; "ratio" is the peer's
step by this one.
"""

import argparse
import itertools
import json
import os
import pathlib
import queue
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from processes import launched
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {
    "24x1024": dict(layers=24, hidden=1024, heads=16, kv_heads=16, ffn=2816, vocab=32000),
    "1b": dict(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256),
    "8b-wide": dict(layers=4, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256),
    "tiny": dict(layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=256),
}
PLANS = {
    "one": ("dp=1", 1, ""),
    "zero3": ("dp=2,zero=3", 2, "--dp 2 --fsdp --compile --compile-loss"),
    "dp": ("dp=2", 2, "--dp 2 --ddp --compile"),
    "tp": ("tp=2", 2, "--tp 2 --dp 1 --fsdp --compile"),
    "zero3-4": ("dp=4,zero=3", 4, "--dp 4 --fsdp --compile --compile-loss"),
    "cp": ("cp=2", 2, ""),
    "pp": ("pp=2,schedule=1f1b,microbatches=4", 2, ""),
}
"""Name -> the plan, its GPUs, and the arguments of bench_torch.py that do the same."""
CELLS = [f"{model}-{tokens}-{plan}" for model in MODELS for tokens in (512, 1024, 2048, 8192) for plan in PLANS]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, metavar="CELL", default=["24x1024-512-one"])
    parser.add_argument("--graphs", nargs="+", choices=["False", "True", "auto"], default=["False", "True"])
    parser.add_argument("--capturable", action="store_true", help="another row each, of an optimizer that is capturable")
    parser.add_argument("--peers", type=pathlib.Path, help="folder with the peers' scripts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mbs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="seconds before a run is given up")
    parser.add_argument("--list", action="store_true", help="print the cells")
    return parser.parse_args()


def parts(cell):
    """The names of its model, tokens and plan."""
    model = next(name for name in MODELS if cell.startswith(f"{name}-"))
    return model, *cell.removeprefix(f"{model}-").split("-", 1)


def runs(cell, args, folder):
    """(name, processes, script, arguments, trace) of each row of a cell."""
    model, tokens, plan = parts(cell)
    text, gpus, peer = PLANS[plan]
    sizes = MODELS[model] | dict(seq=int(tokens), mbs=args.mbs, steps=args.steps, warmup=16)
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    for graphs, more in itertools.product(args.graphs, [[], ["--capturable"]] if args.capturable else [[]]):
        trace = folder / f"{cell}-{graphs}{''.join(more)}.json"
        mine = ["--plan", text, "--cuda-graphs", graphs, "--trace", str(trace), *more]
        yield f"fxpar {text}, CUDA graphs {graphs} {''.join(more)}", gpus, HERE / "bench_fxpar.py", [*mine, *shape], trace
    if args.peers is not None and peer:
        yield f"bench_torch.py {peer}", gpus, args.peers / "bench_torch.py", [*peer.split(), *shape], None


def with_trace(row, trace):
    """A row, with how long the GPU had something to do, if the run was profiled."""
    told = json.loads(trace.read_text()) if trace is not None and trace.exists() else {}
    return row | ({"kernels_ms": told["span_ms"] - told["idle_ms"]} if "span_ms" in told else {})


def measured(cell, args, folder, lanes):
    """What the rows of a cell print, on GPUs that no other cell has meanwhile. lanes: a queue of those that are free."""
    found = []
    devices = lanes.get()
    try:
        for name, gpus, script, arguments, trace in runs(cell, args, folder):
            row = launched(gpus, args.limit, str(script), *arguments, CUDA_VISIBLE_DEVICES=",".join(devices))
            row = with_trace(row, trace)
            print(json.dumps({"cell": cell, "name": name, **row}), flush=True)
            found.append((name, row))
    finally:
        lanes.put(devices)
    return found


def lanes_of(gpus):
    """A queue of all GPUs that may be used, in groups of so many."""
    lanes = queue.Queue()
    may = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    for first in range(0, max(len(may) // gpus, 1) * gpus, gpus):
        lanes.put(may[first : first + gpus])
    return lanes


def main():
    args = parse_args()
    if args.list:
        print("\n".join(CELLS))
        return
    table = Table("", "step ms", "host ms", "kernels ms", "ratio", "allocated GiB", "reserved GiB", "loss", "graphs",
                  title=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for gpus in sorted({PLANS[parts(cell)[2]][1] for cell in args.cells}):
            mine, lanes = [cell for cell in args.cells if PLANS[parts(cell)[2]][1] == gpus], lanes_of(gpus)
            with ThreadPoolExecutor(lanes.qsize()) as threads:
                rows |= zip(mine, threads.map(lambda cell, lanes=lanes: measured(cell, args, pathlib.Path(folder), lanes), mine),
                            strict=True)
    for cell in args.cells:
        peer = rows[cell][-1][1].get("step_ms") if args.peers is not None and PLANS[parts(cell)[2]][2] else None
        for name, row in rows[cell]:
            ratio = {"ratio": peer / row["step_ms"]} if peer and "step_ms" in row else {}
            numbers = [f"{v:.2f}" if isinstance(v := (row | ratio).get(k), int | float) else "" for k in (
                "step_ms", "host_ms", "kernels_ms", "ratio", "peak_mem_gib", "peak_reserved_gib", "loss")]
            table.add_row(f"{cell}: {name}", *numbers, row.get("cuda_graphs") or row.get("error", "")[-200:])
        table.add_section()
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
