"""The proof, on one table, that a pipeline's step is complete, possible, cannot hang, and holds what it promises."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import NoReturn

from fxpar.errors import PlanError
from fxpar.pipeline.schedules import Action, Kind, Schedule

_SPLIT = [Kind.F, Kind.I, Kind.W]
_WHOLE = [Kind.F, Kind.B]


def check(schedule: Schedule) -> None:
    """Proves of a schedule's table that

    - every rank holds as many stages as the schedule says, and their actions stand in its list alone, each once;
    - every microbatch passes every stage as F, B or as F, I, W, in this order;
    - a stage's gradients are reduced once, right behind its last B or W, and its parameters, if at all, gathered once
    and first;
    - a value that is needed on another rank is sent once and received once, and nothing else is; the two ranks of any
      pair have what passes between them, in both directions, in the same order;
    - the lists run to their end though a send waits until it is received, and each action finds what it needs on its
    rank;
    - no rank holds more than it promises.

    Raises PlanError for `schedule`, naming the rank, and what it lacks or waits for.
    """
    _check_owners(schedule)
    _check_completeness(schedule)
    _check_collectives(schedule)
    _check_messages(schedule)
    _run(schedule)
    for rank, (most, promised) in enumerate(zip(schedule.memory([1] * schedule.stages), schedule.in_flight)):
        if most > promised:
            _refuse(schedule, f"must hold {promised} forwards at most on rank {rank}, and holds {most:.0f}")


def _refuse(schedule: Schedule, requirement: str) -> NoReturn:
    raise PlanError("schedule", schedule.name, requirement)


def _check_owners(schedule: Schedule) -> None:
    counts = Counter(schedule.owner)
    if counts != dict.fromkeys(range(schedule.ranks), schedule.virtual_stages):
        _refuse(schedule, f"must have {schedule.virtual_stages} stages on each of {schedule.ranks} ranks")
    if not len(schedule.actions) == len(schedule.in_flight) == schedule.ranks:
        _refuse(schedule, f"must have a list of actions, and a promise, for each of {schedule.ranks} ranks")
    for rank, actions in enumerate(schedule.actions):
        for action, count in Counter(actions).items():
            if not 0 <= action.stage < schedule.stages or schedule.owner[action.stage] != rank:
                _refuse(schedule, f"must have {action} on the rank that holds its stage, and has it on rank {rank}")
            if count > 1:
                _refuse(schedule, f"must have {action} once, and has it {count} times on rank {rank}")


def _check_completeness(schedule: Schedule) -> None:
    kinds: dict[tuple[int, int | None], list[Kind]] = {
        (stage, microbatch): [] for stage in range(schedule.stages) for microbatch in range(schedule.microbatches)}
    for action in (action for actions in schedule.actions for action in actions if action.kind.computes):
        if (action.stage, action.microbatch) not in kinds:
            _refuse(schedule, f"must have {schedule.microbatches} microbatches, and has {action}")
        kinds[action.stage, action.microbatch].append(action.kind)
    for (stage, microbatch), found in kinds.items():
        if found not in (_WHOLE, _SPLIT):
            names = ", ".join(kind.value for kind in found) or "nothing"
            _refuse(schedule, f"must compute F, B or F, I, W of microbatch {microbatch} at stage {stage}, and computes {names}")


def _check_collectives(schedule: Schedule) -> None:
    for stage, rank in enumerate(schedule.owner):
        actions = schedule.actions[rank]
        own = [i for i, action in enumerate(actions) if action.stage == stage and action.kind.computes]
        reduce, unshard = Action(stage, Kind.REDUCE), Action(stage, Kind.UNSHARD)
        if reduce not in actions:
            _refuse(schedule, f"must reduce the gradients of stage {stage} on rank {rank}, and does not")
        at = actions.index(reduce)
        if at < own[-1]:
            _refuse(schedule, f"must reduce the gradients of stage {stage} behind {actions[own[-1]]}, and does so before")
        between = [action for action in actions[own[-1] + 1: at] if action.kind.computes]
        if between:
            _refuse(schedule, f"must reduce the gradients of stage {stage} as soon as they are made, and has {between[0]} before")
        if unshard in actions and actions.index(unshard) > own[0]:
            _refuse(schedule, f"must gather the parameters of stage {stage} first, and has {actions[own[0]]} before")
        for action in actions:
            if action.microbatch is not None and action.kind in (Kind.REDUCE, Kind.UNSHARD):
                _refuse(schedule, f"must gather and reduce once for all microbatches, and has {action}")


_Link = tuple[int, int, int | None]
"""(sending stage, receiving stage, microbatch)"""


def _message(action: Action) -> _Link:
    other = action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)
    stages = (action.stage, other) if action.kind in (Kind.SEND_F, Kind.SEND_B) else (other, action.stage)
    return *stages, action.microbatch


def _check_messages(schedule: Schedule) -> None:
    owner = schedule.owner
    needed: dict[_Link, None] = {
        (source, target, microbatch): None for stage in range(schedule.stages - 1) if owner[stage] != owner[stage + 1]
        for source, target in ((stage, stage + 1), (stage + 1, stage)) for microbatch in range(schedule.microbatches)}
    for kinds, verb, end in (((Kind.SEND_F, Kind.SEND_B), "send", 0), ((Kind.RECV_F, Kind.RECV_B), "receive", 1)):
        found = {_message(action): action for actions in schedule.actions for action in actions if action.kind in kinds}
        for source, target, microbatch in (message for message in needed if message not in found):
            _refuse(schedule, f"must {verb} on rank {owner[(source, target)[end]]} what stage {source} makes of microbatch "
                              f"{microbatch} for stage {target}, and does not")
        for message, action in found.items():
            if message not in needed:
                _refuse(schedule, f"must {verb} nothing that no other rank needs, and has {action}")
    for one, other in combinations(range(schedule.ranks), 2):
        here, there = ([action for action in schedule.actions[a] if action.kind.is_message and schedule.peer(action) ==
        b]
                       for a, b in ((one, other), (other, one)))
        for mine, theirs in zip(here, there):
            if _message(mine) != _message(theirs):
                _refuse(schedule, f"must have messages between ranks {one} and {other} in one order on both, "
                                  f"and where rank {one} has {mine}, rank {other} has {theirs}")


_Done = tuple[int, Kind, int | None]
"""(stage, kind, microbatch), where B counts as I, because it makes what I makes."""


def _run(schedule: Schedule) -> None:
    """Executes the lists; a send and its receive are executed together, when both ranks have come to them."""
    at = [0] * schedule.ranks
    done: set[_Done] = set()

    def ready(rank: int) -> Action | None:
        """The action that a rank has come to, if what it needs is there."""
        action = schedule.actions[rank][at[rank]] if at[rank] < len(schedule.actions[rank]) else None
        return action if action and _inputs(schedule, action) <= done else None

    def step(rank: int) -> bool:
        action = ready(rank)
        if action is None:
            return False
        both = {rank: action}
        if action.kind.is_message:
            answer = ready(peer := schedule.peer(action))
            if answer is None or not answer.kind.is_message or _message(answer) != _message(action):
                return False
            both[peer] = answer
        for moved, executed in both.items():
            at[moved] += 1
            done.add((executed.stage, Kind.I if executed.kind is Kind.B else executed.kind, executed.microbatch))
        return True

    while any([step(rank) for rank in range(schedule.ranks)]):
        pass
    stuck = [f"rank {rank} at {actions[at[rank]]}" for rank, actions in enumerate(schedule.actions)
             if at[rank] < len(actions)]
    if stuck:
        _refuse(schedule, f"must run to its end, and hangs with {', '.join(stuck)}")


def _inputs(schedule: Schedule, action: Action) -> set[_Done]:
    """What must have been executed for an action to find its operands on its rank."""
    stage, microbatch = action.stage, action.microbatch

    def arrives(other: int, made: Kind, received: Kind) -> _Done:
        beside = schedule.owner[other] == schedule.owner[stage]
        return (other, made, microbatch) if beside else (stage, received, microbatch)

    match action.kind:
        case Kind.F if stage > 0:
            return {arrives(stage - 1, Kind.F, Kind.RECV_F)}
        case Kind.B | Kind.I if stage < schedule.stages - 1:
            return {(stage, Kind.F, microbatch), arrives(stage + 1, Kind.I, Kind.RECV_B)}
        case Kind.SEND_F:
            return {(stage, Kind.F, microbatch)}
        case Kind.SEND_B:
            return {(stage, Kind.I, microbatch)}
    return set()
