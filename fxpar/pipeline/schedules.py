"""The order in which every pipeline rank runs its stages: a table of actions, made without processes.

A model is cut into ``ranks x virtual_stages`` stages. `owner` says which rank holds each: stage ``s`` is on rank ``s %
ranks``, and under zbv, whose stages go down the ranks and up again, stages 0 and ``2 x ranks - 1`` are both on rank 0.
A rank runs its list in order. A list holds computation (F, B, I, W), what passes between ranks of the pipeline (SEND_F,
...), and what ranks of one stage do together (UNSHARD, REDUCE).

One event loop makes the lists of all ranks: it runs the ranks' computation as if F, I and W took the same time, and
when a value is made that another rank needs, puts its send and its receive in both lists at that moment. The events
have one order over all ranks, so executing the lists, even with sends that wait for their receive, cannot hang
(fxpar/pipeline/check.py proves it of a table).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fxpar.errors import PlanError
from fxpar.plan.plan import require_one_of, require_virtual_stages


class Kind(Enum):
    """What an action does with one stage."""

    F = "F"
    """The stage's forward of one microbatch."""
    B = "B"
    """Its whole backward: gradients of its inputs and of its weights."""
    I = "I"
    """The part of its backward that makes the gradients of its inputs, for which the stage before waits."""
    W = "W"
    """The other part: gradients of its weights, for which nobody waits; after I."""
    SEND_F = "SEND_F"
    """Sends what the forward made to the next stage's rank."""
    RECV_F = "RECV_F"
    """Receives what the stage before made, for this stage's forward."""
    SEND_B = "SEND_B"
    """Sends the gradients of the stage's inputs to the stage before."""
    RECV_B = "RECV_B"
    """Receives the gradients of the stage's outputs, for its B or I."""
    UNSHARD = "UNSHARD"
    """Gathers the stage's parameters, which are then kept to the end of the step."""
    REDUCE = "REDUCE"
    """Sums the stage's gradients over data-parallel ranks."""

    @property
    def computes(self) -> bool:
        return self in _COMPUTES

    @property
    def is_message(self) -> bool:
        return self in _MESSAGES


_COMPUTES = frozenset((Kind.F, Kind.B, Kind.I, Kind.W))
_MESSAGES = frozenset((Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B))


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a rank. A receive names the stage that receives. microbatch: None for UNSHARD and REDUCE, done once a step."""

    stage: int
    kind: Kind
    microbatch: int | None = None

    def __str__(self) -> str:
        of = str(self.stage) if self.microbatch is None else f"{self.stage}, {self.microbatch}"
        return f"{self.kind.value}({of})"


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline does in one step.

    name, ranks, virtual_stages, microbatches: what it was made for.
    owner: the rank that holds each stage.
    actions: each rank's list, in order.
    in_flight: for each rank, the most forwards (of a microbatch at a stage) whose backward is to come: its promise.
    """

    name: str
    ranks: int
    virtual_stages: int
    microbatches: int
    owner: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    in_flight: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.owner)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds."""
        return tuple(stage for stage, owner in enumerate(self.owner) if owner == rank)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive. Raises ValueError for another action."""
        if not action.kind.is_message:
            raise ValueError(f"{action} communicates with no rank of the pipeline")
        return self.owner[action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)]

    def splits(self, stage: int) -> bool:
        """Whether a stage's backward is run in two halves, for some microbatch."""
        return any(action.kind is Kind.I and action.stage == stage for action in self.actions[self.owner[stage]])

    def alive(self) -> tuple[int, ...]:
        """For each stage, the most microbatches whose forward has begun and whose backward (B or W) has not ended."""
        one = [1.0] * self.stages
        return tuple(int(self._peak({stage}, one, one)) for stage in range(self.stages))

    def memory(self, kept: Sequence[float], kept_for_weights: Sequence[float] | None = None) -> tuple[float, ...]:
        """For each rank, the most bytes of activations that it holds at once, for all of its stages together.

        kept: bytes that the forward of one microbatch keeps at each stage, until its B or I. kept_for_weights: what is
        kept from I to W, what I made for W included; None: as much. The order alone decides it, as a rank computes one
        action at a time. Messages that have arrived and are not used yet are not counted.
        """
        left = kept if kept_for_weights is None else kept_for_weights
        if not len(kept) == len(left) == self.stages:
            raise ValueError(f"a schedule of {self.stages} stages needs as many sizes, not {len(kept)} and {len(left)}")
        return tuple(self._peak(set(self.stages_of(rank)), kept, left) for rank in range(self.ranks))

    def _peak(self, stages: set[int], kept: Sequence[float], left: Sequence[float]) -> float:
        """The most that is held for these stages, all of one rank."""
        now = peak = 0.0
        for action in self.actions[self.owner[min(stages)]]:
            if action.stage in stages:
                here, later = kept[action.stage], left[action.stage]
                now += {Kind.F: here, Kind.I: later - here, Kind.B: -here, Kind.W: -later}.get(action.kind, 0.0)
                peak = max(peak, now)
        return peak


SCHEDULES = ("1f1b", "gpipe", "interleaved1f1b", "zb1p", "zbv")
"""Names of the schedules."""
PUTS_OFF = ("zb1p", "zbv")
"""Those that put off gradients of weights."""

_Order = list[Action]


def schedule(name: str, *, ranks: int, virtual_stages: int = 1, microbatches: int, unshard: bool = False) -> Schedule:
    """The table of a schedule.

    name: one of SCHEDULES.
        gpipe: all forwards, then all backwards.
        1f1b: a rank starts as many forwards as there are ranks from it to the last; then one backward, one forward.
        interleaved1f1b: the same with several stages a rank: a smaller bubble, more messages.
        zb1p: 1f1b with the backward split: another rank waits for I, and W fills the bubble. Every rank holds as many
            microbatches as under 1f1b the first does, which holds the most. With several stages a rank, interleaved.
        zbv: zb1p with two stages a rank, placed so that the last stage is on the first rank.
    ranks: of the pipeline. virtual_stages: how many stages each holds.
    microbatches: any number; the bubble is small where they are many times the ranks.
    unshard: whether parameters are gathered at the beginning of a step.

    Raises PlanError for an unknown name, for virtual_stages that the schedule cannot have, and for numbers below one.
    """
    require_one_of("schedule", name, SCHEDULES)
    for field, value in (("pp", ranks), ("virtual_stages", virtual_stages), ("microbatches", microbatches)):
        if value < 1:
            raise PlanError(field, value, "must be a positive integer", f"{field}=1")
    require_virtual_stages(name, virtual_stages)
    if name == "zbv":
        owner = (*range(ranks), *reversed(range(ranks)))
        orders = [_zbv(rank, ranks, microbatches) for rank in range(ranks)]
        in_flight = [min(2 * ranks, 2 * microbatches)] * ranks
    else:
        owner = tuple(range(ranks)) * virtual_stages
        warm_up = [_warm_up(name, rank, ranks, virtual_stages, microbatches) for rank in range(ranks)]
        delay = [rank if name == "zb1p" else 0 for rank in range(ranks)]
        orders = [_looped(rank, ranks, virtual_stages, microbatches, warm_up[rank], delay[rank], name == "zb1p")
                  for rank in range(ranks)]
        in_flight = [min(warm + late + 1, virtual_stages * microbatches) for warm, late in zip(warm_up, delay)]
    actions = _communicate([_reduce(_whole_first_stage(order)) for order in orders], owner)
    if unshard:
        actions = [_unshard(order) + order for order in actions]
    return Schedule(name, ranks, virtual_stages, microbatches, owner, tuple(map(tuple, actions)), tuple(in_flight))


def _warm_up(name: str, rank: int, ranks: int, virtual_stages: int, microbatches: int) -> int:
    """How many forwards a rank runs before the one that its first backward follows."""
    if name == "gpipe":
        return microbatches
    behind = ranks - 1 - rank
    return _rounds(ranks, microbatches)[0] * (virtual_stages - 1) + (2 * behind if name == "interleaved1f1b" else behind)


def _rounds(ranks: int, microbatches: int) -> list[int]:
    """How many microbatches go through one of a rank's stages before it turns to its next: `ranks`, or few more.

    The first microbatch of a round comes back from the last rank when the last of the round has left the first rank.
    """
    count = max(1, microbatches // ranks)
    return [microbatches // count + (i < microbatches % count) for i in range(count)]


def _looped(rank: int, ranks: int, virtual_stages: int, microbatches: int, warm_up: int, delay: int, split: bool) -> _Order:
    """The computation of a rank that holds stages rank, rank + ranks, ...: `warm_up` forwards, then one with each backward.

    split: whether a backward is I, with W after `delay` further ones.
    """
    own = [rank + ranks * i for i in range(virtual_stages)]
    forwards: deque[tuple[int, int]] = deque()
    backwards: list[tuple[int, int]] = []
    begin = 0
    for size in _rounds(ranks, microbatches):
        members = range(begin, begin + size)
        forwards.extend((stage, microbatch) for stage in own for microbatch in members)
        backwards.extend((stage, microbatch) for stage in reversed(own) for microbatch in members)
        begin += size
    order = [_action(Kind.F, forwards.popleft()) for _ in range(min(warm_up, len(forwards)))]
    for i, at in enumerate(backwards):
        if forwards:
            order.append(_action(Kind.F, forwards.popleft()))
        order.append(_action(Kind.I if split else Kind.B, at))
        if split and i >= delay:
            order.append(_action(Kind.W, backwards[i - delay]))
    return order + [_action(Kind.W, at) for at in backwards[max(0, len(backwards) - delay):] if split]


def _action(kind: Kind, at: tuple[int, int]) -> Action:
    return Action(at[0], kind, at[1])


def _zbv(rank: int, ranks: int, microbatches: int) -> _Order:
    """The computation of a rank that holds stage `rank` on the way down and stage 2 x ranks - 1 - rank on the way up.

    Written for the 2 x ranks - 1 microbatches that fill the pipeline; with fewer, those that do not exist are left out.
    """
    down, up = rank, 2 * ranks - 1 - rank
    filling = max(2 * ranks - 1, microbatches)
    order: _Order = []
    done = {(stage, kind): 0 for stage in (down, up) for kind in (Kind.F, Kind.I, Kind.W)}

    def add(stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            if done[stage, kind] < microbatches:
                order.append(Action(stage, kind, done[stage, kind]))
            done[stage, kind] += 1

    for _ in range(2 * (ranks - rank) - 1):
        add(down, Kind.F)
    for _ in range(rank):
        add(up, Kind.F)
        add(down, Kind.F)
    for _ in range(ranks - rank):
        add(up, Kind.F, Kind.I, Kind.W)
    while done[up, Kind.F] < filling:
        if done[down, Kind.F] < filling:
            add(down, Kind.F)
        add(down, Kind.I, Kind.W)
        add(up, Kind.F, Kind.I, Kind.W)
    for _ in range(rank):
        add(down, Kind.I)
        add(up, Kind.I)
    for _ in range(ranks - rank):
        add(down, Kind.I, Kind.W)
    for stage in (up, down):
        while done[stage, Kind.W] < done[stage, Kind.I]:
            add(stage, Kind.W)
    return order


def _whole_first_stage(order: _Order) -> _Order:
    """Nobody waits for gradients of the first stage's inputs, so that its I and W, one after the other, are one B."""
    out: _Order = []
    for action in order:
        if action.kind is Kind.W and out[-1] == Action(0, Kind.I, action.microbatch):
            out[-1] = Action(0, Kind.B, action.microbatch)
        else:
            out.append(action)
    return out


def _reduce(order: _Order) -> _Order:
    """Gradients of a stage are summed right behind its last B or W, under what the rank still computes."""
    last = {action.stage: i for i, action in enumerate(order) if action.kind in (Kind.B, Kind.W)}
    return [new for i, action in enumerate(order)
            for new in ([action, Action(action.stage, Kind.REDUCE)] if last[action.stage] == i else [action])]


def _unshard(order: _Order) -> _Order:
    """Stages are gathered in the order of their first forwards: each under what those before compute."""
    return [Action(action.stage, Kind.UNSHARD) for action in order if action.kind is Kind.F and action.microbatch == 0]


_UNITS = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}
Transfer = tuple[int, bool, int | None]
"""What travels between stages: (the stage that makes it, whether its forward does, microbatch)."""


def _communicate(orders: Sequence[_Order], owner: Sequence[int]) -> list[_Order]:
    """Puts each send and its receive into both ranks' lists at the moment at which the value is made, by an even clock."""
    waiting = [deque(order) for order in orders]
    lists: list[_Order] = [[] for _ in orders]
    running: dict[int, tuple[Action, int]] = {}
    made: set[Transfer] = set()
    now = 0
    while any(waiting):
        for rank, (action, end) in sorted(running.items()):
            if end == now:
                del running[rank]
                made |= makes(action)
                for to, send, receive in _message(action, owner):
                    lists[rank].append(send)
                    lists[to].append(receive)
        for rank, order in enumerate(waiting):
            while order and rank not in running and needs(order[0], len(owner)) <= made:
                action = order.popleft()
                lists[rank].append(action)
                if action.kind.computes:
                    running[rank] = action, now + _UNITS[action.kind]
        assert running or not any(waiting), "ranks wait for each other"
        now += 1
    return lists


def makes(action: Action) -> set[Transfer]:
    """What a computation makes for other stages, or for its own backward."""
    return set() if action.kind is Kind.W else {(action.stage, action.kind is Kind.F, action.microbatch)}


def needs(action: Action, stages: int) -> set[Transfer]:
    """What must have been made before a rank can go on with an action that is next in its list."""
    if action.kind is Kind.F and action.stage > 0:
        return {(action.stage - 1, True, action.microbatch)}
    if action.kind in (Kind.B, Kind.I):
        later = {(action.stage + 1, False, action.microbatch)} if action.stage < stages - 1 else set()
        return {(action.stage, True, action.microbatch)} | later
    return set()


def _message(action: Action, owner: Sequence[int]) -> list[tuple[int, Action, Action]]:
    """(the rank that needs what an action has made, the send, the receive); empty if none needs it, or the action's own."""
    if action.kind is Kind.W:
        return []
    forward = action.kind is Kind.F
    to = action.stage + (1 if forward else -1)
    if not 0 <= to < len(owner) or owner[to] == owner[action.stage]:
        return []
    send, receive = (Kind.SEND_F, Kind.RECV_F) if forward else (Kind.SEND_B, Kind.RECV_B)
    return [(owner[to], Action(action.stage, send, action.microbatch), Action(to, receive, action.microbatch))]
