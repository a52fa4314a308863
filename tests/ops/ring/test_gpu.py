"""Ring attention with every kernel of a GPU, in every mode: ``pytest -m gpu``; on one GPU in lock step, on several over NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from fxpar.ops.ring.kernels import ALL, Seen, choose
from tests.ring_cases import in_lock_step, off
from tests.ring_program import KERNELS, gpu_cases, tolerance

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus", [2, 4])
def test_over_nccl(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are needed, {torch.cuda.device_count()} are here")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
               str(ROOT / "tests/ring_program.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = "\n".join(f"{line['case']}: {line['error']}" for line in lines if line["error"])
    assert not wrong, wrong
    count = len(KERNELS) * len(list(gpu_cases(gpus)))
    assert done.returncode == 0 and len(lines) == count, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_one_gpu(kernel, ranks):
    backends, dtype = KERNELS[kernel]
    wrong = []
    for name, case in gpu_cases(ranks):
        case = case.to("cuda").to(dtype)
        with sdpa_kernel(backends):
            have = in_lock_step(case)
        want = case.whole()
        if not off(have, want) <= tolerance(case, want):
            wrong.append(f"{name}: {off(have, want):.2e} of {tolerance(case, want):.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_users_ask_for_is_taken(kernel):
    backends, dtype = KERNELS[kernel]
    name = kernel.split()[0]
    q, k = (torch.randn(1, h, 256, 64, device="cuda", dtype=dtype) for h in (8, 2))
    with sdpa_kernel(backends):
        for seen in (ALL, Seen(causal=True)):
            assert choose(q, k, k, seen, 0.125).name in ({name} if name != "any" else {"flash", "cudnn"})
