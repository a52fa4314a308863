"""Mistakes of one rank of two: programs of which rank 1 does one thing otherwise, and how they end."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.checkpoint import save
from tests.run.script import Net, Program

TIMEOUT = 4.0
"""Of the programs, in seconds; longer on a machine that is so busy that ranks without a mistake would seem to be lost."""
HUNG = 60
"""Timeouts after which a program that runs still does not end by itself."""
ENDED = "ended"
"""The file by which rank 0 says that its program is over."""

Step = Callable[..., Any]


Mistake = tuple[str, dict[str, Step], dict[str, Step]]


def mistake(plan: str = "dp=2", both: dict[str, Step] | None = None, **steps: Step) -> Mistake:
    """steps: of rank 1, instead of those that both ranks do."""
    return plan, steps, both or {}


def nothing(*_: Any) -> None:
    pass


def raising(*_: Any) -> None:
    raise ValueError("one rank's own trouble")


def at(step: int, then: Step, otherwise: str) -> Step:
    """In one step `then`, in the others what the program does."""
    return lambda p, now, *more: then(p, now, *more) if now == step else getattr(Program, otherwise)(p, now, *more)


def also(before: Callable[[Program], Any], name: str) -> Step:
    """Something else, and then what the program does."""

    def both(p: Program, *more: Any) -> Any:
        before(p)
        return getattr(Program, name)(p, *more)

    return both


def option(**given: Any) -> Step:
    def parallelize(p: Program) -> Any:
        p.options.update(given)
        return Program.parallelize(p)

    return parallelize


def under(plan: Any) -> Step:
    def parallelize(p: Program) -> Any:
        p.parallel_plan = plan
        return Program.parallelize(p)

    return parallelize


def model(change: Callable[[Any], Any]) -> Step:
    """A model that `change` has changed before it is made parallel."""

    def changed(p: Program, m: nn.Module) -> nn.Module:
        made = change(m)
        return made if isinstance(made, nn.Module) else m

    return changed


def module(change: Callable[[Any], Any], step: int = 1) -> Step:
    """A parallel module that `change` changes before a step."""
    return lambda p, now: change(p.module) if now == step else None


def passes(change: Callable[[dict[str, Any]], Any], step: int = 1) -> Step:
    """A batch that `change` has changed."""

    def batch(p: Program, now: int) -> dict[str, Any]:
        made = Program.batch(p, now)
        return made if now != step else {**made, **(change(made) or {})}

    return batch


def within(context: Callable[[Program], Any], name: str, step: int = 1) -> Step:
    """A part of a step within a context."""

    def inside(p: Program, now: int, *more: Any) -> Any:
        with context(p) if now == step else contextlib.nullcontext():
            return getattr(Program, name)(p, now, *more)

    return inside


def on_meta(p: Program) -> nn.Module:
    with torch.device("meta"):
        return Program.build(p)


def freeze(m: Any) -> None:
    m.get_parameter("up.weight").requires_grad_(False)


def hold(seconds: float) -> Step:
    return lambda *_: time.sleep(seconds)


def slowly(name: str, seconds: float, step: int = 1) -> Step:
    return lambda p, now, *more: (time.sleep(seconds if now == step else 0), getattr(Program, name)(p, now, *more))[1]


def scale_weights(m: Any) -> None:
    with torch.no_grad():
        m.get_parameter("up.weight").mul_(1.5)


def set_lr(p: Program) -> None:
    p.opt.param_groups[0]["lr"] = 0.01


def leave(p: Program) -> None:
    """The program of this rank is over, and its process lives on for as long as that of rank 0 runs."""
    until = time.monotonic() + HUNG * p.options["timeout"]
    while not (Path(p.folder) / ENDED).exists() and time.monotonic() < until:
        time.sleep(0.1)
    raise SystemError("it is over")


def hook_fails(p: Program, step: int) -> Any:
    loss = Program.forward(p, step)
    if step == 1:
        loss.register_hook(raising)
    return loss


def with_weight(value: float, wants: bool = False) -> Step:
    """A batch with a number that is a tensor without a batch dim."""
    return lambda p, step: {**Program.batch(p, step), "weight": torch.tensor(value, requires_grad=wants)}


def tensor_rate(rate: float) -> Step:
    return lambda p: torch.optim.AdamW(p.module.parameters(), lr=torch.tensor(rate), foreach=False)


def loaded(seed: int) -> Step:
    """A state dict of whole tensors is loaded before a step."""

    def begin(p: Program, step: int) -> None:
        if step == 1:
            torch.manual_seed(seed)
            p.module.load_state_dict(Net().state_dict())

    return begin


def twins(p: Program) -> None:
    """Two modules of one model, each with its loss."""
    p.module, p.other = p.parallelize(), p.parallelize()
    p.opt = torch.optim.SGD([*p.module.parameters(), *p.other.parameters()], 0.1)
    for step in range(5):
        p.step(step)


def step_of_twins(called: int | None = None, derived: int | None = None) -> Step:
    """called, derived: the step in which they are called, and derived, in the other order."""

    def step(p: Program, now: int) -> None:
        order = [p.module, p.other][:: -1 if now == called else 1]
        losses = [module(**p.rows(now, module.replica)) for module in order]
        for loss in losses[:: -1 if now == derived else 1]:
            loss.backward()
        p.opt.step()
        p.opt.zero_grad()

    return step


class Logits(Net):
    def forward(self, ids: Tensor, labels: Tensor | None = None, weight: float = 1.0) -> Any:
        return super().forward(ids)


def logits(read: Callable[[Tensor, Tensor], Any] = nothing) -> Step:
    """A loss of logits of which each rank has a part, which `read` is given in one step."""

    def step(p: Program, now: int) -> None:
        batch = p.batch(now)
        out = p.module(ids=batch["ids"])
        if now == 1:
            read(out, batch["labels"])
        F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten()).backward()
        p.update(now)
        p.zero(now)

    return step


SPLIT: dict[str, Step] = {
    "build": lambda p: (torch.manual_seed(0), Logits())[1], "example": lambda p: {"ids": p.rows(0, 0)["ids"]}, "step": logits(),
    "parallelize": under(fxpar.Plan(tp=2, roles={"head.weight[0]": "vocab"}))}
TWINS: dict[str, Step] = {"run": twins, "step": step_of_twins()}
MANAGED: dict[str, Step] = {"save": lambda p: fxpar.CheckpointManager(Path(p.folder) / "run", p.module).save(1), "load": nothing}


def part_of(name: str) -> Step:
    return lambda p, step: p.module.gathered(name).__enter__()


def interrupted(p: Program) -> None:
    """Ctrl-C in the middle of a save, of a process that lives on."""
    save.__dict__["_write"] = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    Program.save(p)


MISTAKES: dict[str, Mistake] = {
    # what parallelize is given
    "no mistake": mistake(),
    "no mistake, tp": mistake("tp=2"),
    "no mistake, zero=3": mistake("dp=2,zero=3"),
    "no mistake, pp": mistake("pp=2"),
    "plan: other degrees": mistake(parallelize=under("tp=2")),
    "plan: other zero": mistake(parallelize=under("dp=2,zero=3")),
    "plan: for four ranks": mistake(parallelize=under("dp=4")),
    "plan: unknown field": mistake(parallelize=under("banana=2")),
    "plan: no plan": mistake(parallelize=under(None)),
    "plan: recompute": mistake(parallelize=under("dp=2,recompute=full")),
    "plan: param_dtype": mistake(parallelize=under("dp=2,param_dtype=bf16")),
    "plan: microbatches": mistake(parallelize=under("dp=2,microbatches=2")),
    "backend: another": mistake(parallelize=option(backend="inductor")),
    "backend: unknown": mistake(parallelize=option(backend="xla")),
    "transport: another": mistake(parallelize=option(transport="nccl")),
    "timeout: another": mistake(parallelize=lambda p: option(timeout=p.options["timeout"] + 1)(p)),
    "timeout: none": mistake(parallelize=option(timeout=0)),
    "check_batches: another": mistake(parallelize=option(check_batches=1)),
    "dump_dir: cannot be written": mistake(parallelize=option(dump_dir="/proc/none/x")),
    "example: none": mistake(example=nothing),
    "example: other shape": mistake(example=lambda p: {k: v[:2] for k, v in p.rows(0, 0).items()}),
    "example: other names": mistake(example=lambda p: {"x": p.rows(0, 0)["ids"]}),
    "example: without labels": mistake(example=lambda p: {"ids": p.rows(0, 0)["ids"]}),
    "parallelize: not called": mistake(parallelize=leave),
    "parallelize: fails before": mistake(parallelize=raising),
    "parallelize: under inference_mode": mistake(parallelize=lambda p: torch.inference_mode()(Program.parallelize)(p)),
    # models
    "model: no module": mistake(build=lambda p: "gpt2"),
    "model: other width": mistake(changed=model(lambda m: setattr(m, "head", nn.Linear(8, 32)))),
    "model: more layers": mistake(changed=model(lambda m: setattr(m, "depth", 2))),
    "model: more parameters": mistake(changed=model(lambda m: m.register_parameter("spare", nn.Parameter(torch.ones(3))))),
    "model: tied": mistake(changed=model(lambda m: setattr(m.head, "weight", m.embed.weight))),
    "model: float64": mistake(changed=model(lambda m: m.double())),
    "model: bfloat16 of one layer": mistake(changed=model(lambda m: m.head.to(torch.bfloat16) and None)),
    "model: on meta": mistake(build=on_meta),
    "model: one parameter on meta": mistake(changed=model(lambda m: m.head.to("meta") and None)),
    "model: buffer of another shape": mistake(changed=model(lambda m: m.register_buffer("scale", torch.ones(1)))),
    "model: frozen layer": mistake(changed=model(freeze)),
    "model: in eval mode": mistake(changed=model(lambda m: m.eval())),
    "model: another activation": mistake(changed=model(lambda m: setattr(m, "norm", nn.Tanh()))),
    "model: another temperature": mistake(changed=model(lambda m: setattr(m, "temperature", 2.0))),
    "model: another seed": mistake(build=lambda p: setattr(p, "seed", 1) or Program.build(p)),
    "model: cannot be traced": mistake(changed=model(lambda m: setattr(m, "temperature", "hot"))),
    "model: wrapped already": mistake(changed=model(lambda m: nn.DataParallel(m))),
    "model: a gradient before": mistake(changed=model(lambda m: setattr(m.head.weight, "grad", torch.ones(16, 8)))),
    "model: a hook": mistake(changed=model(lambda m: m.up.register_forward_hook(lambda mod, i, o: 2 * o) and None)),
    # calls
    "forward: missing argument": mistake(forward=at(1, lambda p, s: p.module(), "forward")),
    "forward: unknown argument": mistake(batch=passes(lambda b: {"foo": b["ids"]})),
    "forward: an argument less": mistake(batch=passes(lambda b: {"labels": None})),
    "forward: other shape": mistake(batch=passes(lambda b: {k: v[:3] for k, v in b.items()})),
    "forward: longer": mistake(batch=passes(lambda b: {k: torch.cat([v, v], 1) for k, v in b.items()})),
    "forward: other dtype": mistake(batch=passes(lambda b: {"ids": b["ids"].int()})),
    "forward: another float": mistake(batch=passes(lambda b: {"weight": 3.0})),
    "forward: another float, again": mistake(batch=lambda p, s: {**Program.batch(p, s), "weight": 1.0 + s}),
    "forward: another tensor without a batch": mistake("dp=2", {"batch": with_weight(1.0)}, batch=with_weight(3.0)),
    "forward: another tensor that wants a gradient": mistake("tp=2", {"batch": with_weight(1.0, True)},
                                                             batch=with_weight(3.0, True)),
    "forward: a tensor that is none": mistake(batch=passes(lambda b: {"ids": b["ids"].tolist()})),
    "forward: label out of range": mistake(batch=passes(lambda b: {"labels": b["labels"] + 1000})),
    "forward: id out of range": mistake(batch=passes(lambda b: {"ids": b["ids"] + 1000})),
    "forward: other rows under tp": mistake("tp=2", batch=lambda p, s: p.rows(s, 1)),
    "forward: other labels under tp": mistake("tp=2", batch=passes(lambda b: {"labels": b["labels"].flip(0)}, 2)),
    "forward: rows in another order under tp": mistake("tp=2", batch=passes(lambda b: {k: v.flip(0) for k, v in b.items()})),
    "forward: other rows under pp": mistake("pp=2", batch=lambda p, s: p.rows(s, 1)),
    "forward: label out of range under pp": mistake("pp=2", batch=passes(lambda b: {"labels": b["labels"] + 1000})),
    "forward: left out under pp": mistake("pp=2", step=at(1, nothing, "step")),
    "forward: another mode under pp": mistake("pp=2", begin=module(lambda m: m.eval())),
    "forward: never filled, on all ranks": mistake("dp=2", build=on_meta),
    "forward: twice": mistake(forward=at(1, lambda p, s: (Program.forward(p, s), Program.forward(p, s))[1], "forward")),
    "forward: left out": mistake(step=at(1, nothing, "step")),
    "forward: under no_grad": mistake(forward=within(lambda p: torch.no_grad(), "forward")),
    "forward: under inference_mode": mistake(forward=within(lambda p: torch.inference_mode(), "forward")),
    "forward: under autocast": mistake(forward=within(lambda p: torch.autocast("cpu", torch.bfloat16), "forward")),
    "forward: under no_sync": mistake(forward=within(lambda p: p.module.no_sync(), "forward")),
    "forward: under no_sync, zero=3": mistake("dp=2,zero=3", forward=within(lambda p: p.module.no_sync(), "forward")),
    "forward: train_step instead": mistake(step=at(1, lambda p, s: p.module.train_step(**p.batch(s)), "step")),
    "forward: fails before": mistake(forward=at(1, raising, "forward")),
    "forward: an iterator that ends": mistake(batch=at(1, lambda p, s: next(iter(())), "batch")),
    "evaluation on one rank": mistake(evaluate=at(1, lambda p, s: p.module.eval_step(**p.batch(s)), "evaluate")),
    "evaluation in eval mode on one rank": mistake(evaluate=at(1, lambda p, s: p.module.eval()(**p.batch(s)), "evaluate")),
    "backward: left out": mistake(backward=at(1, nothing, "backward")),
    "backward: left out, zero=3": mistake("dp=2,zero=3", backward=at(1, nothing, "backward")),
    "backward: left out, tp": mistake("tp=2", backward=at(1, nothing, "backward")),
    "backward: twice": mistake(backward=at(1, lambda p, s, loss: (
        loss.backward(retain_graph=True), loss.backward()), "backward")),
    "backward: of twice the loss": mistake(backward=at(1, lambda p, s, loss: (2 * loss).backward(), "backward")),
    "backward: of twice the loss, pp": mistake("pp=2", backward=at(1, lambda p, s, loss: (2 * loss).backward(), "backward")),
    "backward: a hook that fails": mistake(forward=hook_fails),
    "backward: by autograd.grad": mistake(backward=at(1, lambda p, s, loss: torch.autograd.grad(
        loss, [p.module.get_parameter("up.weight")]), "backward")),
    "clip: left out": mistake(clip=at(1, nothing, "clip")),
    "clip: left out, zero=3": mistake("dp=2,zero=3", clip=at(1, nothing, "clip")),
    "clip: another norm": mistake(clip=at(1, lambda p, s: p.module.clip_grad_norm_(0.5), "clip")),
    "clip: by PyTorch, zero=3": mistake("dp=2,zero=3", clip=at(
        1, lambda p, s: nn.utils.clip_grad_norm_(p.module.parameters(), 1.0), "clip")),
    "clip: twice": mistake(clip=at(1, lambda p, s: (Program.clip(p, s), Program.clip(p, s)), "clip")),
    "optimizer: step left out": mistake(update=at(1, nothing, "update")),
    "optimizer: step left out, zero=3": mistake("dp=2,zero=3", update=at(1, nothing, "update")),
    "optimizer: another rate": mistake(update=at(1, also(set_lr, "update"), "update")),
    "optimizer: weight decay": mistake(optimizer=lambda p: torch.optim.SGD(
        p.module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)),
    "optimizer: parameters in another order": mistake(optimizer=lambda p: torch.optim.SGD(
        list(p.module.parameters())[::-1], 0.1, momentum=0.9)),
    "optimizer: a gradient is zeroed": mistake(update=at(1, also(lambda p: p.module.get_parameter("up.weight").grad.zero_(),
                                                                 "update"), "update")),
    "optimizer: another one": mistake(optimizer=lambda p: torch.optim.AdamW(p.module.parameters(), 0.1)),
    "optimizer: some parameters": mistake(optimizer=lambda p: torch.optim.SGD(p.module.up.parameters(), 0.1, momentum=0.9)),
    "optimizer: zero_grad left out": mistake(zero=at(1, nothing, "zero")),
    "optimizer: zero_grad of another kind": mistake(zero=at(1, lambda p, s: p.opt.zero_grad(set_to_none=False), "zero")),
    "optimizer: some parameters, zero=3": mistake("dp=2,zero=3", optimizer=lambda p: torch.optim.SGD(
        p.module.up.parameters(), 0.1, momentum=0.9)),
    "optimizer: a rate that is a tensor, zero=3": mistake("dp=2,zero=3", {"optimizer": tensor_rate(0.1)},
                                                          optimizer=tensor_rate(0.01)),
    "optimizer: a gradient less, zero=3": mistake("dp=2,zero=3", update=at(
        1, also(lambda p: setattr(p.module.get_parameter("up.weight"), "grad", None), "update"), "update")),
    "optimizer: one gradient is not zeroed, zero=3": mistake("dp=2,zero=3", zero=at(1, lambda p, s: [
        setattr(q, "grad", None) for q in list(p.module.parameters())[1:]], "zero")),
    "optimizer: step left out, pp": mistake("pp=2", update=at(1, nothing, "update")),
    "optimizer: zero_grad left out, pp": mistake("pp=2", zero=at(1, nothing, "zero")),
    # the module between calls
    "module: eval": mistake(begin=module(lambda m: m.eval())),
    "module: a submodule in eval mode": mistake(begin=module(lambda m: m.get_submodule("drop").eval())),
    "module: frozen": mistake(begin=module(freeze)),
    "module: another seed": mistake(begin=module(lambda m: setattr(m, "seed", 7))),
    "module: an attribute": mistake(begin=module(lambda m: setattr(m, "temperature", 3.0))),
    "module: a hook": mistake(begin=module(lambda m: m.get_submodule("up").register_forward_hook(lambda mod, i, o: 2 * o))),
    "module: a parameter deleted": mistake(begin=module(lambda m: setattr(m.get_submodule("up"), "bias", None))),
    "module: a submodule replaced": mistake(begin=module(lambda m: setattr(m, "drop", nn.Identity()))),
    "module: half": mistake(begin=module(lambda m: m.double())),
    "module: weights changed": mistake(begin=module(scale_weights)),
    "module: weights of another sign": mistake("tp=2", begin=module(lambda m: m.get_parameter("norm.weight").data.neg_())),
    "module: weights in another order": mistake(begin=module(lambda m: m.get_parameter("up.weight").data.copy_(
        m.get_parameter("up.weight").data.flip(0)))),
    "module: weights changed under tp": mistake("tp=2", begin=module(lambda m: m.get_parameter("norm.weight").data.fill_(3.0))),
    "module: a buffer changed": mistake(begin=module(lambda m: m.get_buffer("scale").fill_(2.0))),
    "module: another tensor that is no buffer": mistake(
        "dp=2", {"changed": model(lambda m: setattr(m, "temperature", torch.tensor(1.5)))},
        changed=model(lambda m: setattr(m, "temperature", torch.tensor(2.5)))),
    "module: another tensor that is no buffer, later": mistake(
        "dp=2", {"changed": model(lambda m: setattr(m, "temperature", torch.tensor(1.5))),
                 "begin": module(lambda m: setattr(m, "temperature", torch.tensor(1.0)))},
        begin=module(lambda m: setattr(m, "temperature", torch.tensor(3.0)))),
    "module: load_state_dict": mistake(begin=loaded(3)),
    "module: load_state_dict of other values, zero=3": mistake("dp=2,zero=3", {"begin": loaded(3)}, begin=loaded(4)),
    "module: init_weights": mistake(begin=module(lambda m: m.init_weights(3))),
    "module: init_weights, other seeds on all ranks": mistake("dp=2", before=lambda p: p.module.init_weights(p.rank)),
    "module: never filled": mistake(build=on_meta),
    # checkpoints
    "save: left out": mistake(save=nothing),
    "save: another folder": mistake(save=lambda p: fxpar.save_checkpoint(Path(p.folder) / "other", p.module, p.opt)),
    "save: without the optimizer": mistake(save=lambda p: fxpar.save_checkpoint(
        Path(p.folder) / "checkpoint", p.module)),
    "save: asynchronous": mistake(save=lambda p: fxpar.save_checkpoint(
        Path(p.folder) / "checkpoint", p.module, p.opt, asynchronous=True)),
    "save: no path": mistake(save=lambda p: fxpar.save_checkpoint(None, p.module, p.opt)),
    "save: where nothing can be": mistake(save=lambda p: fxpar.save_checkpoint("/proc/none/x", p.module, p.opt)),
    "save: of no module": mistake(save=lambda p: fxpar.save_checkpoint(Path(p.folder) / "checkpoint", None)),
    "save: export instead": mistake(save=lambda p: fxpar.export_safetensors(Path(p.folder) / "checkpoint", p.module)),
    "save: interrupted": mistake(save=interrupted),
    "manager: not made": mistake("dp=2", MANAGED, save=lambda p: Program.step(p, 0)),
    "manager: other arguments": mistake("dp=2", MANAGED, save=lambda p: fxpar.CheckpointManager(
        Path(p.folder) / "run", p.module, keep=0).save(1)),
    "load: left out": mistake(load=nothing),
    "load: another folder": mistake(load=lambda p: fxpar.load_checkpoint(Path(p.folder) / "other", p.module, p.opt)),
    "load: without the optimizer": mistake(load=lambda p: fxpar.load_checkpoint(Path(p.folder) / "checkpoint", p.module)),
    "load: safetensors": mistake(load=lambda p: fxpar.load_safetensors(Path(p.folder) / "checkpoint", p.module)),
    # ranks that do not come, or wait for something else
    "gathered on one rank": mistake(evaluate=at(1, lambda p, s: p.module.gathered().__enter__(), "evaluate")),
    "gathered: an unknown part": mistake("dp=2", {"evaluate": at(1, part_of("up"), "evaluate")},
                                         evaluate=at(1, part_of("none"), "evaluate")),
    "logits are read on one rank": mistake("tp=2", SPLIT, step=logits(lambda out, labels: out.detach().cpu())),
    "logits are compared with labels on one rank": mistake("tp=2", SPLIT, step=logits(
        lambda out, labels: (out.argmax(-1) == labels).float().mean().item())),
    "modules called in another order": mistake("dp=2", TWINS, step=step_of_twins(called=4)),
    "backward passes in another order": mistake("dp=2,zero=3", TWINS, step=step_of_twins(derived=3)),
    "a sum over parameters on one rank": mistake(evaluate=at(
        1, lambda p, s: p.module.sum_over_parameters(lambda name, q: q.sum()), "evaluate")),
    "a second module on one rank": mistake(before=lambda p: Program.parallelize(p)),
    "the loader ends": mistake(run=lambda p: setattr(p, "steps", 2) or Program.run(p)),
    "the loader ends, and the rank waits": mistake(step=at(1, lambda p, s: leave(p), "step")),
    "a barrier instead of a step": mistake(step=at(1, lambda p, s: dist.barrier(), "step")),
    "full_tensor on one rank": mistake("dp=2,zero=3", evaluate=at(
        1, lambda p, s: p.module.get_parameter("up.weight").full_tensor(), "evaluate")),
    "the number of a penalty on one rank": mistake("tp=2", evaluate=at(
        1, lambda p, s: sum(q.square().sum() for q in p.module.parameters()).item(), "evaluate")),
    "an exception, and the rank waits": mistake(begin=at(1, lambda p, s: leave(p), "begin")),
    "a rank that is slow": mistake(begin=at(1, hold(1.5), "begin")),
    "a rank that is slow in its backward": mistake(backward=slowly("backward", 1.5)),
}  # fmt: skip


def ending(rank: int, name: str, folder: str, timeout: float) -> tuple[str, str, float, list[float], list[Tensor]]:
    """How the program of this rank ends: "ok" or the names of the error's class and its bases, text, seconds, losses, weights."""
    plan, steps, both = MISTAKES[name]
    Path(folder).mkdir(parents=True, exist_ok=True)
    program = Program(rank, plan, folder, timeout)
    for step, function in {**both, **(steps if rank == 1 or name.endswith("on all ranks") else {})}.items():
        setattr(program, step, lambda *given, f=function: f(program, *given))
    torch.set_num_threads(1)
    begin = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.run()
        kind, text = "ok", ""
    except (Exception, KeyboardInterrupt) as error:
        kind, text = " ".join(c.__name__ for c in type(error).__mro__), str(error)
    if rank == 0:
        (Path(folder) / ENDED).touch()
    weights = [] if kind != "ok" else [p.full_tensor().detach() for p in program.module.parameters()]
    return kind, text, time.monotonic() - begin, program.losses, weights
