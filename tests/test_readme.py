"""The first program of the README runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.multiproc
def test_the_first_program_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    program, launched = re.search(r"```python\n(.*?)```", text, re.S)[1], "torchrun --nproc-per-node=4 train.py"
    assert launched in text
    (tmp_path / "train.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *launched.split()[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
