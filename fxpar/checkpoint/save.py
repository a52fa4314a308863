"""`save_checkpoint`: a model and its optimizer, written by every rank, as one folder that any plan can load."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import Optimizer

from fxpar.backends.transport.control import Control
from fxpar.checkpoint import folder
from fxpar.checkpoint.manifest import Writer
from fxpar.checkpoint.optimizer import merged, require_plain, saved_state
from fxpar.checkpoint.part import Part
from fxpar.checkpoint.planners import Contents, Key, SavePlanner, contents, joined
from fxpar.checkpoint.ranks import LocalModel, RankControl, alike, place, require_alike, same, together
from fxpar.errors import CheckpointError
from fxpar.progress import stage
from fxpar.run.module import ParallelModule

SUMMARY: Key = ("fxpar",)
"""The one entry that is no tensor."""

_log = logging.getLogger("fxpar")


class SaveHandle:
    """A checkpoint that is being written in the background. The process does not end before it is written."""

    def __init__(self, write: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="fxpar save", daemon=False)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error
            _log.exception("a checkpoint could not be written in the background")

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return once the checkpoint is in its place. Raises what the save raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """`wait`, for who only needs it to have ended."""
        self._thread.join()


_running: list[SaveHandle] = []


def finish_running() -> None:
    """Wait for the save of this process that is still in the background."""
    while _running:
        _running.pop().join()


def save_checkpoint(path: str | os.PathLike, module: nn.Module, optimizer: Optimizer | None = None, *,
                    asynchronous: bool = False) -> SaveHandle | None:
    """Write the model's parameters and persistent buffers, the optimizer's state and options, and what dropout draws from.

    path: a folder on a file system that all ranks share; an earlier checkpoint there is replaced once the new one is
    whole, and is still there if the save is interrupted. A folder with anything that fxpar did not write is refused, and so
    is the one that the process runs in. module: a `ParallelModule` (every rank calls), or a plain module (one process calls).
    What is written does not depend on the plan: any other plan, or a plain module, can load it. It is a folder of
    `torch.distributed.checkpoint`, with names such as "model.head.weight" and "optimizer.head.weight.exp_avg", and has a list of
    its files with checksums. Gradients, learning rate schedulers and data loaders are not in it.

    asynchronous: return once the state is copied to the CPU; training may go on. The handle's `wait()` raises what went
    wrong. The next save, or load, waits for it first; wait for it before destroying the process group.
    Raises: `CheckpointError`, on all ranks alike.
    """
    given = {"path": place(path), "asynchronous": asynchronous, "optimizer": optimizer and type(optimizer).__name__}
    with stage(f"saving {path}"), together("save_checkpoint", module, given):
        return _save(path, LocalModel(module), optimizer, asynchronous)


def _save(path: str | os.PathLike, model: LocalModel, optimizer: Optimizer | None, asynchronous: bool) -> SaveHandle | None:
    with model.ranks.watch.busy("waiting for the save before"):
        finish_running()
    target = alike(model.ranks, path, lambda: folder.resolved(path))
    require_alike(model, target)

    def collect() -> tuple[dict[Key, Part], dict[str, Any]]:
        model.require_real(target)
        return _collect(model, optimizer, target)

    parts, summary = alike(model.ranks, target, collect)
    same(model.ranks, target, "what they save", {
        joined(key): (tuple(part.shape), part.local.dtype, part.sharding) for key, part in parts.items()})
    if optimizer is not None:
        summary["optimizer"] = merged(model.ranks.exchange(summary["optimizer"]))
    rank = model.ranks.rank
    made = contents({k: p for k, p in parts.items() if model.counts(k[1])}, {SUMMARY: summary}, coordinator=rank == 0)
    alike(model.ranks, target, lambda: folder.prepare(target) if rank == 0 else None)
    if not asynchronous:
        _write(made, target, model.ranks, rank)
        return None
    ranks = _side_channel(dist.group.WORLD) if model.ranks.world > 1 else model.ranks
    staged = alike(model.ranks, target, made.staged)
    handle = SaveHandle(lambda: _write(staged, target, ranks, rank))
    _running.append(handle)
    return handle


def _collect(model: LocalModel, optimizer: Optimizer | None, target: Path) -> tuple[dict[Key, Part], dict[str, Any]]:
    parts: dict[Key, Part] = {("model", name): part for name, part in model.parts().items()}
    summary: dict[str, Any] = {"format": 1, "dropout": None, "optimizer": None}
    if isinstance(model.module, ParallelModule):
        seeds = model.module.dropout_seeds
        summary["dropout"] = {"seed": seeds.base, "steps": seeds.calls}
    if optimizer is not None:
        states, summary["optimizer"] = saved_state(optimizer, model, target)
        parts |= states
        require_plain(summary, target)
    return parts, summary


@functools.lru_cache(maxsize=1)
def _side_channel(world: dist.ProcessGroup) -> Control:
    """A channel for background threads alone, over all ranks: the main thread goes on using its own."""
    return Control(apart=True)


def _write(made: Contents, target: Path, ranks: RankControl, rank: int) -> None:
    """Write this rank's share beside `target`; when every rank has, rank 0 puts the folder in its place."""
    writer = Writer(folder.saving(target))
    planner = SavePlanner(made)
    if ranks.group is None:
        alike(ranks, target, lambda: _write_alone(planner, writer))
    else:
        try:
            with ranks.watch.busy(f"writing {target}", together=True):
                dcp.save({}, storage_writer=writer, planner=planner, process_group=ranks.group)
        except dcp.CheckpointException as error:
            failed = min(error.failures)
            raise CheckpointError(f"rank {failed} could not write its part: {error.failures[failed][0]!r}",
                                  str(folder.saving(target))) from error
    alike(ranks, target, lambda: folder.commit(target) if rank == 0 else None)


def _write_alone(planner: SavePlanner, writer: Writer) -> None:
    """`torch.distributed.checkpoint.save` for one process, without its warning that there is only one."""
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner)
    writer.finish(metadata, [written.wait()])
