"""Plans in files: TOML, YAML and JSON, alone or as a table; what is no plan is an error that names the file or the field."""

from __future__ import annotations

import json
import sys

import pytest

from fxpar.errors import PlanError
from fxpar.plan import Plan

PLAN = Plan(dp=2, tp=2, zero=3, recompute=0.5, param_dtype="bf16", batch_dims={"src": 1})
TOML = 'dp = 2\ntp = 2\nzero = 3\nrecompute = 0.5\nparam_dtype = "bf16"\nbatch_dims = {src = 1}\n'
YAML = "plan:\n  dp: 2\n  tp: 2\n  zero: 3\n  recompute: 0.5\n  param_dtype: bf16\n  batch_dims: {src: 1}\n"
JSON = json.dumps({"plan": {"dp": 2, "tp": 2, "zero": 3, "recompute": 0.5, "param_dtype": "bf16", "batch_dims": {"src": 1}}})


@pytest.mark.parametrize("name, text", [("plan.toml", TOML), ("all.toml", f"lr = 1\n[plan]\n{TOML}"), ("plan.yaml", YAML),
                                        ("plan.yml", YAML), ("plan.json", JSON)])
def test_a_plan_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert Plan.load(tmp_path / name) == PLAN == Plan.load(str(tmp_path / name))


@pytest.mark.parametrize("name, text, named", [
    ("plan.toml", "dp = ", "cannot be read"),
    ("plan.yaml", "dp: [", "cannot be read"),
    ("plan.json", "[1]", "must hold the fields"),
    ("plan.yaml", "1: 2", "must hold the fields"),
    ("plan.toml", "dpp = 2", "must be one of the fields"),
    ("plan.toml", "dp = 0", "must be a positive integer"),
    ("plan.toml", 'dp = "2"', "must be a positive integer"),
    ("plan.txt", "dp=2", "must be a file whose name ends in"),
])  # fmt: skip
def test_what_is_no_plan_is_an_error(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match=named):
        Plan.load(tmp_path / name)


def test_yaml_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text("dp: 2")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(PlanError, match="pip install pyyaml"):
        Plan.load(tmp_path / "plan.yaml")
