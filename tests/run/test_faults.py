"""Mistakes of one rank of two: an error on all, or rightly nothing; never silence, and no hang.

All kinds, on a machine of many cores: ``pytest -n 32 -m slow tests/run/test_faults.py``; each takes two processes.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.run.faults import HUNG, MISTAKES, TIMEOUT, ending

ACCEPTED = ("no mistake", "no mistake, tp", "no mistake, zero=3", "no mistake, pp", "model: another seed",
            "dump_dir: cannot be written", "a rank that is slow", "a rank that is slow in its backward")
"""What is no mistake; of dump_dir, rank 0 alone writes there."""


def right_one(name: str) -> str:
    """The program without the mistake."""
    plan = MISTAKES[name][0]
    return next(other for other in ACCEPTED if other.startswith("no mistake") and MISTAKES[other][0] == plan)


def endings(name: str, timeout: float, folder: Path) -> list[tuple]:
    """How each rank's program ends. Raises: AssertionError for one that does not, with where it is."""
    return launch(2, ending, name, str(folder), timeout, timeout=HUNG * timeout)


def seconds(name: str, timeout: float) -> float:
    """What the program without the mistake takes as busy as this machine is now."""
    with tempfile.TemporaryDirectory() as folder:
        return max(rank[2] for rank in endings(right_one(name), timeout, Path(folder)))


def outcome(name: str, timeout: float, folder: Path) -> tuple[str, str]:
    """("error" on all ranks, "accepted" by all, or what is wrong; what the ranks said)."""
    first, second = endings(name, timeout, folder / "it")
    said = " / ".join(f"{kind.split()[0]}: {text}"[:240] for kind, text, *_ in (first, second))
    took = max(first[2], second[2])
    if took > 6 * timeout and took > 4 * timeout + 3 * (right := seconds(name, timeout)):
        return f"late: {took:.0f} s, and without the mistake {right:.0f} s", said
    if first[0] != "ok" and second[0] != "ok":
        return ("error" if "FxparError" in first[0] else "unclear"), said
    if first[0] == second[0] == "ok":
        wanted = endings(right_one(name), timeout, folder / "right")
        alike = all(made[3] == right[3] and all(map(torch.equal, made[4], right[4]))
                    for made, right in zip((first, second), wanted, strict=True))
        return ("accepted" if alike else "silent"), said
    return "one rank alone has an error", said


@functools.cache
def patience() -> float:
    """A timeout that ranks without a mistake keep on a machine as busy as this one."""
    return max(TIMEOUT, seconds("no mistake", 10 * TIMEOUT) / 2)


SHORT = ("evaluation on one rank", "backward: left out")
COMPARED = {
    "forward: another tensor without a batch": "different values of input 'weight'.*no batch dim",
    "forward: another tensor that wants a gradient": "different values of input 'weight'",
    "forward: other shape": r"in their inputs: rank 0 with \('ids', \(4, 6\).*rank 1 with \('ids', \(3, 6\)",
    "module: another tensor that is no buffer": "the tensor 'temperature'.*register it as a buffer",
    "module: another tensor that is no buffer, later": "different values of what they should hold alike: 'temperature'",
    "module: load_state_dict": r"rank 0 with nothing.*, rank 1 with 'load_state_dict of Net",
    "model: another temperature": r"different programs \(rank 0 and rank 1 differ: call_function .*script.py:\d+",
    "optimizer: another rate": r"rank 0 with \('SGD', 'group 0', 'lr', 0.1\), rank 1 with \('SGD', 'group 0', 'lr', 0.01\)",
    "optimizer: some parameters, zero=3": "has a gradient: rank 0 with False, rank 1 with True",
    "optimizer: a rate that is a tensor, zero=3": "'lr', 0.1.*'lr', 0.0",
    "optimizer: a gradient less, zero=3": r"'parameters and gradients', 12, 12\).*'parameters and gradients', 12, 11\)",
    "optimizer: one gradient is not zeroed, zero=3": "whether parameter 'embed.weight' has a gradient",
    "parallelize: under inference_mode": "inside of torch.inference_mode",
    "manager: other arguments": "CheckpointManager differently in keep: rank 0 with 3, rank 1 with 0",
    "modules called in another order": r"rank 0 forward of Net.*, rank 1 forward of Net \(module",
    "backward passes in another order": r"the backward passes since the last forward: rank 0 with \('Net",
}
"""Mistakes that a comparison finds, after which ranks go on; and what is said."""


@pytest.mark.multiproc
@pytest.mark.parametrize("name", SHORT)
def test_a_mistake_of_one_rank_is_an_error_on_all(name, tmp_path):
    kind, said = outcome(name, TIMEOUT, tmp_path)
    assert kind == "error", said


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("name", MISTAKES)
def test_all_kinds_of_mistakes(name, tmp_path):
    kind, said = outcome(name, patience(), tmp_path)
    print(f"{name:45s} {kind:12s} {said}")
    assert kind == ("accepted" if name in ACCEPTED else "error"), said


def one_after_the_other(rank: int, names: list[str], folder: str) -> list[tuple[str, str]]:
    return [ending(rank, name, f"{folder}/{number}", TIMEOUT)[:2] for number, name in enumerate(names)]


@pytest.mark.multiproc
@pytest.mark.parametrize("zero", ["zero=0", pytest.param("zero=3", marks=pytest.mark.slow)])
def test_what_is_compared_is_named(zero, tmp_path):
    names = [name for name in COMPARED if ("zero=3" in MISTAKES[name][0]) == (zero == "zero=3")]
    for of_rank in launch(2, one_after_the_other, names, str(tmp_path)):
        for name, (kind, text) in zip(names, of_rank, strict=True):
            assert "FxparError" in kind and re.search(COMPARED[name], text), f"{name}: {kind} {text}"


STOPPED = """
import os, signal, time, torch, fxpar
from tests.run.script import Net, Program

rank, victim, where = int(os.environ["RANK"]), int(os.environ["VICTIM"]), os.environ["WHERE"]
torch.manual_seed(0)
rows = Program.rows(None, 0, 0)
module = fxpar.parallelize(Net(), "dp=2", rows, timeout=4, backend="eager")
for step in range(4):
    if step == 2 and rank == victim and where == "forward":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    begin = time.monotonic()
    try:
        loss = module(**rows)
        if step == 2 and rank == victim and where == "backward":
            module.get_parameter("up.weight").register_hook(lambda grad: os.kill(os.getpid(), int(os.environ["SIGNAL"])))
        loss.backward()
        module.clip_grad_norm_(1.0)
    except fxpar.FxparError as error:
        print(f"{time.monotonic() - begin:.0f} s: {error}", flush=True)
        os._exit(7)
"""


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("sent, victim, says", [
    (signal.SIGKILL, 1, "rank 1 has given no sign of life"), (signal.SIGSTOP, 1, "rank 1 has given no sign of life"),
    (signal.SIGKILL, 0, "the store .* is gone"), (signal.SIGSTOP, 0, "the store .* has not answered for")])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_process_that_is_killed_or_stopped_ends_the_other(where, sent, victim, says):
    """The store is in the process of rank 0, as without torchrun."""
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    there = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "VICTIM": str(victim),
             "SIGNAL": str(int(sent)), "WHERE": where, "FXPAR_QUIET": "1", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", STOPPED], env={**there, "RANK": str(rank)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for rank in (0, 1)]
    try:
        said, _ = ranks[1 - victim].communicate(timeout=150)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[1 - victim].returncode == 7 and re.search(says, said) and int(said.split()[0]) < 15, said
