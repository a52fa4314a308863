"""Clipping and capturable optimizers' steps are played back, and no number changes, whatever a training loop does meanwhile."""

from __future__ import annotations

import copy
import gc
import importlib
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fxpar
from fxpar.compat import stepping
from fxpar.run import engine, recording, repeated
from fxpar.run.clip import Clipping
from fxpar.run.repeated import RepeatedWork, StepRecordings
from tests.blocks import Blocks
from tests.processes import launch
from tests.recorder import Pretended
from tests.run import test_recording
from tests.run.test_recording import ACTIONS, OF_MODULES, ModuleLoop, compare, local, small


@pytest.fixture(autouse=True, scope="module")
def soon():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "WARM", 1)
        patch.setattr(recording, "TRIED", 1)
        patch.setattr(recording, "EVERY", 3)
        patch.setattr(repeated, "EQUAL", 1)
        patch.setattr(test_recording, "ACTIONS", ACTIONS | OF_STEPS)
        for name in stepping.NAMES:  # which are capturable on GPUs
            patch.setattr(importlib.import_module(f"torch.optim.{name}"), "_get_capturable_supported_devices",
                          lambda supports_xla=True: ["cpu"], raising=False)
        yield


def foreach(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda ps: kind(ps, lr=0.1, foreach=True, capturable=True, **options)


def of_two_groups(ps: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": ps[:2], "lr": 0.05}, {"params": ps[2:], "weight_decay": 0.5}], 0.1, fused=True,
                             capturable=True)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, 0.1, fused=True, capturable=True),
    "AdamW, fused, a tensor": lambda ps: torch.optim.AdamW(ps, torch.tensor(0.1), fused=True, capturable=True),
    "AdamW, foreach, a tensor": lambda ps: torch.optim.AdamW(ps, torch.tensor(0.1), foreach=True, capturable=True),
    "AdamW, one by one": lambda ps: torch.optim.AdamW(ps, 0.1, foreach=False, capturable=True),
    "AdamW, groups": of_two_groups,
    "Adam": foreach(torch.optim.Adam, amsgrad=True),
    "Adadelta": foreach(torch.optim.Adadelta),
    "Adamax": foreach(torch.optim.Adamax),
    "ASGD": foreach(torch.optim.ASGD),
    "NAdam": foreach(torch.optim.NAdam),
    "RAdam": foreach(torch.optim.RAdam),
    "RMSprop": foreach(torch.optim.RMSprop, momentum=0.9, centered=True),
}  # fmt: skip


class StepLoop(ModuleLoop):
    """A training loop, and all that a user may do to its optimizer."""

    def __init__(self, cuda_graphs: bool | str, device: Pretended | None = None):
        super().__init__(cuda_graphs, device)
        self.initial = [x.detach().clone() for x in (*self.parameters, *self.module.buffers())]

    @torch.no_grad()
    def begin(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        """Anew, but for what is recorded of forward and backward."""
        for x, value in zip((*self.parameters, *self.module.buffers()), self.initial, strict=True):
            x.requires_grad_(x.is_floating_point() and isinstance(x, nn.Parameter)).copy_(value)
        for p in self.parameters:
            p.grad = None
        self.module.dropout_seeds.calls = 0
        module: Any = self.module
        module.__dict__["_step_recordings"] = repeats = StepRecordings(module._engine.recordings, module._model.parameters)
        module.__dict__["_clipping"] = Clipping(module.parameter_store.bound, module.parameter_store.runtime, repeats.clipping)
        self.count, self.outputs, self.pending, self.held = 0, [], [], []
        self.optimizer, self.second = make(self.parameters), None
        self.max_norm, self.norm_type = 1.0, 2.0
        self.norms: list[Tensor] = []
        self.kept: dict[str, Any] = {}

    @property
    def device(self) -> Pretended:
        """What plays clipping and steps back."""
        return self.module._engine.recordings.device.others[-1]

    def step(self) -> None:
        self.norms.append(self.module.clip_grad_norm_(self.max_norm, self.norm_type))
        self.optimizer.step()
        if self.second is not None:
            self.second.step()

    def clip(self, max_norm: float, norm_type: float) -> None:
        self.max_norm, self.norm_type = max_norm, norm_type

    def set(self, name: str, value: Any) -> None:
        for group in self.optimizer.param_groups:
            group[name] = value

    def keep(self) -> None:
        self.kept = copy.deepcopy(self.optimizer.state_dict())

    def load_optimizer(self) -> None:
        if self.kept:
            self.optimizer.load_state_dict(copy.deepcopy(self.kept))

    def steps_last(self) -> None:
        """From now on another optimizer steps the last parameters, too."""
        self.second = torch.optim.Adam(self.parameters[3:], 0.01, fused=True, capturable=True)

    def ungraded(self) -> None:
        """A step in which a parameter has no gradient."""
        self.zero()
        self.forward()
        self.backward()
        self.parameters[0].grad = None
        self.step()

    def seen(self) -> list[Tensor | None]:
        state = [x for o in (self.optimizer, self.second) if o is not None for s in o.state.values() for x in s.values()]
        return [*super().seen(), *self.norms, *state]


OF_STEPS: dict[str, Callable[[StepLoop], None]] = {
    "clip hardly": lambda x: x.clip(1e6, 2.0),
    "clip by the largest": lambda x: x.clip(0.01, float("inf")),
    "clip by another norm": lambda x: x.clip(0.5, 3),
    "clip as before": lambda x: x.clip(1.0, 2.0),
    "betas": lambda x: x.set("betas", (0.5, 0.9)),
    "another tensor": lambda x: x.set("lr", torch.tensor(0.03)),
    "a number": lambda x: x.set("lr", 0.03),
    "decay": lambda x: x.set("weight_decay", 0.3),
    "keep": lambda x: x.keep(),
    "load optimizer": lambda x: x.load_optimizer(),
    "another optimizer": lambda x: x.steps_last(),
    "ungraded": lambda x: x.ungraded(),
    "freeze": lambda x: x.freeze(),
}


@pytest.fixture(scope="module")
def loops(soon) -> tuple[StepLoop, StepLoop]:
    """One that is recorded, and one that is not; all that they are asked for is compiled, while there is a process group."""
    made = StepLoop("auto", Pretended()), StepLoop(False)
    for loop in made:
        loop.begin(OPTIMIZERS["AdamW, fused"])
        for action in [*(kinds := ["loop", "loop, other shape", "evaluate", "no_sync"]), "freeze", *kinds]:
            (ACTIONS | OF_MODULES)[action](loop)
    return made


def of_steps(loops: tuple[StepLoop, StepLoop], name: str, actions: list[str]) -> StepLoop:
    """The one that is recorded, once both have done all this."""
    for loop in loops:
        loop.begin(OPTIMIZERS[name])
    compare(*loops, ["loop"] * 7 + actions)
    return loops[0]


def standing(module: Any) -> str:
    """How clipping and steps stand, without how often they were played back."""
    return re.sub(r" \(.*?\)", "", module._step_recordings.told())


def plays_of(loop: StepLoop, actions: list[str]) -> list[int]:
    """How much was played back in each of these, of clipping and steps."""
    found = []
    for action in actions:
        before = loop.device.plays
        (ACTIONS | OF_STEPS)[action](loop)
        found.append(loop.device.plays - before)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_played_back(name, loops):
    loop = of_steps(loops, name, ["loop"] * 3)
    kind, groups = type(loop.optimizer).__name__, len(loop.optimizer.param_groups)
    assert standing(loop.module) == f"; clipping: on; {kind}'s step: on"
    assert f"; {kind}'s step: on (" in loop.module.report().cuda_graphs
    assert loop.device.records == 2 + groups and plays_of(loop, ["loop"]) == [2 + groups]


ALL = ["loop"] * 4


def test_numbers_that_are_tensors_may_change(loops):
    """As an LR scheduler writes them."""
    loop = of_steps(loops, "AdamW, fused, a tensor", ["slower", "loop", "slower", "loop"])
    assert plays_of(loop, ["slower", "loop", "loop"]) == [0, 3, 3] and loop.device.records == 3
    loop.set("lr", torch.tensor(0.03))
    assert plays_of(loop, ["loop"]) == [2], "it lies elsewhere"


def test_a_number_that_changes_is_heeded(loops):
    loop = of_steps(loops, "AdamW, fused", ["slower", "loop", "slower", "loop", "decay", "loop", "betas", "loop"])
    assert loop.module._step_recordings.told().endswith("; not the last time: beta1 is another number than in the step before)")
    plays = plays_of(loop, ["loop"] * 5)
    assert plays[0] == 2 and plays[-1] == 3, "recorded anew, as it stays"
    of_steps(loops, "AdamW, fused", ["loop", "slower", *["loop"] * 6, "slower", *["loop"] * 9])


def test_clipping_by_another_norm(loops):
    clips = ["clip hardly", "clip by the largest", "clip by another norm", "clip as before"]
    loop = of_steps(loops, "AdamW, fused", [x for clip in clips for x in (clip, *ALL, *ALL)])
    assert max(n.item() for n in loop.norms) > 0.02 and loop.device.plays > 40
    assert plays_of(loop, ["clip by the largest", "loop"]) == [0, 3], "it is known still"
    loop.clip(torch.tensor(1.0), 2.0)
    assert plays_of(loop, ["loop"]) == [1]


@pytest.mark.parametrize("name", ["AdamW, fused", "AdamW, foreach, a tensor", "AdamW, groups"])
def test_state_that_is_loaded(name, loops):
    loop = of_steps(loops, name, ["keep", *ALL, "load optimizer", *ALL, "load optimizer", *ALL, *ALL])
    assert plays_of(loop, ["loop"])[0] >= 3
    loop.load_optimizer()
    assert plays_of(loop, ["loop"]) == [2], "its state lies elsewhere"


@pytest.mark.parametrize("name", ["AdamW, fused", "AdamW, foreach, a tensor", "AdamW, groups"])
def test_gradients_and_parameters_that_lie_elsewhere(name, loops):
    anew, again = ["zero", "forward", "backward", "step"], ["forward", "backward", "forward", "backward", "step"]
    loop = of_steps(loops, name, [
        "ungraded", "loop", "ungraded", "loop", *anew, *anew, *again, "set to none", *again, *ALL, "freeze", *ALL, "freeze", *ALL,
        "move", *ALL, "load", *ALL, "loop, other shape", "loop", "loop, other shape", "loop", "evaluate", *ALL])
    assert plays_of(loop, ["loop"])[0] >= 3 and loop.device.records < 40


def test_two_optimizers_and_another_group(loops):
    loop = of_steps(loops, "AdamW, fused", ["another optimizer", *ALL, *ALL])
    assert standing(loop.module).endswith("AdamW's step: on; Adam's step: on")
    assert plays_of(loop, ["loop"]) == [4]
    for each in loops:
        each.begin(lambda ps: torch.optim.AdamW(ps[:4], 0.1, fused=True, capturable=True))
    compare(*loops, ["loop"] * 7)
    for each in loops:
        each.optimizer.add_param_group({"params": each.parameters[4:], "lr": 0.3})
    compare(*loops, ["loop"] * 7)
    assert plays_of(loops[0], ["loop"]) == [4]


def test_two_models(loops):
    """One optimizer steps both, group by group; each is recorded with its module."""
    others = StepLoop("auto", Pretended()), StepLoop(False)
    for one, other in zip(loops, others, strict=True):
        other.begin(OPTIMIZERS["AdamW, fused"])
        one.begin(lambda ps, other=other: torch.optim.AdamW([{"params": ps}, {"params": other.parameters}], 0.1, fused=True,
                                                            capturable=True))
    for _ in range(9):
        for one, other in zip(loops, others, strict=True):
            one.zero()
            for each in (one, other):
                each.forward()
                each.backward()
                each.module.clip_grad_norm_(1.0)
            one.optimizer.step()
        for mine, theirs in zip(*([*one.seen(), *other.seen()] for one, other in zip(loops, others, strict=True)), strict=True):
            assert torch.equal(local(mine), local(theirs))
    assert loops[0].device.records == others[0].device.records == 3


def test_hooks_schedulers_and_closures_go_on(loops):
    """They are around what is played back."""
    loop = of_steps(loops, "AdamW, fused, a tensor", ALL)
    seen: list[str] = []
    loop.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    loop.optimizer.register_step_post_hook(lambda *_: seen.append("behind"))
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    loop.loop()
    schedule.step()
    torch.testing.assert_close(loop.optimizer.param_groups[0]["lr"], torch.tensor(0.05))
    assert seen == ["before", "behind"] and schedule.last_epoch == 1
    plays, value = loop.device.plays, loop.parameters[0].to_local().clone()
    assert loop.optimizer.step(lambda: 3) == 3 and loop.device.plays == plays + 1
    assert not torch.equal(loop.parameters[0].to_local(), value)


def test_versions_tell_of_a_step_where_they_do_without(loops):
    loop = of_steps(loops, "AdamW, one by one", ALL)
    version = loop.parameters[0]._local_tensor._version
    loop.step()
    assert loop.parameters[0]._local_tensor._version > version


class Looks(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def test_who_looks_at_operators_sees_them(loops):
    loop = of_steps(loops, "AdamW, fused", ALL)
    loop.zero()
    loop.forward()
    loop.backward()
    with FlopCounterMode(display=False):
        assert plays_of(loop, ["step"]) == [0]
    with Looks():
        assert plays_of(loop, ["step"]) == [0]
    with torch.device("cpu"):
        assert plays_of(loop, ["step"]) == [3]


def test_what_is_off(loops, monkeypatch):
    def told(make: Callable[[Any], torch.optim.Optimizer]) -> str:
        loops[0].begin(make)
        for _ in range(9):
            loops[0].loop()
        return standing(loops[0].module)

    assert told(lambda ps: torch.optim.AdamW(ps, 0.1)) == "; clipping: on; AdamW's step: off: capturable=False"
    assert told(lambda ps: torch.optim.SGD(ps, 0.1)).endswith("; SGD's step: off: it is none of those that can be captured")
    monkeypatch.setattr(type(loops[0].module._engine.recordings), "are_on", lambda self: False)
    plays = loops[0].device.plays
    assert told(OPTIMIZERS["AdamW, fused"]) == "" and loops[0].device.plays == plays


def test_what_cannot_be_recorded_runs_as_it_is(loops, monkeypatch):
    def fails(self, code, tensors):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(StepRecordings, "record", fails)
    loop = of_steps(loops, "AdamW, fused", ALL)
    why = "off: it could not be recorded: RuntimeError: operation not permitted when stream is capturing"
    assert standing(loop.module) == f"; clipping: {why}; AdamW's step: {why}"


def test_memory_decides(loops, monkeypatch):
    """More than 5 % for a recording are too much where not much is left."""
    recordings = loops[0].module._engine.recordings
    monkeypatch.setattr(Pretended, "taken", lambda self: 100 + 6 * self.records)
    for wanted, told in (("auto", "off: a recording takes 6 % more memory"), (True, "on")):
        monkeypatch.setattr(recordings, "wanted", wanted)
        loop = of_steps(loops, "AdamW, fused", ALL)
        assert standing(loop.module) == f"; clipping: {told}; AdamW's step: {told}"
        assert len(loop.device.there) == (0 if wanted == "auto" else 3)


def test_what_changes_each_time_is_hardly_recorded(loops):
    """Whatever is recorded next has to stay for longer."""
    loop = of_steps(loops, "AdamW, fused", ALL)
    work, x, recorded = RepeatedWork(loop.module._step_recordings, "work"), torch.ones(4), set()
    for step in range(400):
        run = work.now((("number", step // 8),), lambda: [1])
        if run is not None:
            run("code", lambda given: None, [x])
            recorded.add(step // 8)
    assert len(recorded) == repeated.KEPT + 2 and len(work._ways) == repeated.KEPT


def trained_on_ranks(cuda_graphs: bool) -> tuple[list[Tensor], str]:
    """This rank's parameters and norms of ten steps, and how clipping and steps stand."""
    torch.manual_seed(0)
    module = fxpar.parallelize(Blocks(11, 8, 8, 1), "dp=2,zero=3,recompute=full", small(0, 2), cuda_graphs=cuda_graphs)
    module.seed = 3
    optimizer = torch.optim.AdamW(module.parameters(), torch.tensor(0.1), fused=True, capturable=True)
    norms = []
    for step in range(10):
        loss, *_ = module(**small(2 * step + module.replica.index, 2)).values()
        loss.backward()
        norms.append(module.clip_grad_norm_(0.5, 2.0 if step < 8 else float("inf")))
        optimizer.step()
        optimizer.zero_grad()
    return [*(p.to_local() for p in module.parameters()), *norms], standing(module)


def on_two_ranks(rank: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "WARM", 1)
        patch.setattr(recording, "TRIED", 1)
        patch.setattr(repeated, "EQUAL", 1)
        patch.setattr(engine, "device_of", lambda _: Pretended())
        (mine, told), (theirs, _) = trained_on_ranks(True), trained_on_ranks(False)
    assert all(map(torch.equal, mine, theirs))
    return told


@pytest.mark.multiproc
def test_ranks_sum_what_is_played_back():
    """Each by itself, around the all-reduces of a norm. Some parameters are split by columns: 11 rows cannot be halved."""
    assert launch(2, on_two_ranks) == ["; clipping: on; AdamW's step: on"] * 2


def test_an_optimizer_for_each_parameter(loops, monkeypatch):
    """Only so many recordings are made, and none within a backward pass."""
    monkeypatch.setattr(repeated, "MOST", 4)
    loop = loops[0]
    loop.begin(OPTIMIZERS["AdamW, fused"])
    loop.optimizer = torch.optim.SGD(loop.parameters[:1], 0.0)
    each = [torch.optim.AdamW([p], 0.1, fused=True, capturable=True) for p in loop.parameters]
    for _ in range(9):
        loop.loop()
        for one in each:
            one.step()
    assert loop.device.records == 4
    assert standing(loop.module).endswith("AdamW's step: off: there are 4 recordings already")
    loop.zero()
    loop.forward()
    plays = loop.device.plays
    hooks = [p.register_post_accumulate_grad_hook(lambda p, one=one: one.step())
             for p, one in zip(loop.parameters[:2], each[:2], strict=True)]
    loop.backward()
    for hook in hooks:
        hook.remove()
    assert loop.device.plays == plays and "called by a backward pass" in loop.module._step_recordings.told()


def test_nothing_is_left_of_an_optimizer_or_a_module_that_is_collected():
    loop = StepLoop("auto", Pretended())
    loop.begin(OPTIMIZERS["AdamW, fused"])
    for _ in range(8):
        loop.loop()
    gc.collect()
    device = loop.device
    assert len(device.there) == 3
    state = weakref.ref(loop.optimizer.state[loop.parameters[0]]["exp_avg"])
    loop.optimizer = torch.optim.SGD(loop.parameters, 0.1)
    gc.collect()
    assert len(device.there) == 2 and state() is None
    loop.loop()
    module, optimizer = weakref.ref(loop.module), loop.optimizer
    del loop
    gc.collect()
    assert module() is None and not device.there
    optimizer.step()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(name=st.sampled_from([*OPTIMIZERS]),
       actions=st.lists(st.sampled_from([*ACTIONS, *OF_STEPS, *["loop"] * 20]), min_size=5, max_size=40))
def test_no_number_changes(loops, name, actions):
    of_steps(loops, name, actions)
