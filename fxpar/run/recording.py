"""recording: forward and backward as recordings (CUDA graphs), which a GPU plays back without waiting for its host.

The code of a compiled program is run as it is for a few calls. Then all ranks decide together, and if nothing speaks against it,
they record the forward, and the backward that follows:

    ============================  ==========================================================================================
    a recorded code's             lies
    ============================  ==========================================================================================
    parameters, buffers           where they are; a recording is played back if they are still there
    other inputs                  in memory of the recording, to which each call's are copied
    outputs for the user          in the pool, out of which they are copied
    tensors for the backward      in the pool, lent to autograd
    gradients                     in the pool, lent to whoever gets them
    ============================  ==========================================================================================

The pool is one for all recordings of a module (see `fxpar.run.pool`). While something of it is lent out, and cannot be moved, the
code runs as it is, in memory from elsewhere.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxpar import compat
from fxpar.backends.transport.control import Control
from fxpar.ops.exchange import counts_rows
from fxpar.program import Program
from fxpar.run.pool import Device, Loan, Pool, Recording
from fxpar.run.votes import GAIN, HOST_BOUND, MORE_MEMORY, PLENTY, Vote, first_against

WARM = 3
"""Runs of a program before it is recorded."""
TRIED = 3
"""Times that a recording is played back before ranks decide whether to keep it."""
EVERY = 64
"""After so many runs, at most, ranks decide again."""
MOVED = "parameters or buffers have moved"
COUNTED = "how many rows go to each expert is known only on the host, step by step"
"""Why no program with such rows is recorded."""

_log = logging.getLogger("fxpar")
_kept: list[Pool] = []
"""Pools of modules that are gone, as long as something is lent out of them."""


_over_groups: weakref.WeakSet[Recordings] = weakref.WeakSet()
"""Those of several ranks."""


def _end_over(group: dist.ProcessGroup) -> None:
    """A group is about to end. NCCL waits, for ever, for recordings that communicate over it to be given up."""
    for recordings in list(_over_groups):
        if recordings._over(group):
            recordings.end()


@atexit.register
def _end_all() -> None:
    for recordings in list(_over_groups):
        recordings.end()


def device_of(device: torch.device) -> Device | None:
    """What records on a device, if anything does."""
    return compat.CudaGraphs(device) if device.type == "cuda" else None


def gradients_of(model: nn.Module) -> Iterator[Tensor]:
    """This rank's parts of what is in the ``.grad`` of parameters."""
    for p in model.parameters():
        grad = p.grad
        if grad is not None:
            yield compat.memory(grad) if isinstance(grad, DTensor) else grad


R = TypeVar("R", bound="RecordedProgram")


class Recordings:
    """Those of one module, on one rank.

    wanted: "auto", True or False. gradients: all tensors that are in a ``.grad``. anew: has the transport begin anew, before and
    behind everything that is recorded; given True, where a recording broke off in the middle. off: why there are none at all.
    over: whether anything that is recorded communicates over a process group.
    """

    def __init__(self, wanted: bool | str, device: Device | None, control: Control, gradients: Callable[[], Iterable[Tensor]],
                 anew: Callable[[bool], None], off: str | None = None,
                 over: Callable[[dist.ProcessGroup], bool] = lambda group: False):
        self.wanted, self.device, self.control, self._anew = wanted, device, control, anew
        self.off = "cuda_graphs=False" if wanted is False else off
        _kept[:] = [pool for pool in _kept if pool.is_lent()]
        self.pool, self._over = Pool(gradients), over
        self._made: dict[int, tuple[Program, dict[tuple[bool, str], RecordedProgram]]] = {}
        if self.off is None and control.world > 1:
            compat.before_groups_end(_end_over)
            _over_groups.add(self)

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        for number in list(self._made):
            self._give_up(number)
        self.pool.abandon()
        _kept[:] = [pool for pool in (*_kept, self.pool) if pool.is_lent()]

    def anew(self, broken: bool = False) -> None:
        self._anew(broken)

    def of(self, program: Program, refused: str | None = None, name: str = "", stay: frozenset[int] = frozenset()
           ) -> RecordedProgram | None:
        """What records a program, with gradients or, where they are off now, without. refused: why it cannot be. name: of the
        microbatches that it runs, if not of any. stay: inputs that stay where they are, besides parameters and buffers."""
        if self.off is not None or self.device is None:
            return None
        fixed = stay | {i for i, s in enumerate(program.sources) if s.stays}
        return self.add(program, RecordedProgram(self, self.device, fixed, refused), name)

    def add(self, program: Program, recorded: R, name: str = "") -> R:
        """Have this be what records a program."""
        self._made.setdefault(id(program), (program, {}))[1][torch.is_grad_enabled(), name] = recorded
        return recorded

    def decide_now(self, program: Program) -> bool:
        """Whether ranks may decide in a program's next run: they must have found that they are called alike."""
        return any(p.decides_now() for p in self._made.get(id(program), (None, {}))[1].values())

    def recorded(self) -> list[RecordedProgram]:
        """What is recorded now, in an order that is the same on all ranks."""
        return [p for _, made in self._made.values() for p in made.values() if p.is_recorded]

    def held(self) -> str | None:
        """What ranks compare before a call: why none of what is recorded may be played back in it. NCCL wants a recording played
        back by all ranks or by none."""
        alike = self.control.world > 1 and any(not p.together for p in self.recorded())
        return self.pool.obstacle() if alike else None

    def drop(self, program: Program) -> None:
        """The program will not be run again."""
        self._give_up(id(program))

    def _give_up(self, number: int) -> None:
        for each in self._made.pop(number, (None, {}))[1].values():
            each.give_up()

    def end(self) -> None:
        """Give up all recordings: there are none from now on."""
        self.off = "a process group over which it was recorded has ended"
        for _, made in self._made.values():
            for each in made.values():
                each.end(self.off)
        for recording in self.pool.given_up:
            recording.forget()

    def are_on(self) -> bool:
        """Whether a program's forward and backward are played back, and ranks have found that to be of use."""
        return self.off is None and any(p.plays for _, made in self._made.values() for p in made.values())

    def told(self, program: Program) -> str:
        """Whether a program's forward and backward are played back, and why not."""
        if self.off is not None:
            return f"off: {self.off}"
        made = self._made.get(id(program), (None, {}))[1]
        ran = [(grad, name, p) for (grad, name), p in made.items() if p.has_run] or [(*key, p) for key, p in made.items()][:1]
        trained = [(name, p) for grad, name, p in ran if grad] or [(name, p) for _, name, p in ran]
        return "; ".join(f"{name}: {p.told}" if name else p.told for name, p in trained) or "off: the program did not run yet"


def of_microbatches(engine: weakref.ref[Any], program: Program, name: str, stay: frozenset[int]) -> RecordedProgram | None:
    """What records some microbatches of a program; see `Recordings.of`. engine: has the recordings."""
    recordings: Recordings = engine().recordings
    return recordings.of(program, COUNTED if counts_rows(program.graph) else None, name, stay)


class RecordedProgram:
    """The codes of one compiled program, as they are run, recorded and played back: a `fxpar.compat.CodeRecorder`.

    told: how it stands, for people. off: why there are no recordings, and will be none. together: ranks find out before each
    call whether all of them can play it back; else they have to be alike in it. Ranks run a program equally often, so what
    depends on the number of its runs alone is the same on all.
    """

    together = False

    def __init__(self, of: Recordings, device: Device, fixed: frozenset[int], refused: str | None):
        self._all, self._device, self._program_inputs = of, device, fixed
        self._pool = of.pool
        self._fixed: list[bool] = []
        self._returned = 0
        self._runs, self._decides, self._gap = 0, WARM, 1
        self.off = refused
        self.told = f"off: {refused}" if refused else f"off: not yet, a program is recorded after {WARM} runs"
        self._forward: Recording | None = None
        self._backward: Recording | None = None
        self._trains = self._wants_backward = self._tried = False
        self._times: list[tuple[float, Callable[[], float]]] = []
        self._draws = False
        self._most, self._alive, self._gpu = 0, 0, 0.0

    # ---- what AOTAutograd's function calls ----

    def takes(self, inputs: Sequence[int], more: int = 0) -> None:
        self._fixed = [i in self._program_inputs for i in inputs] + [True] * more

    def forward(self, code: compat.Code, returned: int) -> compat.Code:
        self._returned = returned
        self._trains = True
        return lambda inputs: self._run_forward(code, inputs)

    def alone(self, code: compat.Code) -> compat.Code:
        self._returned = -1
        self._trains = False
        return lambda inputs: self._run_forward(code, inputs)

    def backward(self, code: compat.Code) -> compat.Code:
        return lambda inputs: self._run_backward(code, inputs)

    def decides_now(self) -> bool:
        """Whether the next run is one in which ranks decide: they must have found that they are called alike."""
        return self.off is None and self._runs == self._decides

    @property
    def has_run(self) -> bool:
        return self._runs > 0

    @property
    def is_recorded(self) -> bool:
        return self._forward is not None

    @property
    def plays(self) -> bool:
        return self._backward is not None and self._tried

    def _run_forward(self, code: compat.Code, given: list[Any]) -> Sequence[Any]:
        inputs, number = list(given), self._runs
        given.clear()
        self._runs += 1
        if self.off is not None:
            if self._pool.given_up and self._pool.let_go():
                self._device.give_back()
            return code(inputs)
        if self._wants_backward:
            self.give_up("the backward did not follow the forward that was recorded")
        obstacle = self._occupied()
        if number == self._decides:
            self._decide(code, inputs, obstacle)
        if self._forward is None:
            return self._plainly(code, inputs) if self.off is None else code(inputs)
        self._all.anew()
        obstacle = self._in_the_way(self._forward, inputs, obstacle)
        if obstacle is not None:
            self._note("forward", obstacle)
            outs = code(inputs)
            self._all.anew()
            return outs
        recorded = self._forward
        if self._tried:
            recorded.play(inputs)
        else:
            self._timed(lambda: recorded.play(inputs))
        return self._handed_out(recorded, inputs)

    def _in_the_way(self, recorded: Recording, inputs: list[Any], obstacle: str | None) -> str | None:
        """Why a forward is not played back. obstacle: `_occupied`."""
        return obstacle or (None if recorded.fits(inputs) else MOVED) or self._pool.obstacle()

    def _handed_out(self, recorded: Recording, inputs: list[Any]) -> list[Any]:
        """What a forward that was played back has made."""
        returned = self._returned if self._trains else len(recorded.places)
        outs = list(recorded.copies(inputs, recorded.places[:returned]))
        if self._trains:
            saved, storage = recorded.lend_together(inputs, recorded.places[returned:])
            self._pool.loan = None if storage is None else Loan(storage)
            outs += saved
        return outs

    def _run_backward(self, code: compat.Code, given: list[Any]) -> Sequence[Any]:
        inputs = list(given)
        given.clear()
        loan, recorded, wanted = self._pool.loan, self._backward, self._wants_backward
        lent = {compat.storage_of(x) for x in inputs if isinstance(x, Tensor)} if loan is not None else ()
        if loan is None or compat.storage_number(loan.storage) not in lent:
            return self._plain_backward(code, inputs)
        if loan.consumed:
            raise RuntimeError("a second backward pass through a forward whose tensors are gone: give the first one "
                               "retain_graph=True")
        keeps = compat.keeps_graph()
        if wanted and self._forward is not None:
            self._wants_backward = False
            recorded = self._decide_backward(code, inputs, "retain_graph" if keeps else self._occupied())
        obstacle = "retain_graph" if keeps else self._occupied() if recorded is None or recorded.fits(inputs) else MOVED
        if recorded is None or obstacle is not None:
            outs = self._plain_backward(code, inputs)
            loan.consumed = not keeps
            return outs
        self._all.anew()
        if self._tried:
            recorded.play(inputs)
        else:
            self._timed(lambda: recorded.play(inputs))
        loan.consumed = True
        outs, storages = recorded.lend(inputs)
        self._pool.lent += storages
        return outs

    def _plain_backward(self, code: compat.Code, inputs: list[Any]) -> Sequence[Any]:
        if self._backward is None:
            return self._plainly(code, inputs) if self.off is None and self._forward is None else code(inputs)
        self._note("backward", "")
        self._all.anew()
        outs = code(inputs)
        self._all.anew()
        return outs

    def _note(self, what: str, why: str) -> None:
        """Have ranks compare, along with the next call, that this one ran a code as it is, which they are to do as well."""
        self._all.control.watch.note(f"{what} that was recorded, and not played back" + (f": {why}" if why else ""))

    def _plainly(self, code: compat.Code, inputs: list[Any]) -> Sequence[Any]:
        """Run a code as it is, and see how long it takes, and whether it draws random numbers."""
        drawn = self._device.drawn()
        outs = self._timed(lambda: code(inputs))
        self._draws |= self._device.drawn() != drawn
        return outs

    def _timed(self, run: Callable[[], Any]) -> Any:
        made, *times = self._device.timed(run)
        self._times.append(tuple(times))  # type: ignore[arg-type]
        del self._times[: -2 * (1 + self._trains)]  # of two steps
        return made

    # ---- what ranks decide together ----

    def _occupied(self) -> str | None:
        if torch.is_anomaly_enabled():
            return "anomalies are looked for (torch.autograd.detect_anomaly)"
        if compat.saves_elsewhere():
            return "hooks decide where saved tensors are kept"
        return "inference mode" if torch.is_inference_mode_enabled() else self._device.occupied()

    def _vote(self, why: str | None, for_ever: bool = False) -> list[Vote]:
        times = self._times[-2 * (1 + self._trains) :]
        steps = max(len(times) / (1 + self._trains), 1)
        more = max(self._device.alive() - self._alive, 0)  # an optimizer's state, made since
        mine = Vote(why, for_ever, sum(h for h, _ in times) / steps, sum(g() for _, g in times) / steps, self._most,
                    self._device.taken() - more, self._device.size())
        return self._all.control.exchange(mine)

    def _decide(self, code: compat.Code, inputs: list[Any], obstacle: str | None) -> None:
        if self._forward is not None:
            self._decide_again(inputs)
            return
        never = self._never(inputs)
        self._most, self._alive = self._device.most(), self._device.alive()
        votes = self._vote(never or obstacle or self._pool.obstacle(), never is not None)
        host, gpu = max(v.host for v in votes), max(v.gpu for v in votes)
        if (why := first_against(votes)) is not None:
            self._postpone(why, any(v.for_ever for v in votes))
        elif self._all.wanted == "auto" and gpu >= HOST_BOUND * host:
            self._postpone(f"the GPU takes {gpu * 1e3:.0f} ms, the host that starts its work {host * 1e3:.0f} ms", True)
        else:
            self._gpu = gpu
            self._device.give_back()  # for the recordings, which find a place of their own
            self._forward = self._record(code, list(inputs), self._fixed)
            self._wants_backward = self._trains and self._forward is not None
            self._tried = False
            self._decides = self._runs + TRIED
            if self._forward is not None and not self._trains:
                self._forward.made.clear()

    def _decide_backward(self, code: compat.Code, inputs: list[Any], obstacle: str | None) -> Recording | None:
        forward = self._forward
        assert forward is not None
        if (why := first_against(self._vote(obstacle))) is not None:
            self.give_up(why)
            self._postpone(why)
            return None
        places, kept = forward.places[self._returned :], forward.made[self._returned :]
        forward.made = []
        pooled = frozenset(i for i, p in enumerate(places) if p is not None and p.input is None)
        # what the forward made, and not what was lent of it: what the backward is done with, it may overwrite
        given = [kept[i] if i in pooled else x for i, x in enumerate(inputs)]
        del kept
        fixed = [i < len(places) for i in range(len(inputs))]
        self._backward = self._record(_in_order(code), given, fixed, pooled)
        if self._backward is not None:
            self._backward.made.clear()
            self._device.give_back()
        return self._backward

    def _decide_again(self, inputs: list[Any]) -> None:
        """Whether recordings are still of use."""
        assert self._forward is not None
        fits = self._forward.fits(inputs)
        votes = self._vote(None if fits else MOVED)
        if (why := first_against(votes)) is not None:
            self.give_up(why)
            self._gap = 1
            self._postpone(why)
            return
        if not self._tried:
            self._tried = True
            gpu, more = max(v.gpu for v in votes), max(v.taken / max(v.most, 1) for v in votes)
            plenty = max(v.taken / v.size for v in votes) <= PLENTY
            if self._all.wanted == "auto" and more > MORE_MEMORY and not plenty:
                self.give_up("")
                self._postpone(f"recordings take {100 * (more - 1):.0f} % more memory", True)
                return
            told = f"the GPU takes {gpu * 1e3:.0f} ms, and {self._gpu * 1e3:.0f} ms without"
            if self._all.wanted == "auto" and gpu > GAIN * self._gpu:
                self.give_up("")
                self._postpone(f"with recordings {told}", True)
                return
            self._say(f"on ({told})")
        self._decides = self._runs - 1 + EVERY

    def _record(self, code: compat.Code, inputs: list[Any], fixed: Sequence[bool],
                pooled: frozenset[int] = frozenset()) -> Recording | None:
        """A recording, if all ranks could make theirs."""
        self._all.anew()
        made: Recording | None = None
        why: str | None = None
        try:
            made = Recording(self._device, code, inputs, fixed, self._all.anew, pooled)
        except Exception as error:
            _log.debug("CUDA graphs: what could not be recorded", exc_info=True)
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        broken = why is not None
        if (why := first_against(self._vote(why))) is None:
            return made
        self._all.anew(broken)
        if made is not None:
            self._pool.given_up.append(made)
        self.give_up("")
        self._postpone(f"it could not be recorded: {why}", True)
        return None

    def _never(self, inputs: list[Any]) -> str | None:
        """What will always keep a program from being recorded."""
        if len(inputs) != len(self._fixed):
            return "AOTAutograd changed what the code takes"
        for x in inputs:
            if not isinstance(x, Tensor):
                return f"an input is a {type(x).__name__}"
            if x.device != self._device.device:
                return f"an input is on {x.device}"
        return "random numbers come from PyTorch's generator" if self._draws else None

    def _postpone(self, why: str, for_ever: bool = False) -> None:
        self._say(f"off: {why}")
        if for_ever:
            self.off = why
            self._times.clear()
        self._decides = self._runs - 1 + self._gap
        self._gap = min(2 * self._gap, EVERY)

    def give_up(self, why: str = "") -> None:
        """Run the codes as they are from now on, until it is decided again."""
        self._pool.given_up += [r for r in (self._forward, self._backward) if r is not None]
        self._forward = self._backward = None
        self._wants_backward = False
        if why:
            self._postpone(why)

    def end(self, why: str) -> None:
        """Run the codes as they are from now on."""
        self.give_up()
        self.off = why

    def _say(self, told: str) -> None:
        if told != self.told and self._all.control.rank == 0:
            _log.info("CUDA graphs: %s", told)
        self.told = told


def _in_order(code: compat.Code) -> compat.Code:
    """A code whose tensors lie in memory in the order of their dims, as gradients do in the ``.grad`` of parameters: what is
    recorded leaves them there, and nobody copies them elsewhere."""
    return lambda inputs: [x.contiguous() if isinstance(x, Tensor) and 0 not in x.stride() else x for x in code(inputs)]
