"""The configurations of examples/production: their plans, and what is told of them."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fxpar.cost.clusters import cluster
from fxpar.plan import Plan
from fxpar.report.memory import Peak

FILE = Path(__file__).parent.parent / "examples" / "production" / "run.py"
_spec = importlib.util.spec_from_file_location("production", FILE)
assert _spec is not None and _spec.loader is not None
production = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(production)

KNOWN = {
    "llama3_8b": (8, 1, 1, 2, 1, 4, 8.03),
    "llama3_70b": (64, 4, 4, 2, 1, 2, 70.55),
    "llama3_405b": (1024, 8, 8, 2, 1, 8, 405.85),
    "gpt3_175b": (128, 4, 8, 1, 1, 4, 174.6),
    "mixtral_8x7b": (64, 1, 4, 1, 8, 16, 46.7),
    "mixtral_8x22b": (256, 4, 4, 1, 8, 16, 140.63),
    "deepseek_v3": (1024, 2, 16, 1, 64, 32, 671.03),
}
"""GPUs, tp, pp, cp, ep, dp, billions of parameters."""
SMALL = dict(title="a small one", model="LlamaForCausalLM", plan="dp=2,tp=2,pp=2,cp=2,zero=1,microbatches=2,outputs=loss",
             batch=8, sequence=64, cluster="dgx-h100",
             config=dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2))


def test_every_configuration_has_its_plan():
    assert {*production.NAMES} == {*KNOWN}
    for name, (gpus, *degrees, _) in KNOWN.items():
        config = production.read(name)
        plan = Plan.parse(config["plan"])
        assert [plan.world_size, plan.tp, plan.pp, plan.cp, plan.ep, plan.dp] == [gpus, *degrees], name
        assert config["batch"] == plan.dp * plan.microbatches, f"{name}: microbatches are of one sequence"
        assert "published" not in config or config["published"].keys() >= {"tflops", "peak", "how", "source"}


def test_what_is_told_of_a_configuration():
    report = replace(production.report_of(SMALL), predicted=lambda: Peak(3 * 2**30, "forward", "", {}, 0))
    text = "\n".join(production.summary(SMALL, report))
    assert text.startswith("a small one on 16 GPUs of dgx-h100: dp=2,tp=2,pp=2,cp=2,zero=1,microbatches=2,outputs=loss\n")
    made = report.step.time()
    assert "peak memory of a rank: 3.0 of 79.6 GiB" in text
    assert f"bubble {made.timeline.bubble:.1%}; step " in text and "published" not in text
    assert production.tokens_per_second(SMALL, report) == pytest.approx(8 * 64 / made.seconds / 16)
    numbers = sum(p.numel() for p in production.model_of(SMALL).parameters())
    assert production.parameters(report) == (numbers, max(r.memory["parameters"] for r in report.pipeline.ranks) // 4)
    assert len(production.row(SMALL, report, 1.0)) == len(production.HEAD)


def test_bytes_of_collectives_are_those_of_a_rank():
    report = production.report_of({**SMALL, "plan": "dp=2,pp=2,zero=1,microbatches=2,schedule=zbv,virtual_stages=2", "batch": 4})
    on_rank = [sum(r.bytes for r in report.collectives if r.axes == ("dp",) and r.stage in stages) for stages in ((0, 3), (1, 2))]
    assert production.per_axis(report, least=0)["dp"] == max(on_rank) / 2**30


def test_all_are_told_of_where_none_is_named(monkeypatch, capsys):
    monkeypatch.setattr(production, "NAMES", ["small"])
    monkeypatch.setattr(production, "read", lambda name: SMALL)
    monkeypatch.setattr(production, "report_of", lambda config, of=production.report_of: replace(
        of(config), predicted=lambda: Peak(3 * 2**30, "forward", "", {}, 0)))
    monkeypatch.setattr("sys.argv", ["run.py", "--table"])
    production.main()
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == len(production.HEAD) + 1 and "a small one" in line
    for arguments, error in ((["large"], "there is no large: small"), ([], "name a configuration")):
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        with pytest.raises(SystemExit):
            production.main()
        assert error in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_configuration_at_its_full_size(name):
    config, start = production.read(name), time.process_time()
    report = production.report_of(config)
    made = report.step.time()
    print("\n".join(production.summary(config, report)))
    assert production.parameters(report)[0] == pytest.approx(KNOWN[name][-1] * 1e9, rel=1e-3)
    assert report.peak_memory < cluster(config["cluster"]).memory
    assert 0 < made.timeline.bubble < 0.3 and 0.2 < made.utilization < 0.803
    assert time.process_time() - start < production.LIMIT
