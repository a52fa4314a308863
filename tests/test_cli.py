"""``python -m fxpar``: commands, the three ways to name a model, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torch import nn

import fxpar
from fxpar.cli import load_model, main
from fxpar.ops import collectives
from tests import zoo
from tests.choose.models import cluster_file

LLAMA = {**zoo.LLAMA, "vocab_size": 96, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def classifier():
    """What ``tests.test_cli:classifier`` names: a model and its inputs."""
    return zoo.build("mlp")


def bare() -> nn.Module:
    """A model without inputs."""
    return nn.Linear(4, 4)


def failing() -> nn.Module:
    """A mistake in the user's code."""
    return 1 / 0


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_is_printed_in_full(capsys):
    assert run(capsys, "plan", "tp=2, dp=4") == (0, "dp=4,tp=2   world size 8\n", "")


@pytest.mark.parametrize("text, named", [("dp=0", "`dp`=0"), ("banana=1", "`banana`"), ("dp=2,ep=4", "`ep`=4")])
def test_a_bad_plan_exits_with_2(capsys, text, named):
    code, _, err = run(capsys, "plan", text)
    assert code == 2 and err.startswith("error: ") and named in err and "try" in err


@pytest.mark.parametrize("memory, code, said", [("8MiB", 0, "fits: "), ("0.6MiB", 1, "does not fit: ")])
def test_inspect_exits_with_1_where_a_plan_does_not_fit(capsys, memory, code, said):
    found = run(capsys, "inspect", "tests.choose.models:blocks", "--plan", "dp=2,outputs=loss", "--memory", memory)
    assert found[0] == code and f"\n{said}" in found[1]


@pytest.mark.slow
@pytest.mark.parametrize("memory, code, said", [("8MiB", 0, "best: "), ("10KiB", 1, "nothing fits: ")])
def test_suggest_takes_a_cluster_of_ones_own(capsys, tmp_path, memory, code, said):
    found = run(capsys, "suggest", "tests.choose.models:blocks", "--gpus", "4", "--cluster", cluster_file(tmp_path), "--memory",
                memory, "--fixed", "outputs=loss", "--candidates", "1", "--formulas")
    assert found[0] == code and f"\n{said}" in found[1] and "GPUs of own (a device of one's own)" in found[1]
    assert "seconds of bubble: " in found[1]


@pytest.mark.parametrize("flag, value, said", [
    ("--memory", "much", "`memory`"), ("--cluster", "nowhere.toml", "the path of a .toml file"),
    ("--cluster", "own.toml", "must say 'links', as fxpar's own do"), ("--fixed", "tp=two", "`tp`"),
])
def test_suggest_names_mistakes(capsys, tmp_path, monkeypatch, flag, value, said):
    monkeypatch.chdir(tmp_path)
    file = Path(cluster_file(tmp_path))
    file.write_text(file.read_text().replace("[[links]]", "[[wires]]"))
    code, _, err = run(capsys, "suggest", "tests.choose.models:blocks", "--gpus", "4", flag, value)
    assert code == 2 and err.count("\n") == 1 and said in err


def test_a_plan_in_megatrons_flags_and_in_files(capsys, tmp_path):
    flags = "--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer --bf16"
    said = "dp=2,tp=4,zero=1,sequence_parallel=true,param_dtype=bfloat16,reduce_dtype=float32   world size 8\n"
    assert run(capsys, "plan", "--megatron", flags, "--world-size", "8") == (0, said, "")
    (tmp_path / "plan.toml").write_text('dp = 2\nzero = "optim"\n')
    assert run(capsys, "plan", str(tmp_path / "plan.toml")) == (0, "dp=2,zero=1   world size 2\n", "")


def test_a_report_as_a_page_and_as_json(capsys, tmp_path):
    file = tmp_path / "out.html"
    argv = ["--quiet", "inspect", "tests.test_cli:classifier", "--plan", "dp=2", "--html", str(file), "--json"]
    code, out, err = run(capsys, *argv)
    assert code == 0 and json.loads(out)["plan"] == "dp=2" and err == f"written: {file}\n"
    assert file.read_text().startswith("<!doctype html>")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith(f"fxpar {fxpar.__version__}, torch ")


@pytest.mark.parametrize("spec", ["class", "directory"])
def test_inspect_a_configuration(capsys, config, spec):
    model = f"LlamaForCausalLM:{config}" if spec == "class" else str(config.parent)
    code, out, _ = run(capsys, "inspect", model, "--plan", "tp=2", "--batch", "2", "--seq", "16")
    assert code == 0
    assert "world size 2" in out and "[vocab/tp, hidden]" in out and "reduce_scatter  tp" in out


def test_a_timeline_is_drawn_and_printed(capsys, config, tmp_path):
    file = tmp_path / "step.svg"
    code, out, _ = run(capsys, "inspect", str(config.parent), "--plan", "pp=2,microbatches=4", "--seq", "16",
                       "--timeline", str(file), "--cluster", "dgx-a100")
    assert code == 0 and "mesh pp=2 x dp=1   world size 2" in out
    report, rows = out.split("\nrank 0 |")
    rows = "rank 0 |" + rows
    caption = next(line for line in rows.splitlines() if line.startswith("1f1b: 2 ranks, 2 stages, 4 microbatches; step "))
    assert caption in report and "on dgx-a100: NVIDIA A100" in report and "activations: ranks 0 to 1: 0.00 GiB" in rows
    drawn = ElementTree.parse(file).getroot()
    titles = [element.text for element in drawn.iter() if element.tag.endswith("title")]
    assert sum(title.startswith("F(0, ") for title in titles) == 4 and any(caption == e.text for e in drawn.iter())


def test_inspect_builds_no_weights(config):
    model, example = load_model(f"LlamaForCausalLM:{config}", meta=True, batch=2, seq=16)
    assert all(p.is_meta for p in model.parameters())
    assert example["input_ids"].shape == (2, 16) and example["labels"].equal(example["input_ids"])


def test_check_a_callable(capsys):
    code, out, _ = run(capsys, "check", "tests.test_cli:classifier", "--plan", "dp=2,tp=2")
    assert code == 0 and out.startswith("equal: tests.test_cli:classifier under dp=2,tp=2")


def test_check_a_configuration_in_evaluation_mode(capsys, config, monkeypatch):
    seen = []
    monkeypatch.setattr("fxpar.cli.assert_equivalent", lambda model, plan, example, **options: seen.append(
        (model.training, options)))
    assert run(capsys, "check", str(config.parent), "--plan", "dp=2", "--eval")[0] == 0
    assert run(capsys, "check", str(config.parent), "--plan", "dp=2", "--partitioned")[0] == 0
    assert run(capsys, "check", str(config.parent), "--plan", "dp=2", "--backend", "inductor")[0] == 0
    assert seen == [(False, {"lowered": True, "backend": "eager"}), (True, {"lowered": False, "backend": "eager"}),
                    (True, {"lowered": True, "backend": "inductor"})]


def test_check_exits_with_1_where_values_differ(capsys, monkeypatch):
    monkeypatch.setitem(collectives.CONJUGATE, "vary", (collectives.SAME, collectives.SAME))
    code, _, err = run(capsys, "check", "tests.test_cli:classifier", "--plan", "dp=2")
    assert code == 1 and err.startswith("differs: ")


@pytest.mark.parametrize("argv, named", [
    (["inspect", "tests.test_cli", "--plan", "dp=2"], "must be module:callable"),
    (["inspect", "tests.test_cli:nothing", "--plan", "dp=2"], "nothing"),
    (["inspect", "tests.no_such_file:x", "--plan", "dp=2"], "tests.no_such_file"),
    (["inspect", "tests.test_cli:LLAMA", "--plan", "dp=2"], "LLAMA"),
    (["inspect", "LlamaForCausalLM:no/config.json", "--plan", "dp=2"], "no/config.json"),
    (["inspect", "NoSuchModel:{config}", "--plan", "dp=2"], "NoSuchModel"),
    (["inspect", "{empty}", "--plan", "dp=2"], "config.json"),
    (["inspect", "tests.test_cli:classifier", "--plan", "dp=2", "--timeline", "x.svg"], "must be 2 or more for --timeline"),
    (["inspect", "tests.test_cli:classifier", "--plan", "dp=2", "--cluster", "abacus"], "`cluster`='abacus': must be one of"),
    (["inspect", "tests.test_cli:classifier", "--plan", "pp=2", "--cluster", "abacus"], "`cluster`='abacus': must be one of"),
    (["inspect", "tests.test_cli:classifier", "--plan", "pp=2", "--timeline", "{empty}"], "no timeline in "),
    (["check", "tests.test_cli:bare", "--plan", "dp=2"], "pass example_inputs"),
    (["inspect", "os.path:join", "--plan", "dp=2"], "TypeError: join() missing 1 required positional argument"),
    (["inspect", "torch.nn:Linear", "--plan", "dp=2"], "missing 2 required positional arguments"),
    (["inspect", "tests.test_cli:failing", "--plan", "dp=2"], "ZeroDivisionError: division by zero (at "),
    (["inspect", "..:z", "--plan", "dp=2"], "must be module:callable"),
    (["inspect", ":z", "--plan", "dp=2"], "must be module:callable"),
    (["inspect", "y" * 5000, "--plan", "dp=2"], "must be module:callable"),
    (["inspect", "y" * 5000 + "/a:z", "--plan", "dp=2"], "No module named"),
    (["inspect", "y" * 300 + ":z.json", "--plan", "dp=2"], "no configuration in 'z.json'"),
    (["inspect", "logging:{config}", "--plan", "dp=2"], "transformers has no class 'logging' of models"),
    (["inspect", "LlamaForCausalLM:{list}", "--plan", "dp=2"], "it holds a list"),
    (["inspect", "LlamaForCausalLM:{wrong}", "--plan", "dp=2"], "hidden_size"),
    (["inspect", "{config}", "--plan", "dp=2"], "must be module:callable"),
    (["inspect", "{folder}", "--plan", "dp=2"], "architectures must be a list of names of classes, not 3"),
    (["inspect", "{config.parent}", "--plan", "dp=999999999", "--seq", "999999999"], "inputs of batch 1999999998"),
    (["inspect", "tests.test_cli:classifier", "--plan", "pp=2", "--cluster", "y" * 5000 + ".toml"], "`cluster`="),
    (["plan", "dp=" + "9" * 5000], "`dp`="),
    (["plan"], "must be given, or --megatron"),
    (["plan", "dp=2", "--megatron=--bf16"], "must not be given with --megatron"),
    (["plan", "--megatron", "--tensor-model-paralel-size 2"], "--tensor-model-parallel-size"),
    (["plan", "{empty}/no.toml"], "cannot be read"),
    (["inspect", "tests.test_cli:classifier", "--plan", "dp=2", "--html", "{empty}"], "no report in "),
    (["plan", "tp=99999999999"], "must be less than 2147483648"),
    (["plan", "y" * 5000 + "=1"], "must be one of the fields"),
    (["check", "tests.test_cli:classifier", "--plan", "dp=3"], "`dp`=3"),
])  # fmt: skip
def test_mistakes_exit_with_2_and_name_what_is_wrong(capsys, config, tmp_path, argv, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    for name, thing in (("list", [1]), ("wrong", {"hidden_size": "x"}), ("folder/config", {"architectures": 3})):
        (tmp_path / f"{name}.json").write_text(json.dumps(thing))
    files = {name: tmp_path / f"{name}.json" for name in ("list", "wrong")}
    argv = [a.format(config=config, empty=tmp_path / "empty", folder=tmp_path / "folder", **files) for a in argv]
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.startswith("error: ") and named in err and len(err.splitlines()) == 1 and len(err) < 2000


@pytest.mark.parametrize("argv", [[], ["bake"], ["inspect", "x"], ["inspect", "x", "--plan", "dp=1", "--batch", "two"],
                                  ["inspect", "x", "--plan", "dp=1", "--batch", "-1"],
                                  ["inspect", "x", "--plan", "dp=1", "--seq", "9" * 5000]])
def test_arguments_that_argparse_refuses(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "fxpar", "plan", "dp=2,ep=4"], capture_output=True, text=True)
    assert done.returncode == 2 and "`ep`=4" in done.stderr
