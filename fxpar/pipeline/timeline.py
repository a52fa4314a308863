"""When every action of a schedule runs, from the times that its stages take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxpar.pipeline.schedules import Action, Kind, Schedule, Transfer, makes, needs


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one stage takes on its rank, of one microbatch; of unshard and reduce, for the whole step.

    backward: of B, where it is not the sum of I and W (it reads what they share once).
    """

    forward: float
    input_gradients: float
    weight_gradients: float
    backward: float | None = None
    unshard: float = 0.0
    reduce: float = 0.0

    def of(self, kind: Kind) -> float:
        """Seconds of an action; those of a message depend on two stages, and are not here."""
        both = self.input_gradients + self.weight_gradients
        return {Kind.F: self.forward, Kind.I: self.input_gradients, Kind.W: self.weight_gradients,
                Kind.B: both if self.backward is None else self.backward,
                Kind.UNSHARD: self.unshard, Kind.REDUCE: self.reduce}[kind]


@dataclass(frozen=True, slots=True)
class Span:
    """An action, and the seconds between the step's begin and the action's start and end."""

    action: Action
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """A schedule with the times of its actions: `spans[rank]` has those of a rank in the order of its list."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @property
    def step(self) -> float:
        """Seconds until the last action has ended, messages and reductions included."""
        return max(span.end for spans in self.spans for span in spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """For each rank, the seconds in which it computes."""
        return tuple(sum(span.seconds for span in spans if span.action.kind.computes) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they compute nothing; 0 where nothing takes time."""
        return 1 - sum(self.busy) / (len(self.spans) * self.step) if self.step else 0.0


def timeline(schedule: Schedule, times: StageTimes | Sequence[StageTimes], transfer: float | Sequence[float] = 0.0) -> Timeline:
    """Runs a schedule's lists by the clock.

    times: of every stage; one for all that take the same.
    transfer: seconds for what passes between a stage and the next, in either direction, if they are on different ranks;
        one for all, or one for each stage but the last.

    A rank computes one action at a time, in its order, as soon as what it needs has arrived. Messages run beside
    computation: receives are posted ahead, and messages from one rank to another follow each other. A rank's gathers and
    reductions follow each other too, and slow no message down. A gather delays the forwards of its stage.

    Raises ValueError where the number of times fits no schedule, or one is negative. The table must be one that `check` accepts.
    """
    of = [times] * schedule.stages if isinstance(times, StageTimes) else list(times)
    hops = [transfer] * (schedule.stages - 1) if isinstance(transfer, (int, float)) else list(transfer)
    if len(of) != schedule.stages or len(hops) != schedule.stages - 1:
        raise ValueError(f"{schedule.stages} stages take as many times, and transfers between them; "
                         f"given were {len(of)} and {len(hops)}")
    if min([t.of(kind) for t in of for kind in _TIMED] + hops) < 0:
        raise ValueError("a time must not be negative")
    clock = _Clock(schedule, of, hops)
    while any([clock.advance(rank) for rank in range(schedule.ranks)]):
        pass
    return Timeline(schedule, tuple(map(tuple, clock.spans)))


_TIMED = (Kind.F, Kind.I, Kind.W, Kind.B, Kind.UNSHARD, Kind.REDUCE)


class _Clock:
    """How far each rank has come, and when."""

    def __init__(self, schedule: Schedule, times: list[StageTimes], hops: list[float]) -> None:
        self.schedule, self.times, self.hops = schedule, times, hops
        self.spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
        self.computed = [0.0] * schedule.ranks  # when a rank is through with the computation it has come to
        self.network = [0.0] * schedule.ranks  # the same of its gathers and reductions
        self.link: dict[tuple[int, int], float] = {}  # and of messages from one rank to another
        self.gathered: dict[int, float] = {}
        self.sent: dict[Transfer, Span] = {}
        self.there: dict[tuple[int, Transfer], float] = {}  # when a value is on a rank

    def advance(self, rank: int) -> bool:
        """Runs a rank until it needs what has not been made; whether it moved."""
        actions, spans = self.schedule.actions[rank], self.spans[rank]
        before = len(spans)
        while len(spans) < len(actions) and (span := self.run(rank, actions[len(spans)])):
            spans.append(span)
        return len(spans) > before

    def run(self, rank: int, action: Action) -> Span | None:
        match action.kind:
            case Kind.UNSHARD | Kind.REDUCE:
                return self.communicate(rank, action)
            case Kind.SEND_F | Kind.SEND_B:
                return self.send(rank, action)
            case Kind.RECV_F | Kind.RECV_B:
                return self.receive(rank, action)
        return self.compute(rank, action)

    def compute(self, rank: int, action: Action) -> Span | None:
        needed = [(rank, value) for value in needs(action, self.schedule.stages)]
        if any(value not in self.there for value in needed):
            return None
        first = self.gathered.get(action.stage, 0.0)
        start = max([self.computed[rank], first, *(self.there[value] for value in needed)])
        end = self.computed[rank] = start + self.times[action.stage].of(action.kind)
        self.there.update(((rank, value), end) for value in makes(action))
        return Span(action, start, end)

    def communicate(self, rank: int, action: Action) -> Span:
        start = max(self.network[rank], self.computed[rank])
        end = self.network[rank] = start + self.times[action.stage].of(action.kind)
        if action.kind is Kind.UNSHARD:
            self.gathered[action.stage] = end
        return Span(action, start, end)

    def send(self, rank: int, action: Action) -> Span:
        forward = action.kind is Kind.SEND_F
        value = action.stage, forward, action.microbatch
        link = rank, self.schedule.peer(action)
        start = max(self.there[rank, value], self.link.get(link, 0.0))
        end = self.link[link] = start + self.hops[action.stage if forward else action.stage - 1]
        self.sent[value] = Span(action, start, end)
        return self.sent[value]

    def receive(self, rank: int, action: Action) -> Span | None:
        forward = action.kind is Kind.RECV_F
        value = action.stage + (-1 if forward else 1), forward, action.microbatch
        if value not in self.sent:
            return None
        sent = self.sent[value]
        self.there[rank, value] = sent.end
        return Span(action, sent.start, sent.end)
