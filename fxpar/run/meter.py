"""meter: what a training run reaches: seconds a step, throughput, FLOP/s, MFU and memory."""

from __future__ import annotations

import time
from collections import deque

import torch

from fxpar.cost.clusters import Cluster, cluster, cluster_of
from fxpar.errors import InputError
from fxpar.progress import stage
from fxpar.report.step import StepReport
from fxpar.run.module import ParallelModule


class Meter:
    """Measures the steps of a training loop, on each rank by itself; nothing is communicated.

    ::

        meter = fxpar.Meter(module)
        for i, batch in enumerate(loader):
            loss = module.train_step(**batch); opt.step(); opt.zero_grad()
            for name, value in meter.step(tokens=batch["input_ids"].numel()).items():
                writer.add_scalar(name, value, i)            # torch.utils.tensorboard.SummaryWriter

    module: what is trained. cluster: the name of a cluster, a file or a `Cluster`, whose device's peak MFU is told against; None:
    the one that has this GPU; where there is none (and on CPUs), MFU is left out. window: of how many of the last steps the
    seconds are the mean; kernels of a GPU run behind the program, which this evens out.
    Raises: `PlanError` for a cluster that there is not; `InputError` for a window below 1.
    """

    def __init__(self, module: ParallelModule, cluster: Cluster | str | None = None, window: int = 10):
        if window < 1:
            raise InputError(f"window={window}: a meter needs at least one step")
        self.module, self.on = module, _cluster(cluster, module.device)
        self._ends: deque[float] = deque([time.perf_counter()], maxlen=window + 1)
        self._tokens: deque[int] = deque(maxlen=window)
        self._known: tuple[object, StepReport] | None = None

    def step(self, tokens: int | None = None) -> dict[str, float]:
        """Call at the end of every step; what the last steps (at most `window`) reached. The first step has what compiled in it.

        tokens: of this replica's batch (or images, or whatever is counted); all replicas are taken to have as many.
        Returns: "seconds" of a step; with `tokens` "tokens_per_second" of all ranks and "tokens_per_second_per_rank";
        "tflops_per_rank", operations of the model itself in a second, in units of 10^12 (what is computed again counts nothing);
        "mfu", the part of the device's peak that this is, from 0 to 1; on GPUs "memory_gib" and "peak_memory_gib", what this
        rank's tensors take now, and took at most. Raises: `InputError` before the module's first call.
        """
        self._ends.append(time.perf_counter())
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        out, ranks = {"seconds": seconds}, self.module.plan.world_size
        if tokens is not None:
            self._tokens.append(tokens * self.module.replica.count)
            out["tokens_per_second"] = sum(self._tokens) / len(self._tokens) / seconds
            out["tokens_per_second_per_rank"] = out["tokens_per_second"] / ranks
        made = self._step_report()
        flops = made.flops() / seconds / ranks
        out["tflops_per_rank"] = flops / 1e12
        if self.on is not None:
            out["mfu"] = flops / self.on.peak(made.dtype())
        if self.module.device.type == "cuda":
            out["memory_gib"] = torch.cuda.memory_allocated(self.module.device) / 2**30
            out["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.module.device) / 2**30
        return out

    def reset(self) -> None:
        """Begin anew: for the first step behind an evaluation or a save."""
        self._ends.clear()
        self._ends.append(time.perf_counter())
        self._tokens.clear()

    def _step_report(self) -> StepReport:
        program = self.module.newest_program()
        if self._known is None or self._known[0] is not program:
            with stage("counting operations"):
                self._known = program, self.module.report().step
        return self._known[1]


def _cluster(given: Cluster | str | None, device: torch.device) -> Cluster | None:
    """The cluster that is given, or one whose devices are such as this."""
    if given is not None:
        return cluster(given) if isinstance(given, str) else given
    if device.type != "cuda":
        return None
    return cluster_of(torch.cuda.get_device_name(device))
