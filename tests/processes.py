"""Real ranks for tests: processes that talk over gloo, with a deadline, so that a hang is a failure."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server process imports these once; every rank is a fork of it and starts at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.export", "torch._dynamo", "fxpar", "tests.zoo", "tests.processes",
                                 "tests.warm"])

GRACE = 5.0
"""Seconds that the other ranks have to finish, too, once one has failed."""


def launch(world: int, body: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What ``body(rank, *args)`` returns on each of `world` ranks, in order.

    body: a function that a fresh process can import. The process group is there when it starts.
    Raises: AssertionError with the traceback of the first rank that failed; of all that did not finish in `timeout`.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world):
            pipe, far = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(rank, world, folder, far, timeout, dict(os.environ), body, args),
                                       daemon=True)
            process.start()
            far.close()
            processes.append(process)
            pipes.append(pipe)
        try:
            results, failed = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
        if failed:
            raise AssertionError(f"rank {min(failed)} of {world} failed:\n{failed[min(failed)]}")
        hung = [r for r in range(world) if r not in results]
        if hung:
            where = "\n".join(f"rank {r}:\n{(Path(folder) / f'stack{r}').read_text()}" for r in hung)
            raise AssertionError(f"ranks {hung} of {world} did not finish in {timeout:g} s\n{where}")
        return [results[r] for r in range(world)]


def _collect(pipes: list[Connection], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and error texts by rank, of those that arrive in time."""
    results: dict[int, Any] = {}
    failed: dict[int, str] = {}
    open_ = dict(enumerate(pipes))
    while open_ and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(open_.values()), left)
        for rank in [r for r, p in open_.items() if p in ready]:
            try:
                ok, value = torch.load(io.BytesIO(open_.pop(rank).recv_bytes()), weights_only=False)
            except EOFError:
                ok, value = False, "the process died without a word"
            (results if ok else failed)[rank] = value
            if not ok:
                deadline = min(deadline, time.monotonic() + GRACE)
    return results, failed


def _rank(rank: int, world: int, folder: str, pipe: Connection, timeout: float, environment: dict[str, str], body: Callable,
          args: tuple) -> None:
    """One rank's whole life. environment: as it is now where the rank was started; the server began with that of another test."""
    os.environ.clear()
    os.environ.update(environment)
    with open(os.path.join(folder, f"stack{rank}"), "w") as stack:
        faulthandler.dump_traceback_later(max(timeout - 2, 1), file=stack)
        torch.set_num_threads(1)
        try:
            store = dist.FileStore(os.path.join(folder, "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            answer = (True, body(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        pipe.send_bytes(buffer.getvalue())
        pipe.close()
        if answer[0]:
            with contextlib.suppress(RuntimeError):  # the group may have been cut
                dist.barrier()  # a peer may still be reading from this rank
        os._exit(0)  # an orderly end would wait for peers that may have failed
