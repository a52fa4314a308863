"""Rows go to the ranks of their experts, and come back: an all-to-all whose parts are as long as a router makes them.

    arrival = exchange_plan(experts, axes, count)      which rows go where; how many arrive is known from here on
    order, arrived, splits, room = arrival
    rows = to_experts(rows, axes, order, splits, experts, room)
    rows = to_tokens(rows, axes, order, splits, experts, room)

Of `count` experts, each rank along `axes` has as many, in order. Its own rows lie in the order of their experts [n]; those that
arrive are brought into it [m]: first by expert, then by the rank they come from. Rows of no expert go to the last rank, behind
all others. `to_experts` and `to_tokens` are inverse to each other, and each is the other's gradient.

To compilers the plan and the exchange are opaque operators, of which m is the one size that depends on values: every exchange
of a plan has the same. Without other ranks (see `Runtime.balanced`) m is n. A plan is made in steps, so that the host, which has
to wait for the GPU once to know m, does so as late as it can, with as little as possible left to start behind it, and what says
where rows that arrive belong is made while they are on their way (`overlap` puts them there):

    runs, splits = COUNTS(experts, ...)                counts are exchanged, and on their way to the host
    room = ROOM(splits, ...)                           the one time that the host waits for the GPU; m rows that hold nothing
    order, arrived = ORDER(runs, room, ...)
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fxpar import compat
from fxpar.ops.collectives import Collective, described_by
from fxpar.ops.experts import put_back, take_rows
from fxpar.ops.kernels import has_triton
from fxpar.ops.runtime import LONE, active
from fxpar.ops.vocabulary import WAIT
from fxpar.sharding.mesh import Axes

Arrival = tuple[Tensor, Tensor, Tensor, Tensor]
"""order [m]: which of the rows, as they arrive, is in each place; experts [m]: of the rows in these places; splits [2, ranks], on
the host: how many rows go to each rank, and come from it; room [m]: is there for its size."""

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("exchange_counts(Tensor experts, int count, str group, int ranks) -> (Tensor, Tensor)")
_library.define("exchange_room(Tensor splits, Tensor experts, bool balanced, Tensor[] started) -> Tensor")
_library.define("exchange_order(Tensor runs, Tensor room, Tensor experts, int count, str group, int ranks) -> (Tensor, Tensor)")
_library.define("exchange_rows(Tensor rows, Tensor splits, Tensor tokens, Tensor room, bool back, str group) -> Tensor")
COUNTS = torch.ops.fxpar.exchange_counts.default
"""experts [n], sorted -> what `runs_of` makes of the rows that come from each rank for each expert here, and of none; and the
splits of an `Arrival`, which are there when `ROOM` has been."""
ROOM = torch.ops.fxpar.exchange_room.default
"""splits, experts [n] -> the room of an `Arrival`. started: values that are to be made before the host waits."""
ORDER = torch.ops.fxpar.exchange_order.default
"""runs, room, experts [n] -> order and experts of an `Arrival`."""
ROWS = torch.ops.fxpar.exchange_rows.default
"""rows [n, ...] -> [m, ...], or `back`: started, and to be waited for by `wait_tensor`. tokens [n] and room [m] are there for
their sizes."""
PLANS = (COUNTS, ROOM, ORDER)
"""The steps of a plan."""


def exchange_plan(experts: Tensor, axes: Axes, count: int) -> Arrival:
    """See the module's docstring. experts [n]: of this rank's rows, sorted."""
    run = active()
    name, ranks = run.exchange_name(axes), run.size(axes)
    runs, splits = COUNTS(experts, count, name, ranks)
    room: Tensor = ROOM(splits, experts, run.balanced, [])
    order, arrived = ORDER(runs, room, experts, count, name, ranks)
    return order, arrived, splits, room


def to_experts(rows: Tensor, axes: Axes, order: Tensor, splits: Tensor, tokens: Tensor, room: Tensor) -> Tensor:
    """rows [n, ...] -> [m, ...]; order, splits, room: of the plan, tokens [n]: what it was made from."""
    made: Tensor = _Exchange.apply(rows, splits, tokens, room, False, active().exchange_name(axes))
    return take_rows(made, order, 1)


def to_tokens(rows: Tensor, axes: Axes, order: Tensor, splits: Tensor, tokens: Tensor, room: Tensor) -> Tensor:
    """The inverse."""
    made: Tensor = _Exchange.apply(put_back(rows, order), splits, tokens, room, True, active().exchange_name(axes))
    return made


class _Exchange(torch.autograd.Function):
    """Started, and waited for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Tensor, tokens: Tensor, room: Tensor, back: bool, group: str) -> Tensor:
        ctx.save_for_backward(splits, tokens, room)
        ctx.back, ctx.group = back, group
        made: Tensor = WAIT(ROWS(rows, splits, tokens, room, back, group))
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, *ctx.saved_tensors, not ctx.back, ctx.group), *[None] * 5


EXCHANGES = (to_experts, to_tokens)
described_by(to_experts, lambda rows, axes, *_: Collective("to_experts", rows, axes))
described_by(to_tokens, lambda rows, axes, *_: Collective("to_tokens", rows, axes))


def exchanged_along(node: fx.Node) -> Axes | None:
    """The axes along which a node of a program exchanges rows, or plans to; None of another node."""
    if node.target not in (exchange_plan, *EXCHANGES):
        return None
    axes: Any = node.args[1]
    return axes


def counts_rows(graph: fx.Graph) -> bool:
    """Whether a program has values whose number of rows is known only when it runs."""
    return bool(graph.find_nodes(op="call_function", target=exchange_plan))


def counted(graph: fx.Graph) -> set[fx.Node]:
    """The values of a program whose number of rows is known only when it runs, and what is made of them before they go back."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is exchange_plan or (node.target is not to_tokens and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


# ---- what one rank does ----


def leaving(experts: Tensor, count: int, ranks: int) -> Tensor:
    """experts [n], sorted -> [ranks, count / ranks + 1]: how many rows there are for each expert of each rank, and of none."""
    ends = torch.searchsorted(experts, torch.arange(count, dtype=experts.dtype, device=experts.device), right=True)
    each = count // ranks
    out = ends.new_zeros(ranks, each + 1)
    out[:, :each] = torch.diff(ends, prepend=ends.new_zeros(1)).view(ranks, each)
    out[-1, -1] = experts.shape[0] - ends[-1]
    return out


def runs_of(counts: Tensor) -> Tensor:
    """counts [ranks, experts + 1]: how many rows come from each rank for each expert here, and of none
    -> [2, runs] of the rows of one expert that come from one rank, first by expert, then by rank: behind which row each run
    ends, and how much further on than its place each of its rows arrives."""
    lengths, ends = counts.T.reshape(-1), counts.flatten().cumsum(0).view(counts.shape).T.reshape(-1)
    placed = lengths.cumsum(0)
    return torch.stack([placed, ends - placed])


def arriving(runs: Tensor, rows: int, ranks: int, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """runs: of rows that come from so many ranks for the experts here, of which the first has the number `first`; `rows` in all
    -> order and experts of an `Arrival`."""
    if runs.is_cuda and has_triton():
        from fxpar.ops.kernels.arrival import LONGEST, place_arrivals

        if runs.shape[1] <= LONGEST:
            return place_arrivals(runs, rows, ranks, first, dtype)
    places = torch.arange(rows, device=runs.device)
    run = torch.searchsorted(runs[0], places, right=True)
    return places + runs[1][run], (first + run // ranks).to(dtype)


class _Copied(dist.Work):
    """A copy to the host, for which the host itself waits."""

    def __init__(self) -> None:
        super().__init__()
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._event.synchronize()
        return True


@torch.library.impl(_library, "exchange_counts", "CompositeExplicitAutograd")
def _counts(experts: Tensor, count: int, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    mine = leaving(experts, count, ranks)
    if group == LONE:
        theirs = mine[:1].repeat(ranks, 1)
    else:
        found = compat.collective_group(group)
        if found.size() != ranks:
            raise ValueError(f"an exchange over {ranks} ranks in a group of {found.size()}")
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=found)
    splits = torch.stack([mine.sum(1), theirs.sum(1)])
    if splits.is_cuda:
        splits = torch.empty(splits.shape, dtype=splits.dtype, pin_memory=True).copy_(splits, non_blocking=True)
        compat.register_work(splits, _Copied())
    return runs_of(theirs), splits


@torch.library.impl(_library, "exchange_room", "CompositeExplicitAutograd")
def _room(splits: Tensor, experts: Tensor, balanced: bool, started: list[Tensor]) -> Tensor:
    WAIT(splits)
    return experts.new_empty(sum(splits[1].tolist()), dtype=torch.uint8)


@torch.library.impl(_library, "exchange_order", "CompositeExplicitAutograd")
def _order(runs: Tensor, room: Tensor, experts: Tensor, count: int, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    rank = 0 if group == LONE else compat.collective_group(group).rank()
    return arriving(runs, room.shape[0], ranks, count // ranks * rank, experts.dtype)


@torch.library.impl(_library, "exchange_rows", "CompositeExplicitAutograd")
def _rows(rows: Tensor, splits: Tensor, tokens: Tensor, room: Tensor, back: bool, group: str) -> Tensor:
    sent, received = splits.tolist()
    if back:
        sent, received = received, sent
    if group == LONE:
        return rows.new_zeros(sum(received), *rows.shape[1:]) if back else torch.cat([rows[: sent[0]]] * len(sent))
    out = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(out, rows.contiguous(), received, sent, group=compat.collective_group(group), async_op=True)
    compat.register_work(out, work)
    return out


@torch.library.register_fake("fxpar::exchange_counts", lib=_library)
def _fake_counts(experts: Tensor, count: int, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    return (experts.new_empty(2, count + ranks, dtype=torch.int64),
            torch.empty(2, ranks, dtype=torch.int64, device=experts.device if experts.is_meta else "cpu"))


@torch.library.register_fake("fxpar::exchange_room", lib=_library)
def _fake_room(splits: Tensor, experts: Tensor, balanced: bool, started: list[Tensor]) -> Tensor:
    return experts.new_empty(experts.shape[0] if balanced else torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("fxpar::exchange_order", lib=_library)
def _fake_order(runs: Tensor, room: Tensor, experts: Tensor, count: int, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty(room.shape[0], dtype=torch.int64), experts.new_empty(room.shape[0])


@torch.library.register_fake("fxpar::exchange_rows", lib=_library)
def _fake_rows(rows: Tensor, splits: Tensor, tokens: Tensor, room: Tensor, back: bool, group: str) -> Tensor:
    return rows.new_empty((tokens if back else room).shape[0], *rows.shape[1:])
