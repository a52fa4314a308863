"""Long work says what it is: on the logger, on standard error, or not at all."""

from __future__ import annotations

import io
import logging
import threading
import time

import pytest

from fxpar import progress
from fxpar.progress import be_quiet, stage
from tests import zoo


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.03)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(progress.log, "level", logging.WARNING)
    yield
    be_quiet(None)


def wait(text: str = "compiling 2 of 5") -> None:
    with stage(text):
        time.sleep(0.15)


def test_a_long_stage_is_announced_and_told_with_its_seconds(capfd):
    wait()
    with stage("a short one"):
        pass
    assert capfd.readouterr().err.splitlines() == ["fxpar: compiling 2 of 5 ...", "fxpar: compiling 2 of 5: 0.2 s"]


def test_stages_lie_within_each_other_and_short_ones_say_nothing(capfd):
    with stage("partitioning"):
        for name in ("infer", "place", "partition", "zero", "ep", "axes"):
            with stage(f"pass {name}"):
                time.sleep(0.02)
        wait("pass that is long")
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "fxpar: partitioning ..." and said[-1].startswith("fxpar: partitioning: 0.")
    assert [line for line in said if "pass" in line] == ["fxpar: pass that is long ...", "fxpar: pass that is long: 0.2 s"]


def test_what_fails_is_told_as_failed(capfd):
    with pytest.raises(KeyError), stage("loading x"):
        time.sleep(0.1)
        raise KeyError
    assert "fxpar: loading x: failed after 0.1 s" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["argument", "environment", "another rank"])
def test_it_can_be_quiet(capfd, monkeypatch, caplog, how):
    caplog.set_level(logging.WARNING, "fxpar")
    if how == "argument":
        be_quiet(True)
    else:
        monkeypatch.setenv(*{"environment": (progress.ENVIRONMENT, "1"), "another rank": ("RANK", "1")}[how])
    wait()
    assert capfd.readouterr().err == ""


def test_a_program_that_logs_gets_it_there_alone(capfd, caplog):
    caplog.set_level(logging.INFO, "fxpar")
    wait()
    assert [r.getMessage() for r in caplog.records] == ["compiling 2 of 5 ...", "compiling 2 of 5: 0.2 s"]
    assert "fxpar:" not in capfd.readouterr().err


def test_stages_of_other_threads_are_said_once(capfd):
    threads = [threading.Thread(target=wait, args=("compiling the backward",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("compiling the backward ...") == 1


def test_a_terminal_has_a_line_that_moves(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stage("new shape (4, 107)"):
        wait("compiling the forward, 1 of 2")
    text = shown.getvalue()
    assert "new shape (4, 107) > compiling the forward, 1 of 2  0 s" in text
    assert "fxpar: new shape (4, 107): 0.2 s" in text and text.index("\x1b[") >= 0


def test_an_inspection_names_its_stages(monkeypatch):
    import fxpar

    seen: list[str] = []
    begin = progress._watcher.begin
    monkeypatch.setattr(progress._watcher, "begin", lambda text: seen.append(text) or begin(text))
    model, batch = zoo.build("mlp")
    str(fxpar.inspect(model, "dp=2", batch))
    assert seen[:3] == ["capturing the model", "partitioning", "pass simplify"]
