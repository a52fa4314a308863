"""Measures what recording forward and backward (CUDA graphs) does where steps are short, and what peers take.

    python benchmarks/graphs.py --cells 24x1024-512                          a cell: off, on, and no peer
    python benchmarks/graphs.py --cells 1b-2048-zero3 --peers DIR            and FSDP2 with a compiled loss
    python benchmarks/graphs.py --list                                       what cells there are

Every row is processes of their own, which run benchmarks/bench_fxpar.py, or a peer's script (README.md says which). "host" is the
time in which the host starts a step, "kernels" that in which the GPU has something to do, in a step that is profiled.
"""

import argparse
import json
import pathlib
import tempfile

import torch
from processes import launched
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {
    "24x1024": dict(layers=24, hidden=1024, heads=16, kv_heads=16, ffn=2816, vocab=32000),
    "1b": dict(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256),
    "8b-wide": dict(layers=4, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256),
}
PLANS = {
    "one": ("dp=1", 1, ""),
    "zero3": ("dp=2,zero=3", 2, "--dp 2 --fsdp --compile --compile-loss"),
    "dp": ("dp=2", 2, "--dp 2 --ddp --compile"),
    "tp": ("tp=2", 2, "--tp 2 --dp 1 --fsdp --compile"),
    "zero3-4": ("dp=4,zero=3", 4, "--dp 4 --fsdp --compile --compile-loss"),
    "cp": ("cp=2", 2, ""),
}
"""Name -> the plan, its GPUs, and the arguments of bench_torch.py that do the same."""
CELLS = [f"{model}-{tokens}-{plan}" for model in MODELS for tokens in (512, 1024, 2048, 8192) for plan in PLANS]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, metavar="CELL", default=["24x1024-512-one"])
    parser.add_argument("--graphs", nargs="+", choices=["False", "True", "auto"], default=["False", "True"])
    parser.add_argument("--peers", type=pathlib.Path, help="folder with the peers' scripts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mbs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="seconds before a run is given up")
    parser.add_argument("--list", action="store_true", help="print the cells")
    return parser.parse_args()


def runs(cell, args, folder):
    """(name, processes, script, arguments, trace) of each row of a cell."""
    model = next(name for name in MODELS if cell.startswith(f"{name}-"))
    tokens, plan = cell.removeprefix(f"{model}-").split("-", 1)
    text, gpus, peer = PLANS[plan]
    sizes = MODELS[model] | dict(seq=int(tokens), mbs=args.mbs, steps=args.steps, warmup=12)
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    for graphs in args.graphs:
        trace = folder / f"{cell}-{graphs}.json"
        mine = ["--plan", text, "--cuda-graphs", graphs, "--trace", str(trace)]
        yield f"fxpar {text}, CUDA graphs {graphs}", gpus, HERE / "bench_fxpar.py", [*mine, *shape], trace
    if args.peers is not None and peer:
        yield f"bench_torch.py {peer}", gpus, args.peers / "bench_torch.py", [*peer.split(), *shape], None


def with_trace(row, trace):
    """A row, with how long the GPU had something to do, if the run was profiled."""
    if trace is None or not trace.exists():
        return row
    told = json.loads(trace.read_text())
    return row | {"kernels_ms": told["span_ms"] - told["idle_ms"]}


def main():
    args = parse_args()
    if args.list:
        print("\n".join(CELLS))
        return
    table = Table("", "step ms", "host ms", "kernels ms", "allocated GiB", "reserved GiB", "loss", "graphs",
                  title=torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory() as folder:
        for cell in args.cells:
            for name, gpus, script, arguments, trace in runs(cell, args, pathlib.Path(folder)):
                row = with_trace(launched(gpus, args.limit, str(script), *arguments), trace)
                print(json.dumps({"cell": cell, "name": name, **row}), flush=True)
                numbers = [f"{row[k]:.2f}" if isinstance(row.get(k), int | float) else "" for k in (
                    "step_ms", "host_ms", "kernels_ms", "peak_mem_gib", "peak_reserved_gib", "loss")]
                table.add_row(f"{cell}: {name}", *numbers, row.get("cuda_graphs") or row.get("error", "")[-200:])
            table.add_section()
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
