"""Many architectures on 2 and on 4 GPUs, over NCCL, compiled by Inductor, against one GPU: ``pytest -m gpu -n 16``.

``-k smoke`` runs each architecture once. FXPAR_TABLE=FILE collects a line per case, of which ``python -m tests.gpu_table FILE``
makes the table of benchmarks/RESULTS.md. Six architectures under a plan share a process group, one after the other; groups run
side by side (compiling takes most of the time), those of two GPUs on different ones, where there are four. The plans of four
GPUs are also run by one, in simulation (``-k simulated -n 6``): the same graphs, compiled for it, with the ranks as threads.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from fxpar.testing import assert_equivalent
from tests import zoo
from tests.gpu_program import enough, on_gpu, without_dropout
from tests.matrix import pairwise

ROOT = Path(__file__).parent.parent.parent
FAMILIES = (
    "llama_padded", "llama_left", "llama_tied", "llama_odd", "qwen2", "qwen3", "phi3", "gemma2_padded", "mistral_sliding", "gptj",
    "falcon", "bloom", "olmo2", "stablelm", "starcoder2", "mpt", "gpt2_padded", "gpt_oss", "mixtral", "qwen3_moe", "bert",
    "roberta", "distilbert", "t5", "bart", "vit", "clip", "nanogpt", "resnet", "dlrm",
)  # fmt: skip
PLANS = {2: ("dp=2", "tp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3"),
         4: ("dp=2,tp=2", "dp=2,tp=2,zero=3", "dp=4,dp_replicate=2,zero=3", "tp=4,sequence_parallel=false")}  # fmt: skip
RECOMPUTE = ("none", "selective", "full", "0.5")
DTYPES = ("", "param_dtype=bf16")
PIPELINED = ("llama_padded", "llama_tied", "gpt2_padded", "t5", "bert", "qwen3", "gemma2_padded")
PIPELINES = ("pp=2,tp=2", "pp=4", "pp=2,dp=2,zero=3")
SCHEDULES = ("1f1b", "gpipe", "interleaved1f1b,virtual_stages=2", "zb1p", "zbv,virtual_stages=2")
SEQUENCES = ("llama_padded", "llama_left", "llama_tied", "gpt2_padded", "qwen3", "gemma2_padded", "mistral_sliding", "bert", "t5",
             "bloom", "bart", "phi3")  # fmt: skip
CONTEXTS = ("cp=4", "cp=2,tp=2", "dp=2,cp=2,zero=3")
COMMUNICATION = ("p2p", "allgather", "a2a", "a2a+p2p")
GROUP = 6
"""How many cases share a process group."""
WHOLE = ("clip",)
"""It is refused in microbatches: it compares rows with each other."""
CASES = {gpus: [(*case, 1 if case[0] in WHOLE else count)
                for *case, count in pairwise(FAMILIES, plans, RECOMPUTE, DTYPES, (1, 2))] for gpus, plans in PLANS.items()}
PIPELINE_CASES = [(name, plan, recompute, ",".join(filter(None, [f"schedule={schedule}", dtype])), 4) for
                  name, plan, schedule, recompute, dtype in pairwise(PIPELINED, PIPELINES, SCHEDULES, RECOMPUTE, DTYPES)]

CONTEXT_CASES = [(name, plan, recompute, ",".join(filter(None, [f"cp_comm={comm}", dtype])), 1) for
                 name, plan, comm, recompute, dtype in pairwise(SEQUENCES, CONTEXTS, COMMUNICATION, RECOMPUTE, DTYPES)]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
EXPERTS = {2: ("dp=2,ep=2", "dp=2,ep=2,zero=1", "tp=2,ep=2"),
           4: ("dp=4,ep=4", "dp=2,tp=2,ep=4", "dp=4,ep=2,zero=3", "dp=2,tp=2,ep=2", "pp=2,dp=2,ep=2")}  # fmt: skip
EXPERT_CASES = {gpus: [(name, plan, recompute, ",".join(filter(None, [dispatch, dtype])), 2 if "pp=" in plan else count)
                       for name, plan, dispatch, recompute, dtype, count in pairwise(
                           MIXTURES, plans, ("", "ep_dispatch=allgather"), RECOMPUTE, DTYPES, (1, 2))]
                for gpus, plans in EXPERTS.items()}


def runs(gpus: int, plan: str, cases: list[tuple]) -> None:
    """All cases of a plan in one process group; what is wrong is said of each of them."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are needed, {torch.cuda.device_count()} are here")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = worker * gpus % (torch.cuda.device_count() // gpus * gpus)
    devices = ",".join(str(first + i) for i in range(gpus))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
               str(ROOT / "tests/gpu_program.py"), plan, json.dumps(cases)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if "FXPAR_TABLE" in os.environ:
        with open(os.environ["FXPAR_TABLE"], "a") as table:
            table.writelines(json.dumps({**line, "mesh": plan, "gpus": gpus}) + "\n" for line in lines)
    wrong = "\n".join(f"{line['model']} {line['plan']}: {line['error']}" for line in lines if line["error"])
    assert not wrong, wrong
    assert done.returncode == 0 and len(lines) == len(cases), done.stdout[-2000:] + done.stderr[-4000:]


def groups(gpus: int, plans: Sequence[str], cases: list[tuple]) -> list[Any]:
    """Cases of one plan each, that share a process group."""
    found = []
    for plan in plans:
        its = [(name, *rest) for name, mine, *rest in cases if mine == plan]
        found += [pytest.param(gpus, plan, part, id=f"{gpus}gpus-{plan}-{part[0][0]}")
                  for part in (its[i:i + GROUP] for i in range(0, len(its), GROUP))]
    return found


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus, plan, cases", [g for gpus, plans in PLANS.items() for g in groups(gpus, plans, CASES[gpus])])
def test_architectures(gpus, plan, cases):
    runs(gpus, plan, cases)


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus, plan, cases", groups(4, PIPELINES, PIPELINE_CASES))
def test_pipelines(gpus, plan, cases):
    """Every schedule, with uneven counts of labels in the microbatches."""
    runs(gpus, plan, cases)


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus, plan, cases", groups(4, CONTEXTS, CONTEXT_CASES))
def test_contexts(gpus, plan, cases):
    """Sequences in parts, by every way to communicate."""
    runs(gpus, plan, cases)


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus, plan, cases", [
    g for gpus, plans in EXPERTS.items() for g in groups(gpus, plans, EXPERT_CASES[gpus])])
def test_experts(gpus, plan, cases):
    """Experts on different ranks, by both ways to reach them."""
    runs(gpus, plan, cases)


SMOKE = [(name, plan, *rest) for name, plan, rest in zip(
    FAMILIES, itertools.cycle(PLANS[2]), itertools.cycle(itertools.product(RECOMPUTE, DTYPES, (1,))), strict=False)]  # fmt: skip
"""Each architecture under one plan, each plan with all policies and dtypes."""


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("gpus, plan, cases", groups(2, PLANS[2], SMOKE))
def test_smoke(gpus, plan, cases):
    runs(gpus, plan, cases)


@pytest.mark.gpu
@pytest.mark.parametrize("name, plan, recompute, more, microbatches", CASES[4])
def test_simulated(name, plan, recompute, more, microbatches):
    """One GPU runs what four would, compiled."""
    if not torch.cuda.is_available():
        pytest.skip("a GPU is needed")
    model, inputs = zoo.build(name)
    whole = ",".join(filter(None, [plan, more, f"recompute={recompute}", f"microbatches={microbatches}"]))
    plan = fxpar.Plan.parse(whole)
    assert_equivalent(without_dropout(model).cuda(), plan, on_gpu(enough(inputs, plan)), backend="inductor")


def test_the_cover_of_gpus_has_every_family_under_every_plan():
    for gpus, plans in PLANS.items():
        assert {c[:2] for c in CASES[gpus]} == set(itertools.product(FAMILIES, plans))
