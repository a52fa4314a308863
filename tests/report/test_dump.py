"""Dumps: every pass's program as Python that compiles, runs, and says what it is."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch import fx

import fxpar
from fxpar import compiler
from fxpar.errors import FxparError
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


@pytest.fixture(scope="module")
def deep():
    """name -> the program after a pass, as text and as it was, of a model of four equal layers."""
    made = {}
    torch.manual_seed(0)
    model, inputs = zoo.NanoGPT(layers=4), {"idx": zoo.ids(), "targets": zoo.labels()}
    compiler.compile_program(model, "tp=2", inputs, observe=lambda name, program: made.setdefault(
        name, (dump.readable(program, name), copy.deepcopy(program.graph))))
    return made


def test_a_block_is_written_once_and_called_for_all_that_are_equal(deep):
    text, _ = deep["replicas"]
    assert text.count("def block(") == 1 and text.count("scaled_dot_product_attention.default(") < 4
    assert re.search(r"= block\(.*  # h.2 as h.[01]\n", text) and re.search(r"= block\(.*  # h.3 as h.[01]\n", text)
    assert re.search(r'"""h.[01], and [23] more that are equal."""', text)
    assert re.search(r"__\d+,  # differs", text)  # every dropout has a number of its own


def test_a_program_written_in_blocks_computes_the_same(deep):
    text, graph = deep["losses"]
    namespace: dict = {"__name__": "dumped"}
    exec(text, namespace)
    assert "def block(" in text
    inputs = [torch.rand_like(x) if x.is_floating_point() else x for x in namespace["made_up_inputs"]()]
    results = []
    for function in (namespace["forward"], fx.GraphModule({}, graph)):
        torch.manual_seed(1)  # of the same random numbers
        results.append(function(*inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_directory_is_written_where_parallelize_is_told_to(tmp_path, capsys):
    module = fxpar.parallelize(torch.nn.Linear(4, 4), "dp=1", (torch.ones(2, 4),), dump_dir=tmp_path / "new")
    names = [p.name for p in sorted((tmp_path / "new").iterdir())]
    assert names[0] == "00_capture.py" and names[-1].endswith("_replicas.py")
    text = module.print_readable()
    assert capsys.readouterr().out == text + "\n"
    assert text == (tmp_path / "new" / names[-1]).read_text()


class Hostile(torch.nn.Module):
    """Names that end a comment, or a string, if they are let."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.ones(4, 4)))

    def forward(self, x):
        for parameter in self.parameters():
            x = x @ parameter
        return x


def test_names_of_the_model_stay_in_comments(tmp_path, monkeypatch):
    """A dump with such names has the same code as one without."""
    ran = tmp_path / "ran"
    attack = f"open({str(ran)!r}, 'w')".replace(".", chr(46))
    names = [f"w{end}{attack}{end}" for end in ("\n", "\r", "\u2028", "\x0c", "\0", "\ud800")]
    names = [name.replace(".", "") for name in names]
    monkeypatch.setattr(dump, "user_line", lambda node: f"/a\n{attack}\n/b.py:3  x = 1\r{attack}")
    trees = []
    for folder, given in (("a", names), ("b", ["p" * (i + 1) for i in range(len(names))])):
        compiler.compile_program(Hostile(given), "dp=1", (torch.ones(2, 4),), observe=dump.Dumper(tmp_path / folder))
        made = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((tmp_path / folder).iterdir())]
        trees.append([[type(node).__name__ for node in ast.walk(tree)] for tree in made])
    assert trees[0] == trees[1] and not ran.exists()


def test_a_dump_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "00_capture.py").symlink_to(tmp_path / "precious")
    with pytest.raises(FxparError, match="it is a link, and is not written through; remove it"):
        fxpar.parallelize(torch.nn.Linear(4, 4), "dp=1", (torch.ones(2, 4),), dump_dir=tmp_path / "d")
    assert (tmp_path / "precious").read_text() == "mine"
