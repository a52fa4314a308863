"""`CheckpointManager`: numbered checkpoints of a whole run, of which the last few are kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fxpar.checkpoint import folder
from fxpar.checkpoint.load import load_checkpoint
from fxpar.checkpoint.ranks import LocalModel, alike, place, together
from fxpar.checkpoint.save import SaveHandle, finish_running, save_checkpoint
from fxpar.errors import CheckpointError
from fxpar.run.module import ParallelModule

STATE, RUN, FORMAT = "state", "run.json", 1
"""In a step's folder: the checkpoint of model and optimizer, whose presence says that the step is whole; and the sums of the
files beside it, ``common.pt`` (by rank 0) and ``rank-N.pt``."""
_STEP = re.compile(r"step-(\d{8,})(\.again)?")
_FILE = re.compile(r"common\.pt|rank-\d+\.pt|run\.json")
_GOING, _AGAIN = ".removing", ".again"

_log = logging.getLogger("fxpar")


@dataclass
class Restored:
    """step: of the checkpoint that was loaded; 0 if there was none. extra: what `save` was given besides."""

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """Saves everything that a run goes on from, in ``path/step-00000100`` and so on, and restores the newest.

    path: a folder that all ranks share. module, optimizer: as for `save_checkpoint`. scheduler, loader, others by keyword:
    anything with `state_dict` and `load_state_dict`. A scheduler's state, and others', is that of rank 0; a loader's (torchdata's
    `StatefulDataLoader`, or an iterator of your own) is each replica's, and random generators' (of Python, NumPy and PyTorch,
    on the CPU and this rank's GPU) each rank's. keep: how many of the newest steps stay.

    A step that was not saved to its end, because the process was killed, is no step: `restore` takes the one before, and the next
    save removes it. A step that is saved again is written beside the old one, as ``step-00000100.again``, and takes its place
    once it is whole (an asynchronous one in the next save): at every moment one of the two is there. Model and optimizer load
    under any plan. A loader's state needs as many replicas as there were; generators' are restored where there are as many ranks,
    and otherwise begin anew from rank 0's, which is logged.
    All ranks make the same calls.
    """

    def __init__(self, path: str | os.PathLike, module: nn.Module, optimizer: Optimizer | None = None, *, scheduler: Any = None,
                 loader: Any = None, keep: int = 3, **others: Any):
        self.module, self.optimizer, self.loader, self.keep = module, optimizer, loader, keep
        self.common = {**({"scheduler": scheduler} if scheduler is not None else {}), **others}
        with together("CheckpointManager", module, {"path": place(path), "keep": keep, "names": self._names()}):
            self._check()
            ranks = LocalModel(module).ranks
            self.path = alike(ranks, path, lambda: folder.resolved(path))

    def _check(self) -> None:
        """Raises: `ValueError`, `TypeError` for arguments that are none."""
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"CheckpointManager(keep={self.keep!r}): keep is how many steps stay, at least 1")
        loader = self.loader
        for name, thing in {**self.common, **({"loader": loader} if loader is not None else {})}.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                hint = ": torchdata's StatefulDataLoader has" if name == "loader" else ""
                raise TypeError(f"CheckpointManager({name}=...) takes what has state_dict() and load_state_dict(), and "
                                f"{type(thing).__name__} has not{hint}")
        if loader is not None and getattr(loader, "generator", loader) is None:
            raise ValueError("CheckpointManager(loader=...): this loader draws from PyTorch's generator whenever an iteration "
                             "begins, in a resumed run once more, which would then draw other numbers in its steps: make the "
                             "loader with generator=torch.Generator()")

    # ---- which there are ----

    def folder_of(self, step: int) -> Path:
        """The folder of the checkpoint of a step, whether there is one or not."""
        usual = self.path / f"step-{step:08d}"
        again = _again(usual)
        return again if _is_whole(again) else usual

    def steps(self) -> list[int]:
        """The steps that are whole, oldest first, as this rank sees the folder."""
        return sorted({number for _, number, whole in self._found() if whole})

    def _found(self) -> list[tuple[Path, int, bool]]:
        """The folders of steps, their numbers, and whether they are whole."""
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [(p, int(m[1]), _is_whole(p)) for p in there if (m := _STEP.fullmatch(p.name)) and p.is_dir()]

    # ---- saving ----

    def save(self, step: int, *, asynchronous: bool = False, **extra: Any) -> SaveHandle | None:
        """Write everything as step `step`; steps older than the newest `keep` are removed, this one counted.

        extra: numbers, text, lists, dicts and tensors, which `restore` returns (an epoch, the best loss), of rank 0.
        asynchronous: as of `save_checkpoint`; older steps are then removed by the next save. The same step again
        replaces it once the new one is whole.
        Raises: `CheckpointError`, on all ranks alike; for a state that cannot be read back without running code from the file,
        and if there are newer steps, too.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"CheckpointManager.save({step!r}): a step is a number from 0")
        usual = self.path / f"step-{step:08d}"
        with together("CheckpointManager.save", self.module, {"path": place(usual), "asynchronous": asynchronous}):
            ranks = LocalModel(self.module).ranks
            finish_running()
            where = ranks.exchange(alike(ranks, usual, lambda: self._make_room(usual, step) if ranks.rank == 0 else usual))[0]
            sums = ranks.exchange(alike(ranks, where, lambda: self._write_files(where, ranks.rank, extra)))
            said = {"format": FORMAT, "step": step, "replicas": ranks.exchange(self._replica()), "names": self._names(),
                    "sums": {name: made for of_rank in sums for name, made in of_rank.items()}}
            alike(ranks, where, lambda: _write(where / RUN, json.dumps(said, indent=1).encode()) if ranks.rank == 0 else None)
        handle = save_checkpoint(where / STATE, self.module, self.optimizer, asynchronous=asynchronous)
        if handle is None:
            alike(ranks, where, lambda: self._remove_old() if ranks.rank == 0 else None)
        return handle

    def _write_files(self, where: Path, rank: int, extra: dict[str, Any]) -> dict[str, str]:
        """Write this rank's files. Returns their checksums."""
        states: dict[str, Any] = {f"rank-{rank}.pt": {
            "random": _random_state(), "loader": None if self.loader is None else self.loader.state_dict()}}
        if rank == 0:
            states["common.pt"] = {"states": {name: thing.state_dict() for name, thing in self.common.items()}, "extra": extra}
        sums = {}
        for name, state in states.items():
            content = io.BytesIO()
            torch.save(state, content)
            try:
                torch.load(io.BytesIO(content.getvalue()), weights_only=True)
            except Exception as error:
                raise CheckpointError(f"a state in it cannot be read back without running code ({error})", str(where / name),
                                      "have state_dict() return numbers, text, lists, dicts and tensors") from error
            sums[name] = _write(where / name, content.getvalue())
        return sums

    def _replica(self) -> int:
        return int(self.module.replica) if isinstance(self.module, ParallelModule) else 0

    def _names(self) -> list[str]:
        """What has a state of its own, beside model, optimizer and random generators."""
        return sorted([*self.common, *(["loader"] if self.loader is not None else [])])

    def _make_room(self, usual: Path, step: int) -> Path:
        """Remove what a save that was killed has left, and what is too old; make this step's folder, and return it."""
        self._put_in_place()
        found = self._found()
        newer = max((number for _, number, whole in found if whole), default=step)
        if newer > step:
            raise CheckpointError(f"step {newer} is there, which restore() would take for newer than step {step}", str(self.path),
                                  "move the steps of the other run away, or save to another folder")
        for place_of, _, whole in found:
            if not whole:
                _remove(place_of)
        self._remove_old()
        where = _again(usual) if usual.exists() else usual
        where.mkdir(parents=True)
        return where

    def _put_in_place(self) -> None:
        """Have what was saved again, and is whole, take the place of what was there: until then the new one is the step's."""
        for again, number, whole in self._found():
            usual = self.path / f"step-{number:08d}"
            if whole and again != usual:
                if usual.exists():
                    _remove(usual)
                os.rename(again, usual)

    def _remove_old(self) -> None:
        self._put_in_place()
        for number in self.steps()[: -self.keep]:
            _remove(self.folder_of(number))
        for left in self.path.glob(f"step-*{_GOING}") if self.path.is_dir() else ():
            _empty(left)

    # ---- restoring ----

    def restore(self, step: int | None = None) -> Restored:
        """Load the newest whole step, or the given one. Returns its number, 0 if there is none, and what else was saved.

        Raises: `CheckpointError`, on all ranks alike and before anything is changed, if a file is missing or damaged, or this run
        has another number of replicas, or other things by name, than the one that saved.
        """
        with together("CheckpointManager.restore", self.module, {"path": place(self.path), "step": step}):
            ranks = LocalModel(self.module).ranks
            finish_running()
            newest = ranks.exchange(alike(ranks, self.path, self.steps))[0]
            if step is None and not newest:
                return Restored()
            chosen = newest[-1] if step is None else step
            where = self.folder_of(chosen)
            replicas = ranks.exchange(self._replica())
            generators, loader, common = alike(ranks, where, lambda: self._read_files(where, ranks.rank, replicas))
        load_checkpoint(where / STATE, self.module, self.optimizer)
        for name, state in common["states"].items():
            self.common[name].load_state_dict(state)
        if self.loader is not None:
            self.loader.load_state_dict(loader)
        _set_random_state(generators)
        return Restored(chosen, common["extra"])

    def _read_files(self, where: Path, rank: int, replicas: list[int]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """The states of this rank's generators and loader, and what is common to ranks. replicas: of each rank, now."""
        said = _said(where)
        if self._names() != said["names"]:
            raise CheckpointError(f"it has states of {said['names'] or 'nothing'}, and this manager of "
                                  f"{self._names() or 'nothing'}", str(where), "give the manager what it had")
        before, of_rank = said["replicas"], rank
        if len(before) != len(replicas):
            of_rank = 0
            if rank == 0:
                _log.warning("checkpoint %s was saved by %d ranks, and there are %d: the random generators of all of them begin "
                             "with the states of rank 0", where, len(before), len(replicas))
        loader = None
        if self.loader is not None:
            if max(before) != max(replicas):
                raise CheckpointError(f"{max(before) + 1} replicas saved the states of their loaders, and there are "
                                      f"{max(replicas) + 1}", str(where), "restore under a plan with as many replicas (dp)")
            loader = _read(where / f"rank-{before.index(replicas[rank])}.pt", said)["loader"]
        return _read(where / f"rank-{of_rank}.pt", said)["random"], loader, _read(where / "common.pt", said)


def _again(usual: Path) -> Path:
    return usual.with_name(usual.name + _AGAIN)


def _is_whole(step: Path) -> bool:
    return folder.newest(step / STATE) is not None


def _said(where: Path) -> dict[str, Any]:
    """What a step's folder says of itself."""
    if not _is_whole(where):
        raise CheckpointError("there is no such step, or it was not saved to its end", str(where),
                              "CheckpointManager.steps() has those that are whole")
    try:
        said = json.loads((where / RUN).read_bytes())
        if said["format"] != FORMAT or not said["replicas"] or not isinstance(said["sums"], dict):
            raise ValueError("it is of another format")
        return {"names": list(said["names"]), "replicas": [int(r) for r in said["replicas"]], "sums": said["sums"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"it is damaged ({type(error).__name__}: {error})", str(where / RUN),
                              "restore another step") from error


def _read(file: Path, said: dict[str, Any]) -> dict[str, Any]:
    """What was saved to a file. Nothing in it is run."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})", str(file), "restore another step") from error
    if _sum(content) != said["sums"].get(file.name):
        raise CheckpointError("it is damaged: it is not what was written, by its checksum", str(file), "restore another step")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _write(file: Path, content: bytes) -> str:
    """Write a file, to the disk; its checksum."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return _sum(content)


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _remove(step: Path) -> None:
    """Remove a step as a whole: from the first moment on it is none. Raises: `CheckpointError` if it holds anything else."""
    going = step.with_name(step.name + _GOING)
    if going.exists():
        _empty(going)
    os.rename(step, going)
    _empty(going)


def _empty(going: Path) -> None:
    folder.remove(going / STATE)
    for file in going.iterdir():
        if not _FILE.fullmatch(file.name):
            raise CheckpointError("an old step holds what no save wrote, and is not removed", str(file), "move it")
        file.unlink()
    going.rmdir()


def _random_state() -> dict[str, Any]:
    """The states of this process's random generators."""
    numbers: Any = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numbers = state["numpy"]
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": np.array(numbers["state"]["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
