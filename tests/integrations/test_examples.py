"""The examples run by their commands, and are equal to one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]
ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"`torchrun (--nproc-per-node=\d [^`]*--check)`", (ROOT / "examples" / "README.md").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^equal$", done.stdout, re.M)


def test_every_program_that_compares_is_among_them():
    programs = {path.name for path in (ROOT / "examples").glob("*.py") if "--check" in path.read_text()} - {"common.py"}
    assert programs == {Path(command.split()[1]).name for command in COMMANDS}
