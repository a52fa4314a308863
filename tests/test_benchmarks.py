"""Benchmarks run: those that can be tried out without a GPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY_EXPERTS = ("--layers=1 --hidden=32 --heads=4 --kv-heads=2 --ffn=48 --experts=4 --vocab=64 --seq=16 --mbs=1 --steps=2 "
                "--warmup=1 --fp32 --gpus 2 --impls dp=2,ep=2 fsdp2")
TINY_LLAMA = "--layers=2 --hidden=64 --heads=4 --kv-heads=2 --ffn=96 --vocab=256 --seq=64 --mbs=1 --steps=2 --warmup=1"
SCRIPTS = {
    f"experts.py {TINY_EXPERTS}": 2,
    "graphs.py --cells tiny-512-zero3 tiny-512-pp --graphs auto --steps 2": 2,
    "start.py --gpus 2 --model tiny --layers 2": 2,
    "host.py --layers 2 --steps 3": 1,
    "host.py --layers 2 --steps 3 --recorded": 1,
    f"bench_fxpar.py --plan dp=1 {TINY_LLAMA}": 1,
}
"""Arguments -> how many lines of JSON a benchmark prints."""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SCRIPTS)
def test_a_benchmark_runs(arguments):
    script, *rest = arguments.split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *rest], capture_output=True, text=True, timeout=300,
                          env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(lines) == SCRIPTS[arguments], done.stdout[-1000:] + done.stderr[-3000:]
    assert not any(line.get("error") for line in lines), lines
