"""What test_gpu.py starts on every GPU: one training step of many models under one plan, compared with one GPU.

    torchrun --nproc-per-node=2 tests/gpu_program.py dp=2,zero=3 '[["llama_padded", "selective", "", 1]]'

A case is [model of the zoo, recompute, more of the plan ("param_dtype=bf16"), microbatches]. All share one process group, one
after the other. Each is compiled by Inductor and speaks over NCCL: loss, gradients, their clipped norm, one step of AdamW, the
parameters after it as full tensors, a checkpoint saved and loaded. Before that the same step is made again until forward and
backward are recorded as CUDA graphs and played back, or it is known why not. What the stages of a pipeline hold is put together
first. Rank 0 prints a line of JSON per case: {"model", "plan", "error" (empty if all is right), "seconds", "graphs": see
`Report.cuda_graphs`}.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpar
from fxpar.run.recording import TRIED, WARM
from fxpar.verify.equivalence import DRAWS, GRADIENT_TOLERANCE, LOSS_TOLERANCE, NOISE, distances, moved, too_far
from fxpar.verify.step import scalar_of
from tests import zoo

Step = tuple[Tensor, dict[str, Tensor]]
LEARNING_RATE = 1e-3
ESTIMATED = ("resnet",)
"""Models whose loss in microbatches is the mean of theirs: batch norm takes a microbatch's statistics for the batch's."""


def main(plan: str, cases: list[list]) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl", timeout=timedelta(seconds=90), device_id=torch.device("cuda", torch.cuda.current_device()))
    side = dist.new_group(backend="gloo", timeout=timedelta(seconds=120))
    failed = False
    for name, recompute, more, microbatches in cases:
        start = time.perf_counter()
        text = ",".join(filter(None, [plan, more, f"recompute={recompute}", f"microbatches={microbatches}"]))
        told: list[str] = []
        worst = run(name, fxpar.Plan.parse(text), functools.partial(of_all_ranks, side), told)
        if dist.get_rank() == 0:
            print(json.dumps({"model": name, "plan": text, "error": worst, "seconds": round(time.perf_counter() - start, 1),
                              "graphs": "".join(told)}), flush=True)
        failed |= bool(worst)
        torch._dynamo.reset()
    dist.destroy_process_group()
    if failed:
        raise SystemExit("not all are right")


def of_all_ranks(group: dist.ProcessGroup, check: Callable[[], str | None]) -> str:
    """The first rank's error, with its number, where `check` returns or raises one; an empty text where no rank has one."""
    try:
        error = check() or ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()[-2000:]}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    return next((f"rank {r}: {e}" for r, e in enumerate(errors) if e), "")


def run(name: str, plan: fxpar.Plan, everywhere: Callable[[Callable[[], str | None]], str], told: list[str]) -> str:
    """What is wrong with a model under a plan; an empty text if nothing is. everywhere: see `of_all_ranks`. told: gets what the
    report says of recordings."""
    apart: list[tuple[float, float]] = []
    rest: list[Callable[[], str]] = []

    def first() -> str:
        want, have, narrow, module, mine, after_it = steps(name, plan)
        rest.append(lambda: recorded(module, mine, have, told) or after_it())
        apart.append(distances(want[1], have[1], narrow[1]))
        return difference(want, have) if plan.param_dtype is None else missing(want, have)

    def more() -> str | None:
        apart.extend(distances(*(grads for _, grads in steps(name, plan, draw)[:3])) for draw in range(1, DRAWS))
        return too_far(apart)

    wrong = everywhere(first)
    if not wrong and plan.param_dtype is not None and everywhere(lambda: too_far(apart)):
        wrong = everywhere(more)
    return wrong or everywhere(rest[0])


def steps(name: str, plan: fxpar.Plan, draw: int = 0) -> tuple[Step, Step, Step, fxpar.ParallelModule, Any, Callable[[], str]]:
    """One GPU's step, the plan's, one GPU's in the plan's dtypes; the module, its inputs; and a function that checks the rest of
    the step.

    draw: see `fxpar.verify.equivalence.moved`.
    """
    model, inputs = zoo.build(name)
    with moved(model, draw):
        model = copy.deepcopy(model)
    model, inputs = without_dropout(model).cuda(), on_gpu(enough(inputs, plan))
    exact = copy.deepcopy(model)
    module = fxpar.parallelize(copy.deepcopy(model), plan, part(inputs, plan, 0), cuda_graphs=True)
    mine = part(inputs, plan, module.replica)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=LEARNING_RATE, fused=True) for m in (exact, module)]
    whole = microbatches(inputs, plan) if name in ESTIMATED else [inputs]
    want, have = step(exact, whole), parallel_step(module, mine)
    dtype = plan.param_dtype
    narrow = want if dtype is None else step(copy.deepcopy(model).to(dtype), floats(whole, dtype))
    return want, have, narrow, module, mine, functools.partial(after, exact, module, optimizers, plan)


def recorded(module: fxpar.ParallelModule, inputs: Any, have: Step, told: list[str]) -> str:
    """What is wrong where the same step is made again, recorded and played back; the gradients are those of the last time."""
    precise = LOSS_TOLERANCE if module.plan.param_dtype is None else 1e-2
    for _ in range(WARM + TRIED + 2):
        module.zero_grad()
        loss, grads = parallel_step(module, inputs)
        if not abs(loss - have[0]) <= precise * abs(have[0]):
            return f"made again, the loss is {loss.item():.9g} instead of {have[0].item():.9g}"
        largest = max(g.norm().item() for g in grads.values())
        for name, grad in grads.items():
            error = (grad - have[1][name]).norm().item()
            if not error <= max(precise, GRADIENT_TOLERANCE) * grad.norm().item() + NOISE * largest:
                return f"made again, the gradient of {name} is off by {error / max(grad.norm().item(), 1e-30):.2g} of its norm"
    told.append(module.report().cuda_graphs)
    return ""


def after(exact: nn.Module, module: Any, optimizers: list[torch.optim.Optimizer], plan: fxpar.Plan) -> str:
    """The rest of a step."""
    precise = 1e-4 if plan.param_dtype is None else 0.1
    parameters = [p for p in exact.parameters() if p.grad is not None]
    before = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = module.clip_grad_norm_(before.item() / 2)
    if not abs(norm - before) <= precise * before:
        return f"clip_grad_norm_ returned {norm.item():.6g} instead of {before.item():.6g}"
    clipped = torch.stack([g.norm() for g in gradients(module).values()]).norm()
    if not abs(clipped - before / 2) <= 1e-3 * before:
        return f"after clipping the norm is {clipped.item():.6g} instead of {before.item() / 2:.6g}"
    torch.nn.utils.clip_grad_norm_(exact.parameters(), before.item() / 2)
    for optimizer in optimizers:
        optimizer.step()
    stepped = full_tensors(dict(module.named_parameters()), plan)
    far = [n for n, p in exact.named_parameters() if not (stepped[n] - p).abs().amax() <= 2.01 * LEARNING_RATE]
    if far:
        return f"after a step {far[0]} is farther from one GPU's than two steps can be"
    return replicas(module) or saves(module, optimizers[1])


def replicas(module: Any) -> str:
    """What ranks that hold the same part hold in other bits."""
    parameters = dict(module.named_parameters())
    for what, tensors in (("gradient", {n: p.grad for n, p in parameters.items() if p.grad is not None}), ("value", parameters)):
        first: dict[str, Tensor] = {}
        for held in of_each_rank(tensors):
            for name, full in held.items():
                other = first.setdefault(name, full)
                if not torch.equal(full, other):
                    apart = (full - other).abs().amax() / other.abs().amax()
                    return f"ranks hold another {what} of {name}, by {apart:.2g} of it"
    return ""


def of_each_rank(tensors: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The full tensors that each rank sees, by name: those of a pipeline hold parts of different parameters."""
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, {n: t.detach().full_tensor().cpu() for n, t in tensors.items()})
    return held


def full_tensors(tensors: dict[str, Any], plan: fxpar.Plan) -> dict[str, Tensor]:
    """The full tensors of DTensors, by name, and under a pipeline those of all ranks."""
    if plan.pp == 1:
        return {n: t.detach().full_tensor() for n, t in tensors.items()}
    return {n: t.cuda() for held in of_each_rank(tensors) for n, t in held.items()}


def gradients(module: Any) -> dict[str, Tensor]:
    return full_tensors({n: p.grad for n, p in module.named_parameters() if p.grad is not None}, module.plan)


def saves(module: Any, optimizer: torch.optim.Optimizer) -> str:
    """What was saved is there again after it was lost."""
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    fxpar.save_checkpoint(f"{where[0]}/step", module, optimizer)
    kept = [t.clone() for t in parts(module, optimizer)]
    for t in parts(module, optimizer):
        t.zero_()
    fxpar.load_checkpoint(f"{where[0]}/step", module, optimizer)
    names = [n for n, _ in module.named_parameters()]
    different = [i for i, pair in enumerate(zip(parts(module, optimizer), kept, strict=True)) if not torch.equal(*pair)]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(where[0])
    which = [names[i] if i < len(names) else f"state {i - len(names)}" for i in different[:4]]
    return f"the checkpoint's {', '.join(which)} differ from what was saved" if which else ""


def parts(module: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's parts of the parameters and of the optimizer's state."""
    state = [t for p in module.parameters() for k, t in optimizer.state[p].items() if k != "step"]
    return [t.detach().to_local() for t in (*module.parameters(), *state)]


def step(model: nn.Module, batches: list[Any]) -> Step:
    """One GPU's loss and gradients, by name, on average over microbatches."""
    losses = []
    for inputs in batches:
        loss = scalar_of(called(model, inputs)) / len(batches)
        loss.backward()
        losses.append(loss.detach().double())
    return torch.stack(losses).sum(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def parallel_step(module: fxpar.ParallelModule, inputs: Any) -> Step:
    """The loss and the full gradients, by name."""
    if module.plan.microbatches > 1:
        loss = called(module.train_step, inputs)
    else:
        loss = scalar_of(called(module, inputs))
        loss.backward()
    return loss.detach().double(), {n: g.double() for n, g in gradients(module).items()}


def called(function: Any, inputs: Any) -> Any:
    return function(**inputs) if isinstance(inputs, dict) else function(*inputs)


def difference(want: Step, have: Step) -> str:
    (loss, grads), (other, others) = want, have
    if not abs(other - loss) <= LOSS_TOLERANCE * abs(loss):
        return f"the loss is {other.item():.9g} instead of {loss.item():.9g}"
    largest = max(g.norm().item() for g in grads.values())
    for name, grad in grads.items():
        if name not in others:
            return f"no gradient of {name}"
        error = (others[name] - grad).norm().item()
        if not error <= GRADIENT_TOLERANCE * grad.norm().item() + NOISE * largest:
            return f"the gradient of {name} is off by {error / max(grad.norm().item(), 1e-30):.2g} of its norm"
    return ""


def missing(want: Step, have: Step) -> str:
    absent = set(want[1]) - set(have[1])
    if absent:
        return f"no gradient of {min(absent)}"
    if not abs(have[0] - want[0]) <= 1e-2 * abs(want[0]):
        return f"the loss is {have[0].item():.6g} instead of {want[0].item():.6g}"
    return ""


def without_dropout(model: nn.Module) -> nn.Module:
    """No GPU draws what another does: what dropout computes is compared elsewhere, in one process."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)
    return model


def enough(inputs: Any, plan: fxpar.Plan) -> Any:
    """As many rows as the plan has microbatches on all replicas: those that follow are the first ones in another order."""
    def more(t: Tensor) -> Tensor:
        return torch.cat([t.roll(i, 0) for i in range(-(-plan.dp * plan.microbatches // len(t)))])

    return pytree.tree_map_only(Tensor, more, inputs)


def on_gpu(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.cuda, inputs)


def floats(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def microbatches(inputs: Any, plan: fxpar.Plan) -> list[Any]:
    """The global batch of each: the n-th part of every replica's rows."""
    def rows(t: Tensor, n: int) -> Tensor:
        return torch.cat([mine.chunk(plan.microbatches)[n] for mine in t.chunk(plan.dp)])

    return [pytree.tree_map_only(Tensor, lambda t, n=n: rows(t, n), inputs) for n in range(plan.microbatches)]


def part(inputs: Any, plan: fxpar.Plan, replica: int) -> Any:
    """A replica's rows of every input."""
    return pytree.tree_map_only(Tensor, lambda t: t.chunk(plan.dp)[replica], inputs)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
