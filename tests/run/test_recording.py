"""Recordings of forward and backward change no number, whatever a training loop does between them.

What they are played back on is a device that overwrites the whole pool, but for what was just written (tests/recorder.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config

import fxpar
from fxpar import compat
from fxpar.backends.transport.watch import NoWatch
from fxpar.errors import PlanError
from fxpar.program import Source
from fxpar.run import engine, recording
from fxpar.run.recording import Recordings
from tests.blocks import Blocks, tokens
from tests.recorder import Pretended


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(recording, "WARM", 1)
    monkeypatch.setattr(recording, "TRIED", 1)
    monkeypatch.setattr(recording, "EVERY", 3)


# ---- codes ----

KINDS = (*["param"] * 6, "buffer", "input", "input")
SITE = torch.tensor(3)
"""What the codes take besides, always the same."""


def program(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor, fifth: Tensor, sixth: Tensor, mean: Tensor, x: Tensor,
            seed: Tensor, site: Tensor) -> tuple[Tensor, ...]:
    """A loss, logits, and what becomes of a buffer. Parameters, views of them, inputs and results are kept for the backward; the
    gradients of two parameters are parts of one tensor, and those of two others one tensor."""
    y = torch.tanh(x @ first - mean) * torch.cos(seed + site) + (x @ torch.cat([third, fourth], 1)) + fifth + sixth
    logits = y @ second.t() + x.sum() * second.sum() * second.new_ones(1)
    return torch.cos(logits).mean(), logits, mean * 0.9 + y.detach().mean() * 0.1


class Handed:
    """Codes of one program, for batches of so many rows, that every example runs or records anew."""

    def __init__(self, rows: int, grad: bool):
        self.grad = grad
        if grad:
            example = [x.requires_grad_(i < 6) for i, x in enumerate([*fresh(), *batch(0, rows), SITE])]
            with functorch_config.patch(donated_buffer=False):
                self._run = compat.partition_eagerly(fx.symbolic_trace(program), example, lambda graph: None, recorder=self)
                torch.autograd.grad(self._run(*example)[0], example[:6])  # its backward is traced
        else:
            self._forward: Any = lambda given: list(program(*given))

    def takes(self, inputs: Any, more: int = 0) -> None: ...

    def forward(self, code: compat.Code, returned: int) -> compat.Code:
        self._forward, self._returned = code, returned
        self.now = code
        return lambda given: self.now(given)

    def backward(self, code: compat.Code) -> compat.Code:
        self._backward = self.then = code
        return lambda given: self.then(given)

    def begin(self, recordings: Recordings | None) -> None:
        if recordings is None:
            self.now, self.then = self._forward, getattr(self, "_backward", None)
            return
        with torch.set_grad_enabled(self.grad):
            of = recordings.of(SimpleNamespace(sources=[Source(kind, kind, torch.empty(0)) for kind in KINDS]))
        of.takes(range(len(KINDS)), 1)
        if self.grad:
            self.now, self.then = of.forward(self._forward, self._returned), of.backward(self._backward)
        else:
            self.now = of.alone(self._forward)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return list(self._run(*inputs, SITE) if self.grad else self.now([*inputs, SITE]))


def fresh() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 1), torch.randn(4, 2),
            torch.randn(3), torch.randn(3), torch.randn(3)]


def batch(seed: int, rows: int) -> list[Tensor]:
    return [torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)), torch.tensor(seed)]


class Alone:
    """A `Control` of one rank."""

    rank, world, watch = 0, 1, NoWatch()

    def exchange(self, thing: object) -> list:
        return [thing]


class CodeLoop:
    """A training loop over codes."""

    def __init__(self, handed: dict[Any, Handed]):
        self.handed = handed

    def begin(self, device: Pretended | None) -> None:
        *parameters, self.mean = fresh()
        self.parameters = [nn.Parameter(p) for p in parameters]
        self.count, self.rate = 0, 0.1
        self.outputs: list[Tensor] = []
        self.pending: list[Tensor] = []
        self.held: list[Tensor] = []
        self.recordings = None if device is None else Recordings(
            "auto", device, Alone(), lambda: [p.grad for p in self.parameters if p.grad is not None], lambda broken: None)
        for each in self.handed.values():
            each.begin(self.recordings)

    def forward(self, rows: int = 3) -> None:
        self.count += 1
        self.outputs = self.handed[rows](*self.parameters, self.mean, *batch(self.count, rows))
        self.mean.copy_(self.outputs[2])
        self.pending.append(self.outputs[0])

    def backward(self, which: int = -1, times: int = 1) -> None:
        if self.pending:
            loss = self.pending.pop(which)
            for left in reversed(range(times)):
                loss.backward(retain_graph=left > 0)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p -= self.rate * p.grad

    def zero(self, none: bool = True) -> None:
        for p in self.parameters:
            if none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def loop(self, rows: int = 3) -> None:
        self.zero()
        self.forward(rows)
        self.backward()
        self.step()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.outputs = self.handed["alone"](*self.parameters, self.mean, *batch(self.count, 3))

    def under(self, context: Any) -> None:
        with context:
            self.forward()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def move(self) -> None:
        p = self.parameters[0]
        p.data = p.data.clone()

    @torch.no_grad()
    def load(self) -> None:
        for p in self.parameters:
            p.copy_(p * 0.9)

    def slower(self) -> None:
        self.rate *= 0.7

    def seen(self) -> list[Tensor | None]:
        return [*self.parameters, *(p.grad for p in self.parameters), self.mean, *self.outputs, *self.held]


ACTIONS = {
    "loop": lambda x: x.loop(),
    "loop, other shape": lambda x: x.loop(2),
    "forward": lambda x: x.forward(),
    "forward, other shape": lambda x: x.forward(2),
    "backward": lambda x: x.backward(),
    "backward of the first": lambda x: x.backward(0),
    "backward twice": lambda x: x.backward(times=2),
    "forget": lambda x: x.pending.clear(),
    "step": lambda x: x.step(),
    "zero": lambda x: x.zero(none=False),
    "set to none": lambda x: x.zero(),
    "hold outputs": lambda x: x.held.extend(x.outputs),
    "hold gradients": lambda x: x.held.extend(x.gradients()),
    "hold parts of gradients": lambda x: x.held.extend(g[1:] for g in x.gradients()),
    "let go": lambda x: x.held.clear(),
    "evaluate": lambda x: x.evaluate(),
    "slower": lambda x: x.slower(),
    "load": lambda x: x.load(),
    "move": lambda x: x.move(),
    "look for anomalies": lambda x: x.under(torch.autograd.detect_anomaly(check_nan=False)),
    "hooks": lambda x: x.under(torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)),
}
"""What a user's program may do, each at any time."""


def compare(one: Any, other: Any, actions: list[str]) -> None:
    """Both see the same, bit by bit, whatever they do."""
    for number, action in enumerate(actions):
        assert done(one, action) == done(other, action), (number, action)
        for mine, theirs in zip(one.seen(), other.seen(), strict=True):
            assert (mine is None) == (theirs is None), (number, action)
            assert mine is None or torch.equal(local(mine), local(theirs)), (number, action)


def done(loop: Any, action: str, more: dict[str, Any] | None = None) -> str:
    """Do it; what PyTorch says if it cannot be done (a parameter was written to before a backward that needs it). more: actions
    of such loops alone."""
    try:
        with functorch_config.patch(donated_buffer=False):  # so that a graph may be kept
            (ACTIONS | OF_MODULES | (more or {}))[action](loop)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return ""


def local(x: Tensor) -> Tensor:
    return getattr(x, "_local_tensor", x)


@pytest.fixture(scope="module")
def loops() -> list[CodeLoop]:
    """What is recorded, and what is not."""
    return [CodeLoop({3: Handed(3, True), 2: Handed(2, True), "alone": Handed(3, False)}) for _ in range(2)]


def of_codes(loops: list[CodeLoop], actions: list[str], device: Pretended | None = None) -> CodeLoop:
    recorded, plain = loops
    device = device or Pretended()
    recorded.begin(device)
    plain.begin(None)
    compare(recorded, plain, actions)
    recorded.device = device
    return recorded


@settings(max_examples=60)
@given(st.lists(st.sampled_from([*ACTIONS]), min_size=4, max_size=25))
def test_no_number_changes(loops, actions):
    of_codes(loops, ["loop"] * 3 + actions)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.lists(st.sampled_from([*ACTIONS]), min_size=4, max_size=60))
def test_no_number_changes_in_long_runs(loops, actions):
    of_codes(loops, ["loop"] * 3 + actions)


def plays(loops: list[CodeLoop], actions: list[str], before: int = 3) -> int:
    """How often something was played back in these actions, after so many plain loops."""
    recorded, plain = loops
    device = Pretended()
    of_codes(loops, ["loop"] * before, device)
    count = device.plays
    compare(recorded, plain, actions)
    return device.plays - count


def test_what_is_played_back(loops):
    assert of_codes(loops, ["loop"] * 10).device.plays == 2 * 9
    accumulated = ["forward", "backward", "forward", "backward", "step", "set to none"]
    assert plays(loops, accumulated) == 4
    assert plays(loops, ["zero", "forward", "backward", "step"] * 2) == 4
    assert plays(loops, ["hold outputs", *["loop"] * 2]) == 4
    assert plays(loops, ["evaluate", "loop", "evaluate", "loop"]) == 5
    assert plays(loops, ["loop, other shape", "loop, other shape", "loop, other shape", "loop"]) == 6


def test_what_is_run_as_it_is(loops):
    assert plays(loops, ["forward", "forward", "backward", "backward of the first"]) == 2, "the second one waits for its backward"
    assert plays(loops, ["forward", "backward twice"]) == 2, "the forward, and the last backward"
    assert plays(loops, ["hold parts of gradients", "loop"]) == 0
    assert plays(loops, ["hold gradients", "loop", "loop", "let go", "loop"]) == 2
    assert plays(loops, ["look for anomalies", "backward", "hooks", "backward"]) == 0
    assert plays(loops, ["move", "loop"]) == 0 and plays(loops, ["move", *["loop"] * 6]) > 4, "recorded anew"


# ---- modules ----


def small(seed: int, rows: int) -> dict[str, Tensor]:
    return tokens(seed, rows, 5, 11)


class ModuleLoop(CodeLoop):
    """A training loop over a parallel module."""

    def __init__(self, cuda_graphs: bool | str, device: Pretended | None = None, backend: str = "eager"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "device_of", lambda _: device)
            torch.manual_seed(0)
            self.module = fxpar.parallelize(Blocks(11, 8, 8, 1), fxpar.Plan(recompute="full"), small(0, 3), backend=backend,
                                            cuda_graphs=cuda_graphs)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, 0.1)
        self.count, self.outputs, self.pending, self.held = 0, [], [], []

    def told(self) -> str | None:
        return self.module._engine.recordings.told(self.module.newest_program())

    def forward(self, rows: int = 3) -> None:
        self.count += 1
        self.outputs = [*self.module(**small(self.count, rows)).values()]
        self.pending.append(self.outputs[0])

    def step(self) -> None:
        self.module.clip_grad_norm_(1.0)
        self.optimizer.step()

    def zero(self, none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=none)

    def evaluate(self) -> None:
        self.module.eval()
        self.outputs = [*self.module.eval_step(**small(self.count, 3)).values()]
        self.module.train()

    def gradients(self) -> list[Tensor]:
        return [p.grad.to_local() for p in self.parameters if p.grad is not None]

    def move(self) -> None:
        p = self.parameters[1]
        p._local_tensor = p._local_tensor.clone()

    def load(self) -> None:
        self.module.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in self.module.state_dict().items()})

    def slower(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.7

    def freeze(self) -> None:
        self.parameters[2].requires_grad_(not self.parameters[2].requires_grad)

    def without_sync(self) -> None:
        with self.module.no_sync():
            self.forward()
            self.backward()

    def seen(self) -> list[Tensor | None]:
        return [*self.parameters, *(p.grad for p in self.parameters), *self.module.buffers(), *self.outputs, *self.held]


OF_MODULES = {"freeze": lambda x: x.freeze(), "no_sync": lambda x: x.without_sync()}


def of_modules(actions: list[str], backend: str = "eager") -> ModuleLoop:
    device = Pretended()
    recorded = ModuleLoop("auto", device, backend)
    recorded.device = device
    compare(recorded, ModuleLoop(False, backend=backend), ["loop"] * 4 + actions)
    return recorded


def test_a_module_is_recorded():
    loop = of_modules(["loop"])
    assert loop.told() == "on (the GPU takes 1000 ms, and 2000 ms without)" and loop.device.plays == 8
    assert str(loop.module.report()).count("CUDA graphs: on") == 1


@pytest.mark.slow
def test_compiled_codes_overwrite_what_the_forward_left():
    """Inductor writes a backward's values to memory of tensors that were saved for it."""
    loop = of_modules(["loop", "evaluate", "evaluate", "forward", "backward", "forward", "backward", "step"], "inductor")
    assert loop.told().startswith("on ") and loop.device.plays > 10


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.sampled_from([*ACTIONS, *OF_MODULES]), min_size=5, max_size=40))
def test_no_number_of_a_module_changes(actions):
    of_modules(actions)


# ---- what is decided ----


def test_what_is_off(loops):
    def told(device: Pretended | None, wanted: Any = "auto", actions: int = 5) -> str:
        loop = loops[0]
        loop.begin(device)
        loop.recordings.wanted = wanted
        for _ in range(actions):
            loop.loop()
        return next(iter(loop.recordings._made.values()))[1][True, ""].told

    assert told(Pretended(seconds=(1.0, 2.1, 1.0))) == "off: the GPU takes 4200 ms, the host that starts its work 2000 ms"
    assert told(Pretended(seconds=(1.0, 2.1, 2.1)), True) == "on (the GPU takes 4200 ms, and 4200 ms without)"
    assert told(Pretended(seconds=(1.0, 1.1, 1.08))) == "off: with recordings the GPU takes 2160 ms, and 2200 ms without"
    assert told(Pretended(taken=(100, 106))) == "off: recordings take 6 % more memory"
    assert told(Pretended(taken=(100, 106)), True).startswith("on ")
    assert told(Pretended(taken=(100, 106), size=212)).startswith("on ")
    assert told(Pretended(taken=(100, 106), size=211)) == "off: recordings take 6 % more memory"
    broken = Pretended()
    broken.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    assert told(broken) == "off: it could not be recorded: RuntimeError: operation not permitted when stream is capturing"
    assert told(Pretended(), actions=1) == "off: not yet, a program is recorded after 1 runs"


def test_memory_of_what_is_refused_is_given_back_when_nobody_has_any_of_it(loops):
    loop, device = loops[0], Pretended(taken=(100, 106))
    loop.begin(device)
    held: list[Tensor] = []
    while not loop.recordings.pool.given_up:
        loop.loop()
        held += loop.gradients()
    given_back = device.given_back
    loop.loop()
    assert loop.recordings.pool.given_up and device.given_back == given_back
    held.clear()
    loop.loop()
    loop.loop()
    assert not loop.recordings.pool.given_up and device.given_back == given_back + 1


def test_several_ranks_compare_what_is_held(loops, monkeypatch):
    loop = loops[0]
    loop.begin(Pretended())
    loop.loop()
    loop.loop()
    monkeypatch.setattr(Alone, "world", 2)
    assert loop.recordings.held() is None
    loop.forward()
    assert loop.recordings.held() == "an earlier forward waits for its backward"
    loop.backward()
    loop.held.extend(loop.gradients())
    assert loop.recordings.held() is None, "they are in .grad, and were moved"
    loop.loop()
    loop.held.extend(g[1:] for g in loop.gradients())
    assert loop.recordings.held() == "gradients are held, and not in .grad alone"


def test_choices_are_checked():
    with pytest.raises(PlanError, match='"auto", True or False'):
        fxpar.parallelize(Blocks(11, 8, 8, 1), "dp=1", small(0, 3), cuda_graphs="yes")
    with pytest.raises(PlanError, match=r'tp_comm_overlap.*"auto", True or False'):
        fxpar.parallelize(Blocks(11, 8, 8, 1), "dp=1", small(0, 3), tp_comm_overlap="yes")
    assert ModuleLoop("auto").told().startswith("off: code that is compiled for a GPU")


def test_recordings_over_a_group_that_ends_are_given_up(loops, monkeypatch):
    """NCCL waits for them, for ever."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mine, other = dist.new_group([0]), dist.new_group([0])
    monkeypatch.setattr(Alone, "world", 2)
    device = Pretended()
    recordings = Recordings(True, device, Alone(), list, lambda broken: None, over=lambda group: group is mine)
    loop = loops[0]
    monkeypatch.setattr(Alone, "world", 1)
    loop.begin(Pretended())
    loop.recordings = recordings
    for each in loop.handed.values():
        each.begin(recordings)
    for _ in range(12):
        loop.loop()
    recorded = device.remembered
    assert device.plays and recorded
    dist.destroy_process_group(other)
    assert device.remembered == recorded and recordings.off is None
    dist.destroy_process_group()
    plays = device.plays
    assert not device.remembered and recordings.off == "a process group over which it was recorded has ended"
    loop.loop()
    assert device.plays == plays, "codes run as they are"
