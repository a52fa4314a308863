"""Long work says what it is: on the logger, on standard error, or not at all."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable

import pytest
import torch

from fxpar import progress
from fxpar.progress import be_quiet, stage
from tests import zoo


class Clock:
    """The time by which stages are long or short: it goes on when a test says so, however loaded the machine is."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", made := Clock())
    monkeypatch.setattr(progress, "EVERY", 0.001)
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    before = progress.log.level
    progress.log.setLevel(logging.WARNING)
    be_quiet(None)  # a test before may have made the process quiet, in which it then stays
    yield made
    be_quiet(None)
    progress.log.setLevel(before)


def until(happened: Callable[[], bool]) -> None:
    """Wait for what another thread does, which on a loaded machine takes as long as it takes."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def announced() -> bool:
    """Whether the stage that began last was announced, or would have been where it is quiet."""
    return progress._watcher.running[-1].said


def wait(clock: Clock, text: str = "compiling 2 of 5", seconds: float = 3.0) -> None:
    with stage(text):
        clock.now += seconds
        until(announced)


def test_a_long_stage_is_announced_and_told_with_its_seconds(capfd, clock):
    wait(clock)
    wait(clock, "saving", 11.0)
    assert capfd.readouterr().err.splitlines() == [
        "fxpar: compiling 2 of 5 ...", "fxpar: compiling 2 of 5: 3.0 s", "fxpar: saving ...", "fxpar: saving: 11 s"]


def test_stages_lie_within_each_other_and_short_ones_say_nothing(capfd, clock):
    with stage("partitioning"):
        for name in ("infer", "place", "partition", "zero", "ep", "axes"):
            with stage(f"pass {name}"):
                clock.now += 1.9
                time.sleep(0.02)  # the watcher looks at it
        wait(clock, "pass that is long")
    assert capfd.readouterr().err.splitlines() == [
        "fxpar: partitioning ...", "fxpar: pass that is long ...", "fxpar: pass that is long: 3.0 s", "fxpar: partitioning: 14 s"]


def test_what_fails_is_told_as_failed(capfd, clock):
    with pytest.raises(KeyError), stage("loading x"):
        clock.now += 3.0
        until(announced)
        raise KeyError
    assert capfd.readouterr().err.splitlines() == ["fxpar: loading x ...", "fxpar: loading x: failed after 3.0 s"]


@pytest.mark.parametrize("how", ["argument", "environment", "another rank"])
def test_it_can_be_quiet(capfd, monkeypatch, caplog, clock, how):
    caplog.set_level(logging.WARNING, "fxpar")
    if how == "argument":
        be_quiet(True)
    else:
        monkeypatch.setenv(*{"environment": (progress.ENVIRONMENT, "1"), "another rank": ("RANK", "1")}[how])
    wait(clock)
    assert capfd.readouterr().err == ""


def test_a_program_that_logs_gets_it_there_alone(capfd, caplog, clock):
    caplog.set_level(logging.INFO, "fxpar")
    wait(clock)
    assert [r.getMessage() for r in caplog.records] == ["compiling 2 of 5 ...", "compiling 2 of 5: 3.0 s"]
    assert "fxpar:" not in capfd.readouterr().err


def test_stages_of_other_threads_are_said_once(capfd, clock):
    together = threading.Barrier(4)

    def work() -> None:
        with stage("compiling the backward"):
            together.wait()
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    together.wait()
    clock.now = 3.0
    until(lambda: any(running.said for running in progress._watcher.running))
    time.sleep(0.02)  # the watcher looks at them again
    clock.now = 0.0  # and sees none that is long when they end one after the other
    together.wait()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("compiling the backward ...") == 1


def test_a_terminal_has_a_line_that_moves(monkeypatch, clock):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stage("new shape (4, 107)"), stage("compiling the forward, 1 of 2"):
        clock.now += 3.0
        until(lambda: "new shape (4, 107) > compiling the forward, 1 of 2  3 s" in shown.getvalue())
    assert "fxpar: new shape (4, 107): 3.0 s" in shown.getvalue() and "\x1b[" in shown.getvalue()


def test_an_inspection_names_its_stages(monkeypatch):
    import fxpar

    seen: list[str] = []
    begin = progress._watcher.begin
    monkeypatch.setattr(progress._watcher, "begin", lambda text: seen.append(text) or begin(text))
    model, batch = zoo.build("mlp")
    str(fxpar.inspect(model, "dp=2", batch))
    assert seen[:3] == ["capturing the model", "partitioning", "pass simplify"]
    seen.clear()
    fxpar.suggest(model, batch, gpus=2, candidates=1)
    assert "searching plans for 2 GPUs" in seen
    seen.clear()
    fxpar.testing.assert_equivalent(model, "dp=2", batch)
    assert "running the plain model" in seen and "running 2 ranks in this process" in seen


def test_making_a_model_parallel_names_its_stages(monkeypatch):
    import fxpar

    seen: list[str] = []
    begin = progress._watcher.begin
    monkeypatch.setattr(progress._watcher, "begin", lambda text: seen.append(text) or begin(text))
    module = fxpar.parallelize(torch.nn.Linear(2, 2), "dp=1", (torch.ones(2, 2),))
    assert seen[:3] == ["waiting for all ranks", "parallelizing the model", "capturing the model"]
    assert "taking over parameters" in seen
    seen.clear()
    module.init_weights(0)
    with module.gathered(write_back=True):
        pass
    assert seen == ["initialising parameters", "gathering parameters", "writing parameters back"]


def test_a_process_stays_quiet_until_it_is_told_otherwise():
    import fxpar

    for quiet, stays in ((True, True), (None, True), (False, False)):
        fxpar.parallelize(torch.nn.Linear(2, 2), "dp=1", (torch.ones(2, 2),), quiet=quiet)
        assert progress._watcher.quiet is stays
