"""`fxpar.parallelize`: the one line."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends import eager
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.transport.base import BLOCKS, TRANSPORTS
from fxpar.backends.transport.control import Control, watch
from fxpar.backends.transport.watch import TIMEOUT
from fxpar.choose.suggest import likely_cluster, suggest_for_replicas
from fxpar.compiler import compile_replica
from fxpar.cost.clusters import cluster
from fxpar.errors import InputError, PlanError
from fxpar.model import identity
from fxpar.model import inputs as calls
from fxpar.model.inputs import Call
from fxpar.model.padding import Padding
from fxpar.plan import Plan, require_one_of
from fxpar.progress import be_quiet, stage
from fxpar.report.dump import Dumper
from fxpar.report.timings import PARAMETERS
from fxpar.run.agreement import agree_on_program, facts
from fxpar.run.compared import CHECKED_EVERY
from fxpar.run.engine import Engine
from fxpar.run.module import ParallelModule
from fxpar.run.store import ParameterStore
from fxpar.sharding.mesh import BoundMesh

BACKENDS = ("auto", "inductor", "eager")
AUTO = "auto"
"""Instead of a plan: one that is suggested."""
_MODULES = {"eager": eager, "inductor": inductor}


def parallelize(model: nn.Module, plan: Plan | str, example_inputs: Any = None, *, backend: str = "auto",
                transport: str = "auto", blocks: str = "auto", cuda_graphs: bool | str = AUTO,
                tp_comm_overlap: bool | str = AUTO, timeout: float = TIMEOUT, check_batches: int = CHECKED_EVERY,
                pad: Padding | Mapping[str, Any] | int | None = None, quiet: bool | None = None,
                dump_dir: str | Path | None = None) -> ParallelModule:
    """Return `model` running on every rank under `plan`.

    model: real or on the meta device, on all ranks alike; DTensors take the place of its parameters, wherever those are held (in
    an optimizer that was made before, too), with their hooks, attributes and gradients. plan: a `Plan` or its text ("dp=2,tp=2"),
    or "auto": the best that `fxpar.suggest` finds for these ranks and their memory, each replica being passed `example_inputs`,
    among plans that any training loop can run (without pipelines and accumulation), in the model's own dtypes; rank 0 logs the
    table (logger "fxpar", level INFO). example_inputs: what one rank will pass to forward (a dict of keyword arguments or a
    tuple), for its shapes; may be left out for Hugging Face models. backend: "inductor", "eager", or "auto" (inductor on CUDA,
    eager on CPU). transport: what moves parameters and gradients in compiled programs; "auto" (the copy engines of GPUs of one
    host that see each other's memory, where the plan stores parameters in parts, otherwise NCCL), or "nccl" (never copy engines,
    whose buffers take memory). A group that is not NCCL's (gloo on CPUs) takes its place in both. blocks: how the inductor
    backend compiles the equal blocks of a deep model: "once" (cut out of the graph, each class of equal ones is compiled once;
    buckets of parameters and gradients end with blocks), "flat" (all in one graph, and all is traced), or "auto" (once where at
    most 40 % of the operators are left to compile: from some 12 equal layers on). But for "flat", of eight and more equal blocks
    five are traced. cuda_graphs: whether forward and backward are recorded once they have run a few times, and then played back
    by the GPU, which no longer waits for its host: "auto" (where that is faster, and there is memory for it), True or False;
    what cannot be recorded runs as ever, and the report says why. Behind them clipping is recorded, too, and steps of optimizers
    with ``capturable=True``. tp_comm_overlap: whether compiled programs hide what tensor
    parallelism gathers and scatters behind the products beside it, part by part: True, False, or "auto": as the plan says; if it
    says nothing, off: it was measured faster for one shape alone. The report says whether, and why not. timeout: seconds without
    a sign of life of a rank after which those that wait for it raise an error, of all modules; ranks that compile, save or load
    give signs of life. check_batches: ranks of one replica compare the values that they were given in the first calls and in
    every so many-th (1: always, 0: never). pad: every call's sequences are made as long as the
    longest of all replicas, to the next multiple of this number (or a dict of arguments of `fxpar.pad`); what a model returns is
    as long, too. quiet: whether this process says nothing, here and later, while it captures, compiles, saves or loads for more
    than two seconds; None: as before, at first as FXPAR_QUIET of the environment says (see `fxpar.progress`). dump_dir: where the
    program after every pass is written, numbered, as readable Python (rank 0 only). Modules may be fed into each other, if their
    plans have the same replicas. Started by torchrun, it joins the process group if you have not (NCCL on GPUs, gloo on CPUs).
    Raises: `PlanError` (under "auto", also where no plan fits), `InputError`, `CaptureError`, `UnsupportedOperator`,
    `MismatchError`; on all ranks alike. What one rank alone cannot do is an `FxparError` on the others.
    """
    if quiet is not None:
        be_quiet(quiet)
    with stage("waiting for all ranks"):
        device = _join()
    with stage("parallelizing the model"), watch(timeout if _is_seconds(timeout) else None).call("parallelize"):
        control = Control()
        options = {"backend": backend, "transport": transport, "blocks": blocks, "cuda_graphs": cuda_graphs,
                   "tp_comm_overlap": tp_comm_overlap, "timeout": timeout, "check_batches": check_batches, "pad": pad}
        plan, example, dumper = control.together(lambda: _checked(model, plan, example_inputs, device, options, dump_dir))
        padding, example = _padded(model, example, pad, control)
        chosen = _chosen(backend, device)
        control.agree("parallelize", {"plan": plan, **options, "backend": chosen, **facts(model, example)})
        control = Control(plan.pp)
        compile_call = functools.partial(compile_replica, model, plan, device, dumper)
        with agree_on_program(control) as made:
            identity.check(model)
            made.append(compile_call(example, None, plan.microbatches if plan.pp > 1 else 1))
        begin = time.perf_counter()
        with stage("taking over parameters"):
            store = ParameterStore(model, BoundMesh(made[0].mesh, device.type, plan.pp), control, device)
            store.runtime.blocks = blocks
            engine = Engine(store, plan, compile_call, _MODULES[chosen], transport, check_batches, padding, cuda_graphs)
            engine.adopt(made[0], example)
        made[0].timings[PARAMETERS] = time.perf_counter() - begin
        return ParallelModule(store, engine)


def _chosen(backend: str, device: torch.device) -> str:
    """The backend, whose compilers begin to start."""
    chosen = ("inductor" if device.type == "cuda" else "eager") if backend == "auto" else backend
    if chosen == "inductor" and device.type == "cuda":
        compat.start_compilers()
    return chosen


def _padded(model: nn.Module, example: Call, pad: Any, control: Control) -> tuple[Padding | None, Call]:
    """What `pad` asks for, and the example with sequences as long as the longest of all replicas' examples."""
    if pad is None:
        return None, example
    padding = Padding.of(pad)
    lengths = control.longest("parallelize", control.together(lambda: padding.lengths(example[1])))
    return padding, control.together(lambda: calls.canonical(model, (), padding.padded(example[1], lengths)))


def _checked(model: nn.Module, given: Plan | str, example_inputs: Any, device: torch.device, options: Mapping[str, Any],
             dump_dir: str | Path | None) -> tuple[Plan, Call, Dumper | None]:
    """What can be checked of the arguments by this rank alone."""
    _check_model(model)
    plan = _best(model, calls.example_call(model, example_inputs), device) if given == AUTO else Plan.of(given)
    for name in ("cuda_graphs", "tp_comm_overlap"):
        if options[name] != AUTO and not isinstance(options[name], bool):
            raise PlanError(name, options[name], 'must be "auto", True or False', f'{name}="auto"')
    if options["tp_comm_overlap"] != AUTO:
        plan = dataclasses.replace(plan, tp_comm_overlap=options["tp_comm_overlap"])
    require_one_of("backend", options["backend"], BACKENDS)
    require_one_of("transport", options["transport"], TRANSPORTS)
    require_one_of("blocks", options["blocks"], BLOCKS)
    if not _is_seconds(options["timeout"]):
        raise PlanError("timeout", options["timeout"], "must be a positive number of seconds", f"timeout={TIMEOUT:g}")
    every = options["check_batches"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise PlanError("check_batches", every, "must be 0, or a positive integer", "check_batches=1")
    if options["pad"] is not None:
        Padding.of(options["pad"])
    plan.require_supported()
    plan.check_world(dist.get_world_size())
    example = calls.example_call(model, example_inputs)
    return plan, example, Dumper(dump_dir) if dump_dir is not None and dist.get_rank() == 0 else None


def _best(model: nn.Module, example: Call, device: torch.device) -> Plan:
    """The plan that is suggested for the ranks that there are; the same on each, as it follows from what they have in common."""
    machine = cluster(likely_cluster(device))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine.memory
    found = suggest_for_replicas(model, example, dist.get_world_size(), memory, machine)
    if dist.get_rank() == 0:
        logging.getLogger("fxpar").info("%s", found)
    return found.plan


def _is_seconds(timeout: object) -> bool:
    return isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 < timeout < float("inf")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallelize takes a torch.nn.Module, not {type(model).__name__}")
    if torch.is_inference_mode_enabled() or any(
            t.is_inference() for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)):
        raise InputError("parallelize was called, or its model was made, inside of torch.inference_mode, whose tensors cannot be "
                         "trained: make and parallelize the model outside; module.eval_step computes without gradients")
    wrapped = [m for m in model.modules() if isinstance(m, ParallelModule | nn.parallel.DistributedDataParallel
                                                        | nn.DataParallel)]
    if wrapped:
        raise PlanError("model", type(wrapped[0]).__name__, "is already wrapped", "the plain model")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise PlanError("model", type(model).__name__, "has DTensor parameters already (fxpar, FSDP2 or DTensor TP)",
                        "the plain model")


def _join() -> torch.device:
    """Join the process group that torchrun prepared (or one of a single process); this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if cuda else \
        torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, device_id=device if cuda else None)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif dist.get_backend() == "gloo":
        device = torch.device("cpu")
    return device
