"""execute: runs what a schedule says, on one rank or, in a simulation, on all ranks of one process in turn.

Whoever calls says what it means to run a stage (`Runner`) and to pass values between ranks (`Post`); the order is here.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from fxpar.errors import FxparError
from fxpar.pipeline.schedules import Action, Kind, Schedule

V = TypeVar("V")
"""What crosses a cut: the values of a stage's messages, in order, or their gradients."""


class Runner(Protocol[V]):
    """One stage. Microbatches are numbered; each goes through `forward`, then `backward`, or `input_gradients` and later
    `weight_gradients`."""

    def unshard(self) -> None:
        """Gather the stage's parameters for the whole step."""

    def forward(self, microbatch: int, received: V | None) -> V:
        """What the stage sends on, of what it received (None: it is the first stage)."""

    def backward(self, microbatch: int, grads: V | None) -> V:
        """The gradients of what was received; those of weights are added up. grads: of what was sent on (None: last stage)."""

    def input_gradients(self, microbatch: int, grads: V | None) -> V:
        """The part of `backward` for which the stage before waits."""

    def weight_gradients(self, microbatch: int) -> None:
        """The rest of it."""

    def reduce(self) -> None:
        """Sum the stage's gradients over data-parallel ranks."""


class Post(Protocol[V]):
    """What carries values between the ranks of a pipeline."""

    def send(self, action: Action, to: int, values: V) -> None:
        """Start sending to a rank. The values may not be overwritten after."""

    def receive(self, action: Action, of: int) -> None:
        """Start receiving from a rank."""

    def arrived(self, action: Action) -> V | None:
        """What a receive that was started brought; None if it is not there yet, and this rank is to be asked again."""


class Execution(Generic[V]):
    """A rank's part of one step.

    runners: of the stages that the rank holds, by their numbers. kinds: the actions that are done; others are skipped, as those
    of the backward are in an evaluation.
    """

    def __init__(self, schedule: Schedule, rank: int, runners: Mapping[int, Runner[V]], post: Post[V],
                 kinds: Collection[Kind] = tuple(Kind)):
        self.schedule, self.rank, self.runners, self.post = schedule, rank, runners, post
        self.actions = [a for a in schedule.actions[rank] if a.kind in kinds]
        self.done = 0
        self._made: dict[Action, V] = {}  # what was computed here and is not used yet, by the send that it is for

    def run(self) -> Iterator[None]:
        """Do the actions in order. It yields where a message is waited for that is not there yet."""
        for action in self.actions:
            yield from self._do(action)
            self.done += 1

    def _do(self, action: Action) -> Iterator[None]:
        kind, runner, microbatch = action.kind, self.runners[action.stage], action.microbatch or 0
        if kind is Kind.UNSHARD:
            runner.unshard()
        elif kind is Kind.REDUCE:
            runner.reduce()
        elif kind is Kind.W:
            runner.weight_gradients(microbatch)
        elif kind in (Kind.SEND_F, Kind.SEND_B):
            self.post.send(action, self.schedule.peer(action), self._made.pop(action))
        elif kind in (Kind.RECV_F, Kind.RECV_B):
            self.post.receive(action, self.schedule.peer(action))
        else:
            given = yield from self._given(action)
            run = {Kind.F: runner.forward, Kind.B: runner.backward, Kind.I: runner.input_gradients}[kind]
            made = run(microbatch, given)
            if action.stage != (self.schedule.stages - 1 if kind is Kind.F else 0):
                self._made[replace(action, kind=Kind.SEND_F if kind is Kind.F else Kind.SEND_B)] = made

    def _given(self, action: Action) -> Generator[None, None, V | None]:
        """What a forward or backward takes from the neighbouring stage; None if there is none."""
        forward = action.kind is Kind.F
        if action.stage == (0 if forward else self.schedule.stages - 1):
            return None
        neighbour = action.stage + (-1 if forward else 1)
        if self.schedule.owner[neighbour] == self.rank:
            return self._made.pop(Action(neighbour, Kind.SEND_F if forward else Kind.SEND_B, action.microbatch))
        receive = replace(action, kind=Kind.RECV_F if forward else Kind.RECV_B)
        while (values := self.post.arrived(receive)) is None:
            yield
        return values


class Mailbox(Generic[V]):
    """The `Post` of all ranks of one process."""

    def __init__(self) -> None:
        self._sent: dict[Action, V] = {}

    def send(self, action: Action, to: int, values: V) -> None:
        forward = action.kind is Kind.SEND_F
        kind, stage = (Kind.RECV_F, action.stage + 1) if forward else (Kind.RECV_B, action.stage - 1)
        self._sent[Action(stage, kind, action.microbatch)] = values

    def receive(self, action: Action, of: int) -> None:
        pass

    def arrived(self, action: Action) -> V | None:
        return self._sent.pop(action, None)


def run_together(executions: Sequence[Execution]) -> None:
    """All ranks of a schedule in one process: each goes on until it waits for a message.

    Raises: `FxparError` if all wait.
    """
    running = {e: e.run() for e in executions}
    while running:
        done = sum(e.done for e in executions)
        running = {e: steps for e, steps in running.items() if next(steps, True) is None}
        if running and sum(e.done for e in executions) == done:
            waiting = {e.rank: str(e.actions[e.done]) for e in running}
            name = executions[0].schedule.name
            raise FxparError(f"ranks of the pipeline wait for each other, under schedule {name}: {waiting}")
