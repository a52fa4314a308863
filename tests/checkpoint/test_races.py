"""Checkpoints that are killed while they are written, or replaced while they are read."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import fxpar
from fxpar.checkpoint import folder, load, source


@contextlib.contextmanager
def saver(path: Path) -> Iterator[int]:
    """A process that saves 1.0, 2.0, ... there until it is killed."""
    pid = os.fork()
    if pid == 0:
        number = 0.0
        while True:
            number += 1
            save_wide(path, number)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wide(number: float) -> nn.Module:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    for p in model.parameters():
        nn.init.constant_(p, number)
    return model


def save_wide(path: Path, number: float) -> None:
    fxpar.save_checkpoint(path, wide(number))


def values_of(path: Path) -> set[float]:
    model = wide(-1.0)
    fxpar.load_checkpoint(path, model)
    return {x for p in model.parameters() for x in p.detach().flatten().tolist()}


def check_kills(path: Path, count: int) -> None:
    save_wide(path, 0.5)
    for seed in range(count):
        rng = random.Random(seed)
        with saver(path):
            time.sleep(0.03 + 0.1 * rng.random())
        assert len(values_of(path)) == 1, seed
    save_wide(path, 0.25)
    assert values_of(path) == {0.25} and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_save_that_is_killed_leaves_a_whole_checkpoint(tmp_path):
    check_kills(tmp_path / "c", 4)


@pytest.mark.slow
def test_many_saves_that_are_killed(tmp_path):
    check_kills(tmp_path / "c", 80)


@pytest.mark.slow
def test_a_load_during_saves_gets_one_checkpoint_whole(tmp_path):
    path = tmp_path / "c"
    save_wide(path, 0.5)
    with saver(path):
        end, seen = time.monotonic() + 1.5, set()
        while time.monotonic() < end:
            found = values_of(path)
            assert len(found) == 1
            seen |= found
    assert len(seen) > 3


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """With no file held open, so that the first attempt finds its files gone: the second reads the new one."""
    save_wide(tmp_path / "c", 1.0)
    monkeypatch.setattr(source, "HELD", 0)
    real, left = load._Load._read, [1]

    def read(self):
        if left:
            left.pop()
            save_wide(tmp_path / "c", 2.0)
        real(self)

    monkeypatch.setattr(load._Load, "_read", read)
    assert values_of(tmp_path / "c") == {2.0}


def test_what_a_save_puts_in_place_meanwhile_is_found(tmp_path, monkeypatch):
    """The second of its renames comes right after it was seen that nothing is there."""
    path = tmp_path / "c"
    for number, name in ((1.0, folder.previous(path)), (2.0, folder.saving(path))):
        save_wide(path, number)
        path.rename(name)
    real = Path.exists

    def exists(self: Path) -> bool:
        there = real(self)
        if self == path and not there:
            folder.saving(path).rename(path)
        return there

    monkeypatch.setattr(Path, "exists", exists)
    assert folder.newest(path) == path


def test_a_folder_with_the_number_of_one_that_is_gone_is_another(tmp_path):
    known = os.stat(tmp_path)
    later = os.stat_result([*known[:8], known.st_mtime + 1, *known[9:]])
    assert later.st_ino == known.st_ino and source.identity_of(later) != source.identity_of(known)
