"""The folder of a checkpoint: damaged, of another model, interrupted, written in the background."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fxpar
from fxpar.checkpoint import folder, save
from fxpar.checkpoint.manifest import MARKER
from fxpar.errors import CheckpointError
from tests.checkpoint.test_checkpoint import OPTIMIZERS, Small, build, data_file, steps, trained, truncate

# ---- what can be wrong with a folder ----


def saved(path: Path, optimizer: bool = True) -> Path:
    model, batch = build("small")
    made = OPTIMIZERS["adamw"](trained(model))
    steps(model, made, batch, 1)
    fxpar.save_checkpoint(path, model, made if optimizer else None)
    return path


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (shutil.rmtree, "there is no checkpoint"),
    "truncated": (truncate, "this data file is truncated: it has"),
    "data missing": (lambda p: data_file(p).unlink(), "this data file is missing"),
    "metadata cut": (lambda p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:40]), "it is damaged"),
    "other metadata": (lambda p: ((p / ".metadata").write_bytes(pickle.dumps([1])), (p / ".fxpar.json").unlink()),
                       r"it is damaged \(.*list"),
    "metadata of another": (lambda p: (p / ".metadata").write_bytes(pickle.dumps([1])), "not what was written, by its checksum"),
    "metadata missing": (lambda p: (p / ".metadata").unlink(), "there is no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_leaves_the_model_alone(damage, tmp_path):
    path = saved(tmp_path / "c")
    change, message = DAMAGE[damage]
    change(path)
    model, _ = build("small", seed=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        fxpar.load_checkpoint(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_model_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "c", optimizer=False)
    with pytest.raises(CheckpointError, match=r"up.weight has shape \(8, 6\) there and \(16, 6\) in the model"):
        fxpar.load_checkpoint(path, Small(16))
    other = Small()
    other.more, other.scale = nn.Linear(2, 2), None
    with pytest.raises(CheckpointError, match=r"it lacks tensors of the model: more.weight, more.bias; "
                                              r"it has tensors that the model lacks: scale"):
        fxpar.load_checkpoint(path, other)
    model = Small()
    with pytest.raises(CheckpointError, match="saved without an optimizer"):
        fxpar.load_checkpoint(path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"torch.nn.Module, not str"):
        fxpar.save_checkpoint(path, "model")


def test_errors_can_be_pickled():
    error = CheckpointError("it is damaged", "/c", "load another")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "checkpoint /c: it is damaged; load another"


# ---- interrupted saves ----


@contextlib.contextmanager
def crash(monkeypatch: pytest.MonkeyPatch, at: str) -> Iterator[None]:
    """As if the process died while it writes, when all is written, or between the renames."""
    count, real = itertools.count(), folder._rename

    def rename(source, target):
        if next(count) == {"before": 0, "between": 1}[at]:
            raise OSError("crash")
        real(source, target)

    with monkeypatch.context() as patch:
        if at == "writing":
            patch.setattr(dcp.FileSystemWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError("crash")))
        else:
            patch.setattr(folder, "_rename", rename)
        with pytest.raises(CheckpointError, match="crash"):
            yield


def value(path: Path) -> float:
    model = nn.Linear(1, 1)
    fxpar.load_checkpoint(path, model)
    return model.weight.item()


def save_value(path: Path, number: float) -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, number)
    fxpar.save_checkpoint(path, model)


def test_an_interrupted_folder_is_never_taken_for_a_whole_one(tmp_path):
    save_value(tmp_path / "c", 1.0)
    (tmp_path / "c" / MARKER).touch()
    assert folder.newest(tmp_path / "c") is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        value(tmp_path / "c")


@pytest.mark.parametrize(("at", "found"), [("writing", 1.0), ("before", 1.0), ("between", 2.0)])
def test_an_interrupted_save_leaves_a_checkpoint(at, found, tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_value(path, 1.0)
    with crash(monkeypatch, at):
        save_value(path, 2.0)
    assert value(path) == found
    with crash(monkeypatch, "writing"):
        save_value(path, 3.0)  # it repairs what the first left, before it fails itself
    assert value(path) == found
    save_value(path, 4.0)
    assert value(path) == 4.0
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_previous_one_is_found_if_the_new_one_is_not_whole(tmp_path):
    path = tmp_path / "c"
    save_value(path, 1.0)
    os.rename(path, folder.previous(path))
    folder.saving(path).mkdir()
    assert value(path) == 1.0
    save_value(path, 2.0)
    assert value(path) == 2.0 and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_first_save_that_was_interrupted_is_said(tmp_path, monkeypatch):
    with crash(monkeypatch, "writing"):
        save_value(tmp_path / "c", 1.0)
    with pytest.raises(CheckpointError, match="there is no checkpoint, only a save that was interrupted"):
        value(tmp_path / "c")


def test_nothing_but_a_checkpoint_is_replaced(tmp_path):
    save_value(tmp_path / "c", 1.0)
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files that fxpar did not write: notes.txt"):
        save_value(tmp_path / "c", 2.0)
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine" and value(tmp_path / "c") == 1.0
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        save_value(tmp_path / "file", 1.0)


def test_a_link_stays_a_link(tmp_path):
    save_value(tmp_path / "real", 1.0)
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    save_value(tmp_path / "latest", 2.0)
    assert (tmp_path / "latest").is_symlink() and value(tmp_path / "real") == value(tmp_path / "latest") == 2.0


# ---- in the background ----


def test_the_snapshot_is_that_of_the_call(tmp_path, monkeypatch):
    model, batch = build("small")
    optimizer = OPTIMIZERS["adamw"](trained(model))
    steps(model, optimizer, batch, 1)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer.state[model.scale]["exp_avg"].clone()
    handle = fxpar.save_checkpoint(tmp_path / "c", model, optimizer, asynchronous=True)
    with torch.no_grad():
        for t in [*model.state_dict().values(), optimizer.state[model.scale]["exp_avg"]]:
            t.zero_()
    handle.wait()
    assert handle.done()
    fxpar.load_checkpoint(tmp_path / "c", model, optimizer)
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
    assert torch.equal(optimizer.state[model.scale]["exp_avg"], moments)


def test_a_background_failure_is_raised_by_wait_and_logged(tmp_path, monkeypatch, caplog):
    model, _ = build("small")
    with crash(monkeypatch, "writing"):
        fxpar.save_checkpoint(tmp_path / "c", model, asynchronous=True).wait()
    assert "could not be written in the background" in caplog.text
    fxpar.save_checkpoint(tmp_path / "c", model)  # the next one works


def test_the_next_save_waits_for_the_first(tmp_path, monkeypatch):
    order: list[str] = []
    real = save._write

    def write(made, target, *rest):
        order.append(f"start {target.name}")
        real(made, target, *rest)
        order.append(f"end {target.name}")

    monkeypatch.setattr(save, "_write", write)
    model, _ = build("small")
    fxpar.save_checkpoint(tmp_path / "a", model, asynchronous=True)
    fxpar.save_checkpoint(tmp_path / "b", model, asynchronous=True)
    fxpar.load_checkpoint(tmp_path / "b", model)
    assert order == ["start a", "end a", "start b", "end b"]


def test_the_process_does_not_end_before_it_is_written(tmp_path):
    code = f"""
import time, torch, fxpar
from fxpar.checkpoint import folder
real = folder.commit
folder.commit = lambda path: (time.sleep(0.5), real(path))
fxpar.save_checkpoint({str(tmp_path / "c")!r}, torch.nn.Linear(1, 1), asynchronous=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fxpar.__file__).parents[1], timeout=60)
    assert abs(value(tmp_path / "c")) <= 1
