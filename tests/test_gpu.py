"""Two GPUs over NCCL, through Inductor. Run them where there are two: ``pytest -m gpu``."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("nccl_program.py")


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("plan, dtype", [
    *((plan, dtype) for plan in ("dp=2", "tp=2", "dp=2,zero=2", "dp=2,zero=3", "dp=2,zero=3,recompute=full")
      for dtype in ("float32", "bfloat16")),
    *((f"{plan},param_dtype=bf16,reduce_dtype=fp32", "bfloat16") for plan in ("dp=2", "dp=2,zero=3")),
    *((f"dp=2,zero={level},microbatches=2", "float32") for level in (1, 2, 3)),
])  # fmt: skip
def test_two_gpus_compute_what_one_does(plan, dtype):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(PROGRAM)]
    done = subprocess.run([*command, plan, dtype], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "equal" in done.stdout
