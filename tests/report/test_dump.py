"""Dumps: every pass's program as Python that compiles, runs, and says what it is."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import torch

import fxpar
from fxpar import compiler
from fxpar.passes import pipeline
from fxpar.report import dump
from tests import zoo


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The dump of a small model under dp=2,tp=2: name -> path, in order."""
    folder = tmp_path_factory.mktemp("dump")
    torch.manual_seed(0)
    model, inputs = zoo.NanoGPT(layers=1), {"idx": zoo.ids(), "targets": zoo.labels()}
    compiler.compile_program(model, "dp=2,tp=2", inputs, observe=dump.Dumper(folder))
    return {path.name: path for path in sorted(folder.iterdir())}


def test_one_numbered_file_a_pass(files):
    names = ["capture", *(name for name, _ in pipeline.passes())]
    assert list(files) == [f"{i:02d}_{name}.py" for i, name in enumerate(names)]


def test_every_file_compiles(files):
    for name, path in files.items():
        compile(path.read_text(), name, "exec")


@pytest.mark.parametrize("name, shape", [("00_capture.py", "(4, 8, 96)"), ("-1", "(2, 8, 48)")],
                         ids=["capture", "partition"])  # fmt: skip
def test_a_file_runs_by_itself(files, name, shape):
    path = files.get(name) or list(files.values())[-1]
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120,
                          env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shape in done.stdout and "()" in done.stdout  # logits (a part of them), and the loss


def test_comments_say_source_layout_collective_and_the_users_line(files):
    text = list(files.values())[-1].read_text()
    assert re.search(r"# param h.0.attn.c_attn.weight; \[\w+3 heads4/tp head_dim8, hidden32\]", text)
    lines, first = inspect.getsourcelines(zoo.CausalAttention.forward)
    at = first + next(i for i, line in enumerate(lines) if "self.c_attn(x)" in line)
    assert f"# {'/'.join(zoo.plain.__file__.split('/')[-3:])}:{at}  qkv = self.c_attn(x)" in text
    assert "all_gather over tp for" in text and "reduce_scatter over tp for" in text
    assert text.startswith("\"\"\"After pass 'replicas'. Plan dp=2,tp=2; mesh dp=2 x tp=2; one rank of it.")


def test_a_directory_is_written_where_parallelize_is_told_to(tmp_path, capsys):
    module = fxpar.parallelize(torch.nn.Linear(4, 4), "dp=1", (torch.ones(2, 4),), dump_dir=tmp_path / "new")
    names = [p.name for p in sorted((tmp_path / "new").iterdir())]
    assert names[0] == "00_capture.py" and names[-1].endswith("_replicas.py")
    text = module.print_readable()
    assert capsys.readouterr().out == text + "\n"
    assert text == (tmp_path / "new" / names[-1]).read_text()
