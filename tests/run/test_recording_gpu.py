"""Recordings on GPUs change no loss of 200 steps: ``pytest -m gpu``; on one GPU, on two over NCCL and by copy engines, and in
pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxpar.compat import CudaGraphs
from fxpar.ops.elementwise import spread
from fxpar.ops.table import written_later

ROOT = Path(__file__).parent.parent.parent
PLANS = {"dp=1": 1, "dp=1,param_dtype=bf16": 1, "dp=2,zero=3": 2, "dp=2": 2, "tp=2": 2, "cp=2": 2,
         "dp=2,zero=3,param_dtype=bf16": 2, "pp=2,microbatches=4,schedule=1f1b": 2, "pp=2,microbatches=4,schedule=zb1p": 2,
         "pp=2,microbatches=4,schedule=interleaved1f1b,virtual_stages=2": 2,
         "pp=2,microbatches=4,schedule=zbv,virtual_stages=2": 2,
         "pp=2,dp=2,zero=3,microbatches=4": 4, "pp=2,dp=2,zero=1,microbatches=4": 4, "pp=2,tp=2,microbatches=4": 4}

STEPS = "capturable", "foreach", "number", "radam"
"""Optimizers of tests/recording_program.py whose steps are played back."""


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("plan,model,optimizer", [*((plan, model, "fused") for plan in PLANS for model in ("llama", "gpt2")), *(
    ("dp=1", "llama", kind) for kind in STEPS), ("dp=2,zero=3", "gpt2", "capturable")])
def test_losses_are_the_same(plan, model, optimizer, tmp_path):
    gpus = PLANS[plan]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are needed, {torch.cuda.device_count()} are here")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
               str(ROOT / "tests/recording_program.py"), plan, model, "200", optimizer]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "FXPAR_FOLDER": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    assert lines[0]["told"].startswith("on") and lines[0]["off"] <= 1e-5, lines[0]
    assert "clipping: on" in lines[0]["told"] and ("step: on" in lines[0]["told"]) == (optimizer in STEPS), lines[0]


@pytest.mark.gpu
def test_tables_of_addresses_are_written_when_a_recording_is_over():
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    source = [torch.randn(n, device="cuda") for n in (40_000, 64)]
    first, second = ([torch.zeros_like(x) for x in source] for _ in range(2))
    spread(source, first, second)

    def code(given: list[torch.Tensor]) -> list[torch.Tensor]:
        made = [x * 2 for x in given]
        spread(made, first, second)
        return made

    assert graphs.beside is not None
    with written_later(graphs.beside) as write:
        _, play = graphs.record(code, list(source))
    kept = write()
    for _ in range(2):
        source[0].normal_()
        play()
        assert len(kept) == 1 and all(torch.equal(x, y * 2) for to in (first, second) for x, y in zip(to, source, strict=True))


@pytest.mark.gpu
def test_memory_is_given_back_with_the_last_recording():
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    graphs.give_back()
    before = graphs.taken()

    def code(given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [given[0].expand(2**24) + 1]

    for _ in range(2):
        made, play = graphs.record(code, [torch.zeros(1, device="cuda")])
        play()
        assert made[0].sum() == 2**24 and before + 2**26 <= graphs.taken() <= graphs.size()
        del made, play
        graphs.give_back()
        assert graphs.taken() <= before + 2**22
