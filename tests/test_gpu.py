"""Two GPUs over NCCL, through Inductor. Run them where there are two: ``pytest -m gpu``."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("nccl_program.py")


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,zero=2", "dp=2,zero=3", "dp=2,zero=3,recompute=full"])
def test_two_gpus_compute_what_one_does(plan, dtype):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", str(PROGRAM)]
    done = subprocess.run([*command, plan, dtype], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "equal" in done.stdout
