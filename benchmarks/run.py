"""Runs fxpar and its peers, one after another on the same GPUs, and compares them.

    python benchmarks/run.py --gpus 2 --peers DIR --suite tp2 dp2
    python benchmarks/run.py --quick --peers DIR           tiny, on the CPU: tries the harness only

DIR holds the peers' scripts (README.md says which). What cannot be run is listed with the reason. Results
and logs go to a new folder in benchmarks/out/ (or --out).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
import zipfile

import torch
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the fxpar of this checkout, here and in the processes started below
import fxpar  # noqa: E402

OUT = HERE / "out"
SHAPE = dict(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=128256, seq=8192, mbs=2, steps=8, warmup=4)
LARGE = dict(layers=32, hidden=4096, ffn=14336, mbs=1)  # Llama-3 8B
QUICK = dict(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=256, seq=128, mbs=2, steps=2, warmup=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a script that prints one JSON line, and the flags that say what it measures.

    quick_drop, quick_add: flags that the CPU smoke mode leaves out and adds. cpu: whether it runs there. shape: what differs
    from the default shape.
    """

    name: str
    script: str
    flags: str
    quick_drop: tuple[str, ...] = ("--compile", "--compile-loss")
    quick_add: str = "--fp32"
    cpu: bool = True
    shape: dict = dataclasses.field(default_factory=dict)


def fxpar_case(plan, **shape):
    flags = f"--plan {plan} --param-dtype bf16 --reduce-dtype fp32"
    return Case(f"fxpar {plan}", "bench_fxpar.py", flags, (), "--param-dtype none --backend eager", shape=shape)


def torch_case(name, flags, **shape):
    return Case(name, "bench_torch.py", flags, shape=shape)


def mcore_case(name, flags):
    return Case(name, "bench_mcore.py", flags, cpu=False)


def hf_case(compile_what):
    name = f"Hugging Face + FSDP2, compile per {compile_what}"
    return Case(name, "bench_hf.py", f"--compile {compile_what}", cpu=False)


# Suite -> its cases on n GPUs, fxpar's first: the ratios are to it.
SUITES = {
    "tp": lambda n: [
        fxpar_case(f"tp={n}"),
        fxpar_case(f"tp={n},tp_comm_overlap=true"),
        torch_case("DTensor TP+SP, compile", f"--tp {n} --dp 1 --fsdp --compile"),
        mcore_case("Megatron Core TP+SP (no TE/apex)", f"--tp {n} --sp"),
    ],
    "dp": lambda n: [
        fxpar_case(f"dp={n}"),
        torch_case("DDP, compile", f"--dp {n} --ddp --compile"),
        hf_case("layer"),
    ],
    "fsdp": lambda n: [
        fxpar_case(f"dp={n},zero=3"),
        torch_case("FSDP2, compile + compiled loss", f"--dp {n} --fsdp --compile --compile-loss"),
        hf_case("layer"),
        mcore_case("Megatron Core distributed optimizer (no TE/apex)", "--dist-opt"),
    ],
    "pp": lambda n: [
        fxpar_case(f"pp={n},microbatches=8,schedule=1f1b"),
        fxpar_case(f"pp={n},microbatches=8,schedule=zbv,virtual_stages=2"),
        mcore_case("Megatron Core 1f1b (no TE/apex)", f"--pp {n} --gbs {8 * SHAPE['mbs']}"),
    ],
    "large": lambda n: [
        fxpar_case(f"dp={n},zero=3,recompute=selective", **LARGE),
        torch_case("FSDP2, selective, compile + compiled loss", f"--dp {n} --fsdp --ac selective --compile --compile-loss",
                   **LARGE),
    ],
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=2, help="how many may be used")
    parser.add_argument("--peers", type=pathlib.Path, help="folder with the peers' scripts")
    parser.add_argument("--suite", nargs="+", default=["all"], metavar="tp2|dp2|fsdp2|pp2|large2|all")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder for the results")
    parser.add_argument("--limit", type=int, default=600, help="seconds before a run is given up")
    parser.add_argument("--trace", action="store_true", help="have fxpar also write its kernel times")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU, to try the harness")
    for name in SHAPE:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the default shape's")
    args = parser.parse_args()
    args.shape = {
        n: d if getattr(args, n) is None else getattr(args, n) for n, d in (QUICK if args.quick else SHAPE).items()
    }
    if "all" in args.suite:
        args.suite = [f"{kind}{args.gpus}" for kind in SUITES]
    args.suite = {name: read_suite(name, args, parser) for name in args.suite}
    if not args.quick and torch.cuda.device_count() < args.gpus:
        parser.error(f"--gpus {args.gpus}, but {torch.cuda.device_count()} found; --quick runs without")
    return args


def read_suite(name, args, parser):
    """(cases, number of processes) of "tp2"."""
    match = re.fullmatch(rf"({'|'.join(SUITES)})(\d+)", name)
    if not match:
        parser.error(f"--suite {name}: must be all, or one of {', '.join(SUITES)} followed by a number of GPUs")
    kind, count = match[1], int(match[2])
    if count > args.gpus:
        parser.error(f"--suite {name} takes {count} GPUs: raise --gpus {args.gpus}")
    return SUITES[kind](count), count


# ---- one case ----


def unsupported(case):
    """Why this version of fxpar cannot run its case; empty if it can."""
    try:
        fxpar.Plan.parse(case.flags.split()[1]).require_supported()
    except ValueError as error:
        return str(error)
    return ""


def missing(case, args):
    """Why the case cannot be started here; empty if it can."""
    if case.script == "bench_fxpar.py":
        return unsupported(case)
    if args.peers is None:
        return "no --peers given"
    if not (args.peers / case.script).is_file():
        return f"{case.script} is not in {args.peers}"
    if case.script == "bench_mcore.py" and not megatron_path(args.peers):
        return "megatron-core is neither installed nor a wheel in the peers' folder"
    if args.quick and not case.cpu:
        return f"{case.script} needs a GPU"
    return ""


def megatron_path(peers):
    """["where to import megatron-core from"], [""] if it is installed, [] if there is none.

    A wheel is unpacked rather than installed: only its Python code is used, on any interpreter.
    """
    if importlib.util.find_spec("megatron"):
        return [""]
    wheels = sorted(peers.glob("megatron_core*.whl"))
    if not wheels:
        return []
    target = OUT / wheels[-1].stem
    if not target.is_dir():
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(target)
    return [str(target)]


def command_of(case, args, processes):
    script = HERE / case.script if case.script == "bench_fxpar.py" else args.peers.resolve() / case.script
    flags = case.flags.split()
    if args.quick:
        flags = [flag for flag in flags if flag not in case.quick_drop] + case.quick_add.split()
    sizes = args.shape if args.quick else args.shape | case.shape
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, str(script), *flags, *shape]


def environment(case, args):
    # NVLink multicast is not available on every host; no implementation gets it.
    env = os.environ | {"NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false"}
    env.setdefault("OMP_NUM_THREADS", "1")
    if args.quick:
        env["CUDA_VISIBLE_DEVICES"] = ""
    extra = megatron_path(args.peers) if case.script == "bench_mcore.py" else []
    env["PYTHONPATH"] = os.pathsep.join(p for p in [str(HERE.parent), *extra, env.get("PYTHONPATH", "")] if p)
    return env


def run_case(case, args, processes, folder):
    """dict(name, status: "ok" or "failed", the script's own line or the reason). Logs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")
    command, log = command_of(case, args, processes), folder / f"{slug}.log"
    if args.trace and case.script == "bench_fxpar.py":
        command += ["--trace", str(folder / f"{slug}.trace.json")]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(case, args))
        try:
            code = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    record = dict(name=case.name, command=command, wall_s=round(time.perf_counter() - start, 1))
    measured = last_json_line(log)
    if code == 0 and measured:
        return record | dict(status="ok", result=measured)
    why = f"exceeded {args.limit} s" if code is None else f"exit status {code}: {last_error(log)}"
    return record | dict(status="failed", reason=f"{why} (log: {log.relative_to(folder.parent)})")


def stop(process):
    """Ends the launcher if it still runs, giving it the time that it takes to end its workers first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def last_json_line(log):
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("{") and '"step_ms"' in line:
            return json.loads(line)
    return None


def last_error(log):
    """The last line that names an error, without the launcher's own."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r'Error\b|"error"', line) and "ChildFailedError" not in line]
    return errors[-1].strip()[:300] if errors else "no error message"


def run_suite(suite, cases, processes, args, folder):
    """Yields a record a case. Without fxpar's there is nothing to compare: the peers' are not run."""
    absent = missing(cases[0], args)
    for case in cases:
        print(f"{suite}: {case.name} ...", flush=True)
        reason = missing(case, args) or (absent and "fxpar cannot run its side of this suite")
        if reason:
            yield dict(name=case.name, status="not run", reason=reason)
        else:
            yield run_case(case, args, processes, folder / suite)


# ---- the comparison ----

HEADINGS = ("", "step ms", "tokens/s/GPU", "MFU", "peak GiB", "compile s", "fxpar / this")


def cells(record, ours):
    """A row of the table. The ratio is of tokens/s: above 1, fxpar is faster."""
    if record["status"] != "ok":
        return [record["name"], record["status"], *[""] * 5]
    line = record["result"]
    rate = line["tokens_per_s_per_gpu"]
    compile_s = line.get("compile_s", line.get("first_s"))  # some peers do not report it
    ratio = "" if record is ours or ours["status"] != "ok" else f"{ours['result']['tokens_per_s_per_gpu'] / rate:.3f}"
    return [
        record["name"], f"{line['step_ms']:.1f}", f"{rate:,.0f}", f"{line['mfu_causal']:.1%}",
        f"{line['peak_mem_gib']:.1f}", "" if compile_s is None else f"{compile_s:.1f}", ratio,
    ]  # fmt: skip


def show(title, records):
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for record in records:
        table.add_row(*cells(record, records[0]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for record in records:
        if record["status"] != "ok":
            print(f"  {record['name']}: {record['status']}: {record['reason']}")


def markdown(title, records):
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(cells(record, records[0]) for record in records)]
    reasons = [f"- {r['name']}: {r['status']}: {r['reason']}" for r in records if r["status"] != "ok"]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows), "", *reasons, ""])


def about(args):
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = [] if args.quick else subprocess.run(smi, capture_output=True, text=True).stdout.splitlines()
    nccl = None if args.quick else ".".join(map(str, torch.cuda.nccl.version()))
    return dict(
        time=time.strftime("%Y-%m-%d %H:%M:%S"), quick=args.quick, gpus=gpus, torch=torch.__version__,
        cuda=torch.version.cuda, nccl=nccl, python=platform.python_version(), shape=args.shape,
        command=["python", "benchmarks/run.py", *sys.argv[1:]],
    )  # fmt: skip


def main():
    args = parse_args()
    report, pages = about(args) | dict(suites={}), []
    folder = args.out / time.strftime("run-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    for suite, (cases, processes) in args.suite.items():
        records = report["suites"][suite] = []
        for record in run_suite(suite, cases, processes, args, folder):
            records.append(record)  # written each time: a run that is cut off keeps what it has
            (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
        title = suite + (" (smoke run on the CPU: the times mean nothing)" if args.quick else "")
        show(title, records)
        pages.append(markdown(title, records))
        (folder / "results.md").write_text("\n".join(pages))
    print(f"written: {folder}")
    if any(r["status"] == "failed" for records in report["suites"].values() for r in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
